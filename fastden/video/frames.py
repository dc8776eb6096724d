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
#: The matrices that players take where none is stated, by FFmpeg's number: of small frames, and from 720 lines on.
SMALL, HIGH, HIGH_LINES = 6, 1, 720
#: Values of YUV are shifted to 16 bits: white of 8 bits, 255, becomes this.
SHIFTED = 255 << 8
_LIMITED, _FULL = 1, 2


def yuv_to_rgb(space: int, height: int) -> Array:
    """(3, 3) float64, for luma on the scale 0-1 and chroma around 0.

    Args:
        space: FFmpeg's number; unspecified is BT.709 from 720 lines on, else BT.601, as players take it.
        height: of the frame.
    """
    high = space == UNSPECIFIED and height >= HIGH_LINES
    red, blue = WEIGHTS.get(space, BT709 if high else BT601)
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def becomes_yuv(av: Any, first: Any, pixel_format: str) -> bool:
    """Whether frames that are no YUV, as ``first``, are written as YUV."""
    return _is_yuv(av.VideoFormat(pixel_format)) and not _is_yuv(first.format)


def tags(av: Any, first: Any, pixel_format: str) -> tuple[int, int]:
    """Range and colour space, FFmpeg's numbers, of frames like ``first`` that are written in ``pixel_format``.

    They are the input's. Where RGB or gray becomes YUV, it gets those that players expect: limited range, and a matrix
    by the height.
    """
    if not becomes_yuv(av, first, pixel_format):
        return first.color_range, first.colorspace
    full = pixel_format.startswith("yuvj")
    return _FULL if full else _LIMITED, HIGH if first.height >= HIGH_LINES else SMALL


def has_alpha(kind: Any) -> bool:
    """Whether a pixel format has transparency."""
    return any(component.is_alpha for component in kind.components)


def _is_yuv(kind: Any) -> bool:
    colours = len(kind.components) - has_alpha(kind)
    return colours > 1 and not (kind.is_rgb or kind.has_palette)


class FrameConverter:
    """Conversions for frames of one kind.

    Args:
        av: the module of PyAV.
        first: a frame; the others have its size and format.
    """

    def __init__(self, av: Any, first: Any) -> None:
        self.av = av
        components = first.format.components
        alpha = has_alpha(first.format)
        coloured = len(components) - alpha > 1 or first.format.has_palette
        self.is_yuv = _is_yuv(first.format)
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

    def _scaled(self, scaler: Any, frame: Any, pixel_format: str, **colours: Any) -> Any:
        colours = {"src_color_range": self.range, "dst_color_range": self.range} | colours
        return scaler.reformat(frame, format=pixel_format, interpolation=self.scaling, **colours)

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
        made_range, made_space = tags(self.av, like, pixel_format)
        if becomes_yuv(self.av, like, pixel_format):
            wide.colorspace = UNSPECIFIED
            spaces = self.av.video.reformatter.Colorspace
            space = spaces.ITU709 if made_space == HIGH else spaces.ITU601
            before = _FULL
            if self.format == "gray16le" and like.color_range == _LIMITED:
                # As in AV1. FFmpeg takes all gray for full range, so it gets luma, whose values it only shifts.
                luma = np.rint(np.clip(values[:, :, :1] * np.float32(SHIFTED), 0, 65535)).astype(np.uint16)
                both = np.concatenate([luma, np.full((*luma.shape[:2], 2), 32768, np.uint16)], 2)
                wide = self.av.VideoFrame.from_ndarray(both, format="yuv444p16le", channel_last=True)
                before = _LIMITED
            made = self._scaled(
                self.narrow,
                wide,
                pixel_format,
                src_color_range=before,
                dst_color_range=made_range,
                dst_colorspace=space,
            )
        else:
            wide.colorspace = like.colorspace
            made = self._scaled(self.narrow, wide, pixel_format)
        made.colorspace, made.color_range = made_space, made_range
        made.color_trc, made.color_primaries = like.color_trc, like.color_primaries
        made.pts, made.time_base, made.duration = like.pts, like.time_base, like.duration
        return made
