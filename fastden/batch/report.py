"""Reports of a run over many files, during it and at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastden.batch.manifest import Record
from fastden.batch.plan import Job


@dataclass
class Report:
    """The result of a run.

    Attributes:
        jobs: how many images were asked for.
        records: of the images that were done or failed, in the order in which they ended.
        skipped: jobs that an earlier run had done.
        left: jobs that an interrupted run did not begin.
        left_out: image files in the folders of kinds that fastden does not read; of :meth:`fastden.BatchDenoiser.run`.
        unreadable: errors of files that cannot be looked at, and of folders below that cannot be read; of several
            inputs also of each that is not there or holds no image; and of files whose outputs would share a name. Each
            has its ``filename``; of the same. They are no jobs.
        seconds: from beginning to end.
        compute_seconds: time of the networks for the images that were done; on a CUDA device by its own clock.
        networks: how many compute at the same time; more than one on a cluster.
    """

    jobs: int
    records: list[Record] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    left: int = 0
    left_out: list[Path] = field(default_factory=list)
    unreadable: list[OSError] = field(default_factory=list)
    seconds: float = 0.0
    compute_seconds: float = 0.0
    networks: int = 1

    def add(self, record: Record) -> None:
        """Count an image that is done or has failed."""
        self.records.append(record)
        self.compute_seconds += record.seconds.get("compute", 0.0)

    def close(self, seconds: float) -> None:
        """End the run after ``seconds``: jobs without a record count as left."""
        self.left = self.jobs - len(self.records) - len(self.skipped)
        self.seconds = seconds

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if record.status == "done"]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.status == "failed"]

    @property
    def megapixels(self) -> float:
        """Megapixels of the images that were done."""
        return sum(record.width * record.height * record.pages for record in self.done) / 1e6

    @property
    def compute_share(self) -> float:
        """Share of the time in which the networks computed, 0 to 1."""
        return self.compute_seconds / (self.seconds * self.networks) if self.seconds else 0.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: each output that was begun is complete or removed.

    Attributes:
        report: of the run until then.
    """

    def __init__(self, report: Report) -> None:
        super().__init__("interrupted")
        self.report = report


@dataclass(frozen=True)
class Listener:
    """Functions that a run calls. One thread calls them at a time, which may be any thread.

    Attributes:
        record: an image is done, or has failed: its job, its record.
        progress: tiles are done, or an image has ended: how many images have ended, and how many images' worth of the
            others is computed. The sum never falls.
        note: something that concerns the whole run.
    """

    record: Callable[[Job, Record], None] = lambda job, record: None
    progress: Callable[[int, float], None] = lambda ended, part: None
    note: Callable[[str], None] = lambda text: None
