"""Images travel to a CUDA device and back while it computes: pinned memory, a stream for each direction."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastden.images.pixels import Array
from fastden.inference.run import from_batch

#: Most passes that are queued on the device: one computes while the image of the next arrives.
AHEAD = 2
#: Share of the device's memory limit that an image and its result may take. Larger images travel tile by tile.
SHARE = 4


@dataclass(frozen=True)
class Pending:
    """A pass that the device may not have finished.

    Attributes:
        host: takes the result, pinned.
        source: the pinned image, which has to stay until the copy is done.
        begun, ended: of the computation.
        fetched: the result is in ``host``.
    """

    host: Tensor
    source: Tensor
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    fetched: torch.cuda.Event

    def image(self, index: int) -> Array:
        """Wait for the device; one of the images, (H, W, C)."""
        self.fetched.synchronize()
        item = self.host[index : index + 1]
        (array,) = from_batch(item, item.numpy().dtype)
        return array

    def seconds(self) -> float:
        """Seconds that the device computed."""
        self.ended.synchronize()
        return self.begun.elapsed_time(self.ended) / 1000


class Transfer:
    """Copies to a device and back.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._running: deque[torch.cuda.Event] = deque()

    def pin(self, batch: Tensor) -> Tensor:
        """A copy that the device can read in parallel with compute; for a thread that has time for it."""
        return batch.pin_memory()

    def fits(self, batch: Tensor, limit: int) -> bool:
        """Whether an image and its result may lie on the device as a whole, ``limit`` being the bytes allowed there."""
        return 2 * AHEAD * batch.nbytes * SHARE <= limit

    def run(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> Pending:
        """Queue the copy to the device, the computation and the copy back; waits where enough is queued already.

        Args:
            batch: pinned.
            compute: queues work on the device's present stream and returns a tensor there.
        """
        while len(self._running) >= AHEAD:
            self._running.popleft().synchronize()
        with torch.cuda.device(self.device):
            present = torch.cuda.current_stream()
            with torch.cuda.stream(self._up):
                image = batch.to(self.device, non_blocking=True)
            present.wait_stream(self._up)
            # The allocator must not reuse this memory before the other stream has finished.
            image.record_stream(present)
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record(present)
            result = compute(image)
            ended.record(present)
            self._down.wait_stream(present)
            with torch.cuda.stream(self._down):
                host = torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=True)
                host.copy_(result, non_blocking=True)
            result.record_stream(self._down)
            fetched = torch.cuda.Event()
            fetched.record(self._down)
        self._running.append(fetched)
        return Pending(host, batch, begun, ended, fetched)
