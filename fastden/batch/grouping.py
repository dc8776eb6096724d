"""Small images go through the network together, if that is faster and changes no bit of the results."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastden.images.pixels import Array, to_dtype
from fastden.inference.run import denoise_batch
from fastden.inference.tiling import HALO, WHOLE, automatic_tile
from fastden.network.fused import FusedDenoiser
from fastden.network.onednn import BATCH_PIXELS

#: Most images that go together. More would gain little, and where memory runs out all of them are computed again.
MOST = 16


def together(network: FusedDenoiser, height: int, width: int, memory: int) -> int:
    """Number of images of one size in a pass; 1 where more are no faster.

    On a CPU the network itself takes small images together up to
    :data:`fastden.network.onednn.BATCH_PIXELS`, and larger ones one by one. On an accelerator images that
    are a single tile go together.

    Args:
        network: any.
        height, width: of the images, pixels.
        memory: bytes for the network's tensors.
    """
    if max(height, width) > WHOLE:
        return 1
    fitting = automatic_tile(network, height, width, MOST, memory)[1]
    if network.device.type == "cpu":
        fitting = min(fitting, BATCH_PIXELS // ((height + 2 * HALO) * (width + 2 * HALO)))
    return max(fitting, 1)


class Equality:
    """Whether an image gets the same bits in a pass with others as it gets alone, on this machine and for this shape.

    Libraries may choose other kernels for other batch sizes, and those add up in another order. A resumed run forms
    other batches than an uninterrupted one, and must write the same files. So the first images of each shape are
    denoised both ways and compared in floating point, before rounding can hide a difference.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], bool] = {}

    def holds(self, network: FusedDenoiser, images: list[Array], level: float | Tensor | None, memory: int) -> bool:
        """Compare when this number of images, shape and network occur for the first time.

        Args:
            network: any.
            images: (H, W, C), of one shape and dtype.
            level: of the images, on the scale 0-1, (N,) or curves (N, 8); a number is that of one; None for a blind
                network.
            memory: bytes for the network's tensors.
        """
        key = (len(images), images[0].shape, network.dtype, network.device)
        if key not in self._known:
            floats = [to_dtype(image, np.float32) for image in images]
            joint = denoise_batch(floats, level, network, max_memory=memory)
            ends = (0, len(images) - 1)
            own = [level[i : i + 1] if isinstance(level, Tensor) else level for i in ends]
            alone = [
                denoise_batch([floats[i]], one, network, max_memory=memory)[0] for i, one in zip(ends, own, strict=True)
            ]
            self._known[key] = all(np.array_equal(joint[i], one) for i, one in zip(ends, alone, strict=True))
        return self._known[key]
