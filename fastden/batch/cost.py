"""How many images an hour a device does, from measured milliseconds a megapixel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastden.batch.manifest import Record


@dataclass(frozen=True)
class Cost:
    """Milliseconds that one megapixel takes in each stage of a worker.

    Attributes:
        read, compute, write: decoding with what fetches the file, the network, encoding with what stores the file.
    """

    read: float
    compute: float
    write: float

    @classmethod
    def of(cls, records: Iterable[Record]) -> Cost:
        """Means over the records of a run, weighted by pixels.

        Raises:
            ValueError: no image among them is done.
        """
        done = [record for record in records if record.status == "done"]
        megapixels = sum(record.width * record.height * record.pages for record in done) / 1e6
        if not megapixels:
            raise ValueError("records: none is done; accepted: at least one image that was denoised")
        stages = ("read", "compute", "write")
        return cls(*(1000 * sum(record.seconds[stage] for record in done) / megapixels for stage in stages))

    def images_an_hour(
        self, megapixels: float, workers: int = 1, *, files_at_once: int = 1, cores: int | None = None
    ) -> float:
        """Images that one device does in an hour.

        Files that are in hand together hide each other's reading and writing until the network is always at work.

        Args:
            megapixels: of an image.
            workers: that share the device.
            files_at_once: that a worker has in hand; see :func:`fastden.batch.ray.files_at_once`.
            cores: of a CPU that is the device: reading and writing take of them what the network lacks then. None for a
                GPU, beside which they are taken for free.
        """
        beside = self.read + self.write
        one_by_one = (beside + self.compute) / (workers * files_at_once)
        return 3.6e6 / (megapixels * max(self.compute + (beside / cores if cores else 0), one_by_one))
