"""How many images an hour a device does, from measured milliseconds a megapixel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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
    def of(cls, records: Iterable[dict[str, Any]]) -> Cost:
        """Means over the records of a run, weighted by pixels.

        Raises:
            ValueError: no image among them is done.
        """
        done = [record for record in records if record["status"] == "done"]
        megapixels = sum(record["width"] * record["height"] * record.get("pages", 1) for record in done) / 1e6
        if not megapixels:
            raise ValueError("records: none is done; accepted: at least one image that was denoised")
        stages = ("read", "compute", "write")
        return cls(*(1000 * sum(record["seconds"][stage] for record in done) / megapixels for stage in stages))

    def images_an_hour(self, megapixels: float, workers: int = 1, overlapped: bool = False) -> float:
        """Images that one device does in an hour.

        A worker of the ``ray`` engine reads, computes and writes one file after another, so ``workers`` that share a
        GPU hide each other's reading and writing until the network is always at work. On a CPU the stages compete for
        the same cores, and one worker for all cores is what the figure holds for.

        Args:
            megapixels: of an image.
            workers: that share the device.
            overlapped: a worker reads and writes while it computes, as the local engine does.
        """
        longest = max(self.read, self.compute, self.write) if overlapped else self.read + self.compute + self.write
        return 3.6e6 / (megapixels * max(self.compute, longest / workers))
