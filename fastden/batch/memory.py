"""The memory of a run: its split between network and images, and the gate where images wait for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from fastden.errors import shown_bytes
from fastden.inference.tiling import DEFAULT_MEMORY, TiledNetwork, least_memory

#: Bytes of the host's memory for the images of a run where no ``max_memory`` is given.
DEFAULT_IMAGES = 1 << 30


class Stopped(Exception):
    """The run has been stopped, and no more images are admitted."""


@dataclass(frozen=True)
class Budget:
    """Bytes for the network's tensors, and for the images in the host's memory that are not finished."""

    network: int
    images: int


def split_memory(max_memory: int | None, model: TiledNetwork) -> Budget:
    """The halves of ``max_memory``; on an accelerator the network's half is the device's.

    Raises:
        ValueError: the network's half does not hold the smallest tile.
    """
    if max_memory is None:
        return Budget(DEFAULT_MEMORY, DEFAULT_IMAGES)
    least = 2 * least_memory(model)
    if max_memory < least:
        raise ValueError(
            f"max_memory: {shown_bytes(max_memory)}; accepted: at least {shown_bytes(least)} for this model"
        )
    return Budget(max_memory // 2, max_memory // 2)


class Gate:
    """Admits images while their bytes fit; one that is alone always fits.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes fit, and claim them.

        Raises:
            Stopped: the gate was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.taken or self.taken + size <= self.limit)
            if self._closed:
                raise Stopped
            self.taken += size

    def admit(self, size: int, *, whole: bool) -> int:
        """Wait until an image fits, and claim its bytes.

        Args:
            size: bytes that it takes; above the limit it is admitted alone.
            whole: claim all of the limit, for an image that is streamed.

        Returns:
            The bytes that were claimed, to be given back.

        Raises:
            Stopped: the gate was closed.
        """
        claimed = self.limit if whole else min(size, self.limit)
        self.take(claimed)
        return claimed

    def give_back(self, size: int) -> None:
        with self._changed:
            self.taken -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Raise :class:`Stopped` in every thread that waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
