"""A video's frames as RGB in float32, and back, without clipping and without rounding to 8 bits.

FFmpeg's scaler brings planes to 16 bits and chroma to full size; the step between YUV and RGB is done here, on coded
values without regard to their range, so that whiter than white and colours outside of RGB come back as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastden.images.pixels import Array

#: Weights of red and blue in luma by FFmpeg's number of the colour space. All are invertible, so a wrong one costs no
#: accuracy, only fidelity of the colours that the network sees; BT.601 stands for those that have no matrix here.
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
BT601, BT709 = (0.299, 0.114), WEIGHTS[1]
UNSPECIFIED = 2
#: Values of YUV are shifted to 16 bits: white of 8 bits, 255, becomes this.
SHIFTED = 255 << 8
_LIMITED, _FULL = 1, 2


def yuv_to_rgb(space: int, height: int) -> Array:
    """(3, 3) float64, for luma on the scale 0-1 and chroma around 0.

    Args:
        space: FFmpeg's number; unspecified is BT.709 from 720 lines on, else BT.601, as players take it.
        height: of the frame.
    """
    high = space == UNSPECIFIED and height >= 720
    red, blue = WEIGHTS.get(space, BT709 if high else BT601)
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


class FrameConverter:
    """Conversions for frames of one kind.

    Args:
        av: the module of PyAV.
        first: a frame; the others have its size and format.
    """

    def __init__(self, av: Any, first: Any) -> None:
        self.av = av
        components = first.format.components
        alpha = any(component.is_alpha for component in components)
        coloured = len(components) - alpha > 1 or first.format.has_palette
        self.is_yuv = coloured and not (first.format.is_rgb or first.format.has_palette)
        if self.is_yuv:
            self.format, self.largest = ("yuva444p16le" if alpha else "yuv444p16le"), SHIFTED
        else:
            self.format, self.largest = ("rgba64le" if alpha else "rgb48le" if coloured else "gray16le"), 65535
        matrix = yuv_to_rgb(first.colorspace, first.height)
        self.matrix, self.inverse = matrix.astype(np.float32), np.linalg.inv(matrix).astype(np.float32)
        # YUV stays YUV. Both sides are declared to have one range, so that values are only shifted. FFmpeg takes the
        # formats named yuvj to have full range in any case.
        self.range = _LIMITED if self.is_yuv and not first.format.name.startswith("yuvj") else _FULL
        self.widen, self.narrow = av.video.reformatter.VideoReformatter(), av.video.reformatter.VideoReformatter()
        kinds = av.video.reformatter.Interpolation
        self.scaling = kinds.BICUBIC | kinds.FULL_CHR_H_INT | kinds.FULL_CHR_H_INP | kinds.ACCURATE_RND

    def _scaled(self, scaler: Any, frame: Any, pixel_format: str) -> Any:
        ranges = {"src_color_range": self.range, "dst_color_range": self.range}
        return scaler.reformat(frame, format=pixel_format, interpolation=self.scaling, **ranges)

    def pixels(self, frame: Any) -> Array:
        """(H, W, C) float32 of a frame, C 1 (gray) or 3 (RGB), and alpha as one more."""
        wide = self._scaled(self.widen, frame, self.format).to_ndarray(channel_last=True)
        values = wide.reshape(*wide.shape[:2], -1).astype(np.float32) / np.float32(self.largest)
        if self.is_yuv:
            values[:, :, 1:3] -= np.float32(32768 / SHIFTED)
            values[:, :, :3] = values[:, :, :3] @ self.matrix.T
        return values

    def frame(self, pixels: Array, like: Any, pixel_format: str) -> Any:
        """A frame in ``pixel_format`` of what :meth:`pixels` made, with the time and the tags of ``like``."""
        values = pixels
        if self.is_yuv:
            values = pixels.copy()
            values[:, :, :3] = values[:, :, :3] @ self.inverse.T
            values[:, :, 1:3] += np.float32(32768 / SHIFTED)
        planes = np.rint(np.clip(values * np.float32(self.largest), 0, 65535)).astype(np.uint16)
        if self.format == "gray16le":
            planes = planes[:, :, 0]
        wide = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format=self.format, channel_last=True)
        wide.colorspace = like.colorspace
        made = self._scaled(self.narrow, wide, pixel_format)
        made.colorspace, made.color_range = like.colorspace, like.color_range
        made.color_trc, made.color_primaries = like.color_trc, like.color_primaries
        made.pts, made.time_base, made.duration = like.pts, like.time_base, like.duration
        return made
