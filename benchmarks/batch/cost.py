"""How many images an hour a device does, from measured milliseconds a megapixel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastden.batch.manifest import Record


@dataclass(frozen=True)
class Cost:
    """Milliseconds that one megapixel takes in each stage of a worker.

    Attributes:
        read: fetching and decoding. compute: the network. write: encoding and storing.
    """

    read: float
    compute: float
    write: float

    @classmethod
    def of(cls, records: Iterable[Record]) -> Cost:
        """Means over the records of a run, weighted by pixels.

        Raises:
            ValueError: none of them is the record of a denoised image.
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

        A worker reads and writes some files while it computes another. With enough files at once the network never
        waits.

        Args:
            megapixels: of an image.
            workers: how many share the device.
            files_at_once: how many a worker handles at once; see :func:`fastden.batch.ray.files_at_once`.
            cores: of the CPU, where it is the device: reading, writing and the network share them. None for a GPU,
                where reading and writing take nothing from the network.
        """
        beside = self.read + self.write
        one_by_one = (beside + self.compute) / (workers * files_at_once)
        return 3.6e6 / (megapixels * max(self.compute + (beside / cores if cores else 0), one_by_one))
