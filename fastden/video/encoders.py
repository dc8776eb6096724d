"""Which encoder a denoised video gets, and how it is set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastden.errors import UserError
from fastden.video.frames import has_alpha, tags

#: Default constant rate factor of each encoder: hardly any visible loss.
RATE_FACTORS = {"libx264": 18, "libx265": 20, "libvpx": 8, "libvpx-vp9": 24, "libsvtav1": 24}
#: Bits a second that VP8 may take at most. Without a limit its encoder takes 256 kbit/s, whatever the factor.
VP8_RATE = 200_000_000
#: Factors that encoders take, where not all from 0 to 63: they do not open with others.
FACTORS = {"libx264": (0, 51), "libx265": (0, 51), "libvpx": (4, 63)}
#: Quantiser of the other lossy encoders, where the input's bit rate is unknown: 1 is best, 31 worst.
QUANTISER = 3
#: Encoders to take in place of FFmpeg's default for a codec: they know more pixel formats.
ENCODERS = {"prores": "prores_ks"}
#: Codecs to try, in this order, where the input's own codec cannot be encoded.
INSTEAD = ("h264", "hevc", "av1", "ffv1")
#: Frames a second that SVT-AV1 takes at most. Times are given with each frame; this serves its control of the rate.
SVT_RATE = 240
#: FFmpeg's names of the writers of MP4, MOV and M4V.
MP4_LIKE = ("mp4", "mov", "ipod")
#: The FFmpeg constant by which quantisers are scaled in ``global_quality``.
_LAMBDA = 118


class Encoders:
    """The encoders for a video in a container.

    Args:
        av: the module of PyAV.
        video: the input's stream.
        writer: the output's container.
        suffix: of the output.
        crf: constant rate factor that was asked for.
        note: called with what a user should know about the choice.
    """

    def __init__(
        self, av: Any, video: Any, writer: Any, suffix: str, crf: int | None, note: Callable[[str], None]
    ) -> None:
        self.av, self.video, self.writer, self.suffix, self.crf, self.note = av, video, writer, suffix, crf, note

    def choose(self, first: Any) -> tuple[Any, str]:
        """An encoder that takes the input's frames and goes into the output's container, and its pixel format.

        Raises:
            UserError: there is none.
        """
        own = self.video.codec_context.codec.canonical_name
        wanted = first.format.name
        usable = []
        for name in dict.fromkeys((own, *INSTEAD)):
            try:
                codec = self.av.Codec(ENCODERS.get(name, name), "w")
            except ValueError:  # FFmpeg has no encoder for it
                continue
            if not self.writer.supported_codecs & {name, codec.name}:
                continue
            if name != own and self.crf is not None and not _takes(codec.name, self.crf):
                continue  # the next one may
            if name != own and name == "ffv1" and self.writer.format.name in MP4_LIKE:
                continue  # FFmpeg writes it, and ordinary players do not play it
            rgb = first.format.is_rgb or first.format.has_palette
            if rgb and codec.name == "rawvideo" and self.writer.format.name == "matroska":
                continue  # the writer refuses it, at the first frame
            formats = [known.name for known in codec.video_formats or ()]
            # The formats named yuvj are those named yuv, tagged as full range. FFmpeg's scaler writes no palettes.
            for pixel_format in () if first.format.has_palette else (wanted, wanted.replace("yuvj", "yuv")):
                if (not formats or pixel_format in formats) and self._opens(codec, first, pixel_format):
                    if name != own:
                        self.note(f"{own} cannot be encoded into {self.suffix}; the video is encoded as {name}")
                    return codec, pixel_format
            usable.append((codec, formats))
        alpha = has_alpha(first.format)
        # Raw video names no formats, as it takes all. AVI and MOV take this one.
        best = self.av.codec.codec.find_best_pix_fmt_of_list
        found = [(codec, best(formats or ["bgr24"], wanted, alpha)[0]) for codec, formats in usable]
        # Those that keep transparency come first; with a rate factor that was asked for, those that take it alone.
        for codec, made in sorted(found, key=lambda one: alpha and one[1] is not None and not has_alpha(one[1])):
            if made is not None and self._opens(codec, first, made.name):
                text = f"{own} in {wanted} cannot be encoded into {self.suffix}; the video is {codec.canonical_name}"
                lost = ", without transparency (alpha)" if alpha and not has_alpha(made) else ""
                self.note(f"{text}, {made.name}{lost}")
                return codec, made.name
        raise UserError(f"output: nothing encodes {own} in {wanted} into {self.suffix}; accepted: .mkv, .mp4")

    def _opens(self, codec: Any, first: Any, pixel_format: str) -> bool:
        """Whether the encoder takes the frame's size, times and format: some take certain frame rates only."""
        context = self.av.CodecContext.create(codec, "w")
        context.options = self.options(codec.name)
        self.configure(context, first, pixel_format)
        try:
            context.open()
        except (ValueError, self.av.error.FFmpegError):
            return False
        return True

    def options(self, name: str) -> dict[str, str]:
        """FFmpeg's options of an encoder.

        Raises:
            UserError: a constant rate factor for one that has none.
        """
        if name not in RATE_FACTORS:
            if self.crf is not None:
                raise UserError(f"crf: {self.crf}, but the encoder {name} has none; accepted: no --crf for this codec")
            return {}
        if self.crf is not None and not _takes(name, self.crf):
            least, most = FACTORS[name]
            raise UserError(f"crf: {self.crf}; accepted by the encoder {name}: {least} to {most}")
        options = {"crf": str(RATE_FACTORS[name] if self.crf is None else self.crf)}
        if name == "libx265":
            options["x265-params"] = "log-level=error"
        return options

    def configure(self, context: Any, first: Any, pixel_format: str) -> None:
        """Set an encoder's size, times, colours and quality."""
        source = self.video.codec_context
        context.width, context.height, context.pix_fmt = first.width, first.height, pixel_format
        context.time_base = self.video.time_base
        rate = self.video.average_rate or self.video.guessed_rate
        if rate:
            # With few frames at irregular times FFmpeg may report the unit of time as the frame rate.
            context.framerate = min(rate, SVT_RATE) if context.codec.name == "libsvtav1" else rate
        if self.video.sample_aspect_ratio:
            context.sample_aspect_ratio = self.video.sample_aspect_ratio
        context.color_range, context.colorspace = tags(self.av, first, pixel_format)
        context.color_trc, context.color_primaries = first.color_trc, first.color_primaries
        context.flags |= self.av.codec.context.Flags.frame_duration
        if self.writer.format.name == "avi":  # AVI has no times for frames out of order
            context.max_b_frames = 0
        if context.codec.canonical_name == "hevc" and self.writer.format.name in MP4_LIKE:
            context.codec_tag = "hvc1"  # Apple's players refuse hev1, the writer's own choice
        context.bit_rate = VP8_RATE if context.codec.name == "libvpx" else 0
        if context.codec.name not in RATE_FACTORS:
            context.bit_rate = self.video.bit_rate or 0
            if not context.bit_rate:
                context.qscale, context.global_quality = True, QUANTISER * _LAMBDA
        if context.codec.name == "prores_ks" and source.profile:
            context.profile = source.profile


def _takes(encoder: str, factor: int) -> bool:
    """Whether an encoder opens with a constant rate factor from 0 to 63. FFV1 has none."""
    least, most = FACTORS.get(encoder, (0, 63))
    return encoder in RATE_FACTORS and least <= factor <= most
