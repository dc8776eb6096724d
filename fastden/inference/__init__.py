"""Running the network over images of any size."""

from fastden.inference.tiling import denoise_tiled

__all__ = ["denoise_tiled"]
