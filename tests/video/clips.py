"""Small clips, and what is in them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastden.video.copy import VideoResult, denoise_video

av = pytest.importorskip("av")

WIDTH, HEIGHT, FRAMES = 64, 48, 10
#: Rates of sound that headers must state: blocks of ADPCM hold 2036 samples in 1024 bytes.
BIT_RATES = {"adpcm_ms": 8 * 48000 * 1024 // 2036}
#: Times of the frames in units of 1 / 1000 s: the rate varies.
TIMES = [0, 40, 80, 130, 170, 300, 340, 380, 390, 430]


def planes(index: int, bits: int) -> Any:
    """(H, W) luma with noise, in limited range, all levels in use."""
    random = np.random.default_rng(index)
    top = 1 << bits
    ramp = np.linspace(0.1 * top, 0.85 * top, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    return np.clip(ramp + random.normal(0, 0.03 * top, ramp.shape), 0, top - 1).astype(np.uint8 if bits == 8 else "<u2")


def frame(index: int, pixel_format: str) -> Any:
    bits = max(component.bits for component in av.VideoFormat(pixel_format).components)
    made = av.VideoFrame(WIDTH, HEIGHT, pixel_format)
    for number, plane in enumerate(made.planes):
        values = planes(index, bits) if number == 0 else np.full((plane.height, plane.width), 1 << (bits - 1))
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        data = np.ascontiguousarray(values.astype(np.uint8 if bits == 8 else "<u2")).view(np.uint8)
        rows[:, : data.shape[1]] = data
        plane.update(rows.tobytes())
    made.color_range, made.colorspace, made.color_primaries, made.color_trc = 1, 1, 1, 1
    return made


def make_clip(
    path: Path,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    *,
    frames: int = FRAMES,
    sound: bool = True,
    rotation: int = 0,
    **options: str,
) -> Path:
    with av.open(str(path), "w") as writer:
        writer.metadata["title"] = "A clip"
        stream = writer.add_stream(codec, options=options or ({"qp": "0"} if codec == "libx264" else {}))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = WIDTH, HEIGHT, pixel_format
        context.time_base, context.framerate = Fraction(1, 1000), Fraction(25)
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1, 1
        context.sample_aspect_ratio = Fraction(4, 3)
        if rotation:
            stream.set_display_rotation(rotation)
        name = "libopus" if path.suffix == ".webm" else "aac"
        audio = writer.add_stream(name, rate=48000, layout="mono") if sound else None
        if audio is not None:
            audio.metadata["language"] = "deu"
            tone = np.sin(np.arange(48000 // 2) * 0.05).astype(np.float32)[None]
            sample = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            sample.sample_rate, sample.pts = 48000, 0
            resampler = av.AudioResampler(format=audio.codec_context.format, layout="mono", rate=48000)
            for part in resampler.resample(sample):
                writer.mux(audio.encode(part))
            writer.mux(audio.encode(None))
        for index in range(frames):
            picture = frame(index, pixel_format)
            picture.pts, picture.time_base = TIMES[index % 10] + 470 * (index // 10), Fraction(1, 1000)
            writer.mux(stream.encode(picture))
        writer.mux(stream.encode(None))
    return path


def streams(path: Path, kind: str) -> list[tuple[Any, bytes]]:
    """Times and bytes of the packets of a kind of stream."""
    with av.open(str(path)) as reader:
        stream = next(stream for stream in reader.streams if stream.type == kind)
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in reader.demux(stream) if packet.size]


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as reader:
        return list(reader.decode(video=0))


def luma(picture: Any) -> Any:
    plane = picture.planes[0]
    kind = "<u2" if picture.format.components[0].bits > 8 else np.uint8
    return np.frombuffer(plane, np.uint8).reshape(plane.height, -1).view(kind)[:, : plane.width].astype(int)


def run(source: Path, target: Path, network: Any, sigma: Any = 20.0, **options: Any) -> VideoResult:
    return denoise_video(source, target, sigma, lambda eight_bit, white: network, **options)


def make_sound_only(path: Path) -> None:
    with av.open(str(path), "w") as writer:
        audio = writer.add_stream("aac", rate=48000, layout="mono")
        sample = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sample.sample_rate = 48000
        writer.mux(audio.encode(sample))
        writer.mux(audio.encode(None))


def make_video(
    path: Path,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    *,
    frames: int = 4,
    sound: str | None = None,
    tags: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """A clip of 25 frames a second, with as much sound if its codec is given."""
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream(codec, 25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        stream.metadata.update(tags or {})
        audio = writer.add_stream(sound, rate=48000, layout="mono") if sound else None
        if audio is not None:
            audio.bit_rate = BIT_RATES.get(audio.codec_context.name, 128_000)
        for index in range(frames):
            made = frame(index, "yuv444p").reformat(format=pixel_format)
            made.pts, made.time_base = index, Fraction(1, 25)
            writer.mux(stream.encode(made))
        writer.mux(stream.encode(None))
        if audio is not None:
            context = audio.codec_context
            tone = np.sin(np.arange(1920 * frames) * 0.05).astype(np.float32)[None]
            sample = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            sample.sample_rate, sample.pts = 48000, 0
            resampler = av.AudioResampler(
                format=context.format, layout="mono", rate=48000, frame_size=context.frame_size
            )
            for part in resampler.resample(sample):
                writer.mux(audio.encode(part))
            writer.mux(audio.encode(None))
    return path


def copied(source: Path, target: Path, late: Fraction = Fraction(0), **options: str) -> Path:
    """The streams in a new file, their times ``late`` seconds less."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options) as writer:
        outputs = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        for packet in reader.demux():
            if packet.size:
                units = int(late / packet.time_base)
                packet.pts, packet.dts = packet.pts - units, packet.dts - units
                packet.stream = outputs[packet.stream.index]
                writer.mux(packet)
    return target


def cut(source: Path, target: Path) -> Path:
    """The clip without its first 0.25 s: they are there and hidden by an edit list, as times before 0 are."""
    return copied(source, target, Fraction(1, 4))
