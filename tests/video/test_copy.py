"""Videos: frames are denoised; times, sound, depth, tags and everything else stay."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastden
from fastden.cli.main import app
from fastden.errors import UserError
from fastden.inference.estimate import NoiseEstimate
from fastden.inference.run import Wishes
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.loading import load_network
from fastden.video.copy import ESTIMATED, VideoResult, denoise_video
from fastden.video.encoders import Encoders
from fastden.video.frames import FrameConverter
from tests.helpers import random_network

av = pytest.importorskip("av")

WIDTH, HEIGHT, FRAMES = 64, 48, 10
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


@pytest.fixture(scope="module")
def network() -> FusedDenoiser:
    return fuse(random_network(), torch.float32)


def run(source: Path, target: Path, network: Any, sigma: Any = 20.0, **options: Any) -> VideoResult:
    return denoise_video(source, target, sigma, lambda eight_bit, white: network, **options)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_times_sound_and_tags_stay(suffix: str, tmp_path: Path, network: FusedDenoiser) -> None:
    source, target = make_clip(tmp_path / f"a{suffix}", rotation=90), tmp_path / f"b{suffix}"
    calls: list[tuple[int, int]] = []
    result = run(source, target, network, progress=lambda *call: calls.append(call))
    assert (result.frames, result.width, result.height, result.sigma) == (FRAMES, WIDTH, HEIGHT, 20)
    assert (result.damaged, result.notes) == (0, [])
    assert [done for done, _ in calls] == list(range(1, FRAMES + 1))
    before, after = decoded(source), decoded(target)
    assert [picture.time for picture in after] == pytest.approx([picture.time for picture in before])
    assert [round(1000 * picture.time) for picture in after] == TIMES
    assert streams(source, "audio") == streams(target, "audio")
    assert len(streams(source, "audio")) > 10
    for one, other in zip(before, after, strict=True):
        assert one.format.name == other.format.name
        for tag in ("color_range", "colorspace", "color_primaries", "color_trc", "rotation"):
            assert getattr(one, tag) == getattr(other, tag), tag
    assert after[0].rotation in (90, -90)
    with av.open(str(target)) as reader:
        assert reader.metadata["title"] == "A clip"
        # MOV has no code for this language.
        assert reader.streams.audio[0].metadata.get("language") == (None if suffix == ".mov" else "deu")
        assert reader.streams.video[0].codec_context.name == "h264"
        assert reader.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [
        ("libx264", "yuv420p", ".mp4"),
        ("libx264", "yuvj420p", ".mp4"),
        ("ffv1", "yuv420p10le", ".mkv"),
        ("ffv1", "yuv422p12le", ".mkv"),
        ("ffv1", "yuva444p10le", ".mkv"),
        ("ffv1", "gray10le", ".mkv"),
        ("ffv1", "gbrp10le", ".mkv"),
    ],
)
def test_nothing_denoised_is_nothing_changed(
    codec: str, pixel_format: str, suffix: str, tmp_path: Path, network: FusedDenoiser
) -> None:
    """Through RGB and back with strength 0 the luma stays, above white too and at all depths."""
    source, target = make_clip(tmp_path / f"a{suffix}", codec, pixel_format, frames=3), tmp_path / f"b{suffix}"
    result = run(source, target, network, wishes=Wishes(0.0), crf=0 if codec == "libx264" else None)
    assert result.notes == []
    for one, other in zip(decoded(source), decoded(target), strict=True):
        assert other.format.name == pixel_format
        np.testing.assert_array_equal(luma(one), luma(other))


def colours(path: Path, *, gray: bool) -> Any:
    """The first frame in RGB (H, W, 3), or gray (H, W), as players show it."""
    return decoded(path)[0].to_ndarray(format="gray" if gray else "rgb24").astype(int)


@pytest.mark.parametrize("height", [48, 720])
@pytest.mark.parametrize(
    ("codec", "pixel_format", "source", "target"),
    [
        ("rawvideo", "bgr24", "a.avi", "b.mp4"),
        ("qtrle", "rgb24", "a.mov", "b.mp4"),
        ("ffv1", "gbrp10le", "a.mkv", "b.webm"),
        ("png", "rgb24", "a.mov", "b.webm"),
        ("ffv1", "gray", "a.mkv", "b.mp4"),
        ("rawvideo", "gray", "a.avi", "b.webm"),
    ],
)
def test_other_families_keep_their_colours(
    codec: str, pixel_format: str, source: str, target: str, height: int, tmp_path: Path, network: FusedDenoiser
) -> None:
    """RGB and gray become YUV, which is tagged as players take it."""
    gray = pixel_format == "gray"
    values = np.zeros((height, WIDTH) if gray else (height, WIDTH, 3), np.uint8)
    for part, colour in enumerate([(220, 40, 40), (40, 220, 60), (10, 10, 10), (245, 245, 245)]):
        values[:, 16 * part : 16 * part + 16] = colour[part % 2] if gray else colour
    with av.open(str(tmp_path / source), "w") as writer:
        stream = writer.add_stream(codec, 25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, height, pixel_format
        made = av.VideoFrame.from_ndarray(values, format="gray" if gray else "rgb24").reformat(format=pixel_format)
        writer.mux(stream.encode(made))
        writer.mux(stream.encode(None))
    run(tmp_path / source, tmp_path / target, network, wishes=Wishes(0.0))
    before, after = colours(tmp_path / source, gray=gray), colours(tmp_path / target, gray=gray)
    middles = np.s_[8 : height - 8, 8::16]  # chroma of half size and compression blur the edges
    assert np.abs(after[middles] - before[middles]).max() <= 6
    tags = decoded(tmp_path / target)[0]
    if tags.format.name.startswith("yuv"):
        assert tags.color_range == 1
        assert tags.colorspace in ((1,) if height == 720 else (5, 6))


@pytest.mark.parametrize("tag", [0, 1, 2])
def test_gray_of_limited_range_is_only_shifted(tag: int) -> None:
    values = np.tile(np.array([16, 126, 235, 90], np.uint8), (16, 8))
    source = av.VideoFrame.from_ndarray(values, format="gray")
    source.color_range, source.time_base = tag, Fraction(1, 25)
    converter = FrameConverter(av, source)
    made = converter.frame(converter.pixels(source), source, "yuv420p")
    luma_of = made.to_ndarray()[:16, :32].astype(int)
    expected = values if tag == 1 else np.rint(16 + values * 219.0 / 255)
    assert np.abs(luma_of - expected).max() <= 1
    assert made.color_range == 1


def test_ten_bits_are_not_reduced(tmp_path: Path) -> None:
    model = random_network()
    with torch.no_grad():  # a network that changes little
        for parameter in model.out.parameters():
            parameter.mul_(0.05)
    faint = fuse(model)
    source, target = make_clip(tmp_path / "a.mkv", "ffv1", "yuv420p10le", frames=2), tmp_path / "b.mkv"
    depths: list[bool] = []
    denoise_video(source, target, 20.0, lambda eight_bit, white: depths.append(eight_bit) or faint)
    assert depths == [False]
    values = luma(decoded(target)[0])
    assert len(np.unique(values)) > 500
    assert len(np.unique(values % 4)) == 4


def test_frames_are_denoised_as_images_are(tmp_path: Path, network: FusedDenoiser) -> None:
    """Sigma is on the scale of the coded values."""
    source, target = make_clip(tmp_path / "a.mkv", "ffv1", "gray", frames=2), tmp_path / "b.mkv"
    run(source, target, network, 30.0, wishes=Wishes(0.05))
    for one, other in zip(decoded(source), decoded(target), strict=True):
        expected = fastden.denoise((luma(one) / 255).astype(np.float32), 30, model=network, strength=0.05) * 255
        expected = np.clip(expected, 0, 255)
        assert np.abs(luma(other) - expected).max() <= 1
        assert np.abs(luma(other) - luma(one)).max() > 3


def test_sigma_is_estimated_once(tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=8)
    estimates = [NoiseEstimate((sigma,) * 8, sigma, 0.5) for sigma in (1.0, 9.0, 5.0, 30.0, 2.0)]
    asked = iter(estimates)
    monkeypatch.setattr("fastden.inference.estimate.estimate_of", lambda *_: next(asked))
    sigma = run(source, tmp_path / "b.mp4", network, "auto").sigma
    used = estimates[: len(estimates) - len(list(asked))]
    assert len(used) >= 3
    assert sigma == np.median([estimate.sigma for estimate in used])
    monkeypatch.undo()
    short = make_clip(tmp_path / "c.mp4", frames=2)
    result = run(short, tmp_path / "d.mp4", network, "auto")
    assert result.frames == 2
    assert result.sigma == pytest.approx(0.03 * 255, rel=0.5)
    blind = fuse(random_network(noise_level_input=False))
    assert run(short, tmp_path / "e.mp4", blind, "auto").sigma is None


def clip_with_black(path: Path, black: int, frames: int) -> None:
    """Gray frames with noise of 20, behind black ones."""
    random = np.random.default_rng(0)
    ramp = np.linspace(40, 200, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "gray"
        for index in range(frames):
            noisy = np.clip(ramp + random.normal(0, 20, ramp.shape), 0, 255)
            values = np.zeros_like(noisy) if index < black else noisy
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(values.astype(np.uint8), format="gray")))
        writer.mux(stream.encode(None))


@pytest.mark.parametrize(("black", "all_frames"), [(0, 6), (6, 12), (12, 18)])
def test_black_frames_at_the_beginning_do_not_count(tmp_path: Path, black: int, all_frames: int) -> None:
    """As titles and fades have them: judged alone they would leave the whole video as it is."""
    source = tmp_path / "a.mkv"
    clip_with_black(source, black, all_frames)
    network = load_network("color", "cpu", "float32")
    assert 12 < float(run(source, tmp_path / "b.mkv", network, "auto").sigma or 0) < 28


def test_where_it_cannot_be_sought_in_black_frames_do_not_count_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.mkv"
    clip_with_black(source, black=2 * ESTIMATED, frames=4 * ESTIMATED)
    monkeypatch.setattr("fastden.video.copy._Copy._spread", lambda *_: iter(()))
    result = run(source, tmp_path / "b.mkv", load_network("color", "cpu", "float32"), "auto")
    assert result.frames == 4 * ESTIMATED
    assert 12 < float(result.sigma or 0) < 28
    assert any("nothing to judge the noise by" in note for note in result.notes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_read_once(tmp_path: Path, network: FusedDenoiser) -> None:
    source, pipe = make_clip(tmp_path / "a.mkv", frames=4, sound=False), tmp_path / "pipe.mkv"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=lambda: pipe.write_bytes(source.read_bytes()), daemon=True)
    feeder.start()
    assert run(pipe, tmp_path / "b.mkv", network, "auto").frames == 4
    feeder.join(10)
    assert not feeder.is_alive()


def test_a_name_with_a_colon_is_a_file(tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "plain.mp4", frames=2).rename("file:plain.mp4")
    make_clip(tmp_path / "plain.mp4", frames=3)  # which FFmpeg would open in its place
    assert run(Path("file:plain.mp4"), Path("b.mp4"), network).frames == 2


def test_vp8_keeps_its_quality(tmp_path: Path, network: FusedDenoiser) -> None:
    """Its encoder's own rate, 256 kbit/s, would lose 10 dB."""
    source = make_clip(tmp_path / "a.webm", "libvpx", sound=False, crf="4", b="20000000")
    run(source, tmp_path / "b.webm", network, 20.0, wishes=Wishes(0.0))
    error = [luma(one) - luma(other) for one, other in zip(decoded(source), decoded(tmp_path / "b.webm"), strict=True)]
    assert 10 * np.log10(255**2 / np.mean(np.square(error))) > 38


@pytest.mark.parametrize(("codec", "factor"), [("libx264", 52), ("libvpx", 3)])
def test_a_factor_that_the_encoder_refuses(tmp_path: Path, network: FusedDenoiser, codec: str, factor: int) -> None:
    suffix = ".webm" if codec == "libvpx" else ".mkv"
    source, target = make_clip(tmp_path / f"a{suffix}", codec, frames=2, sound=False), tmp_path / f"b{suffix}"
    with pytest.raises(UserError, match=rf"crf: {factor}; accepted by the encoder {codec}: "):
        run(source, target, network, crf=factor)
    assert not target.exists()
    encoders = Encoders.__new__(Encoders)
    encoders.crf = 55
    with pytest.raises(UserError, match="accepted by the encoder libx265: 0 to 51"):
        encoders.options("libx265")


def test_a_factor_for_another_encoder_passes_over_those_that_refuse_it(
    tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H.264 would come first in place of a codec that has no encoder, and takes no factor above 51."""
    source = make_clip(tmp_path / "a.mkv", "mpeg4", frames=2, sound=False)
    original = av.Codec
    monkeypatch.setattr(
        av, "Codec", lambda name, mode: original("none" if name.startswith("mpeg4") else name, mode), raising=True
    )
    result = run(source, tmp_path / "b.mkv", network, crf=55)
    monkeypatch.undo()
    assert not any("h264" in note for note in result.notes)
    with av.open(str(tmp_path / "b.mkv")) as written:
        assert written.streams.video[0].codec_context.name not in ("h264", "hevc")


def test_other_codecs(tmp_path: Path, network: FusedDenoiser) -> None:
    """A codec that cannot be written is replaced, with a note; the container must take it."""
    source = make_clip(tmp_path / "a.webm", "libvpx-vp9", frames=3)
    assert run(source, tmp_path / "b.webm", network).notes == []
    with av.open(str(tmp_path / "b.webm")) as reader:
        assert reader.streams.video[0].codec_context.codec.canonical_name == "vp9"
    source = make_clip(tmp_path / "a.mkv", "ffv1", "yuv420p10le", frames=3, sound=False)
    result = run(source, tmp_path / "c.webm", network)
    assert result.notes == ["ffv1 cannot be encoded into .webm; the video is encoded as av1"]
    assert decoded(tmp_path / "c.webm")[0].format.name == "yuv420p10le"
    source = make_clip(tmp_path / "d.mkv", "ffv1", "gbrp12le", frames=1, sound=False)
    result = run(source, tmp_path / "d.webm", network)
    assert result.notes == ["ffv1 in gbrp12le cannot be encoded into .webm; the video is av1, yuv420p10le"]
    with pytest.raises(UserError, match=r"stream 1 \(audio, aac\) cannot be copied into \.webm; accepted: \.mp4, or"):
        run(make_clip(tmp_path / "c.mp4", frames=1), tmp_path / "e.webm", network)
    with pytest.raises(UserError, match=r"crf: 20, but the encoder ffv1 has none"):
        run(tmp_path / "a.mkv", tmp_path / "e.mkv", network, crf=20)


def test_damaged_files(tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_clip(tmp_path / "a.mkv", frames=10, sound=False)
    data = bytearray(source.read_bytes())
    (tmp_path / "truncated.mkv").write_bytes(data[: len(data) * 6 // 10])
    result = run(tmp_path / "truncated.mkv", tmp_path / "b.mkv", network)
    assert 2 < result.frames < 10
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    (tmp_path / "zeros.mkv").write_bytes(data)
    result = run(tmp_path / "zeros.mkv", tmp_path / "c.mkv", network)
    assert result.damaged > 0
    assert any("damaged packets or frames in the input" in note for note in result.notes)
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(UserError, match=r"text\.mp4: cannot be read as a video: Invalid data"):
        run(tmp_path / "text.mp4", tmp_path / "d.mp4", network)
    make_sound_only(tmp_path / "sound.mp4")
    with pytest.raises(UserError, match=r"sound\.mp4: no video stream"):
        run(tmp_path / "sound.mp4", tmp_path / "d.mp4", network)
    assert not any(path.name.startswith((".fastden", "d.")) for path in tmp_path.iterdir())


def make_sound_only(path: Path) -> None:
    with av.open(str(path), "w") as writer:
        audio = writer.add_stream("aac", rate=48000, layout="mono")
        sample = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sample.sample_rate = 48000
        writer.mux(audio.encode(sample))
        writer.mux(audio.encode(None))


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=3)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b.mp4", network, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_the_process_gets_its_settings_back(
    tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg's level of logging and the environment, after an error too, and where two threads overlap."""
    source = make_clip(tmp_path / "a.mp4", frames=2)
    begun, may_end = threading.Barrier(2), threading.Event()
    seen: list[tuple[int | None, str | None]] = []

    def state(*_: int) -> tuple[int | None, str | None]:
        seen.append((av.logging.get_level(), os.environ.get("SVT_LOG")))
        return seen[-1]

    def first(done: int, total: int) -> None:
        if done == 1:
            begun.wait(60)

    def second(done: int, total: int) -> None:
        if done == 1:
            begun.wait(60)
            assert may_end.wait(60)
            assert state() == (av.logging.FATAL, "1")
            raise KeyboardInterrupt

    monkeypatch.delenv("SVT_LOG", raising=False)
    level = av.logging.get_level()
    try:
        av.logging.set_level(av.logging.ERROR)
        with ThreadPoolExecutor(2) as pool:
            videos = [
                pool.submit(run, source, tmp_path / f"{progress.__name__}.mp4", network, progress=progress)
                for progress in (first, second)
            ]
            assert videos[0].result().frames == 2
            may_end.set()
            with pytest.raises(KeyboardInterrupt):
                videos[1].result()
        assert state() == (av.logging.ERROR, None)
        monkeypatch.setenv("SVT_LOG", "3")
        run(source, tmp_path / "b.mp4", network, progress=state)
        assert seen[-1] == (av.logging.FATAL, "3")
        assert state() == (av.logging.ERROR, "3")
    finally:
        av.logging.set_level(level)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, network: FusedDenoiser) -> None:
    source, target = make_clip(tmp_path / "a.mp4", frames=1), tmp_path / "b.mp4"
    with pytest.raises(UserError, match=r"b\.mp4: exists already"):
        run(source, target, network, progress=lambda done, total: target.write_bytes(b"mine"))
    assert target.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_targets(tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=1)
    before = source.read_bytes()
    with pytest.raises(UserError, match=r"a\.mp4: exists already"):
        run(source, source, network)
    with pytest.raises(UserError, match=r"is the input; accepted: another file"):
        run(source, source, network, overwrite=True)
    with pytest.raises(UserError, match=r"b\.png; accepted suffixes for a video: \.mp4"):
        run(source, tmp_path / "b.png", network)
    assert source.read_bytes() == before
    (tmp_path / "b.mp4").write_bytes(b"old")
    run(source, tmp_path / "b.mp4", network, overwrite=True)
    assert len(decoded(tmp_path / "b.mp4")) == 1


def test_memory_does_not_grow_with_the_length(tmp_path: Path, network: FusedDenoiser) -> None:
    """No more frames are alive at once in a long video than in a short one."""
    alive: list[int] = []
    frames: list[Any] = []
    original = FrameConverter.pixels

    def watched(self: Any, *arguments: Any) -> Any:
        array = original(self, *arguments)
        frames.append(weakref.ref(array))
        gc.collect(0)
        alive.append(sum(reference() is not None for reference in frames))
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameConverter, "pixels", watched)
        run(make_clip(tmp_path / "a.mp4", frames=20, sound=False), tmp_path / "b.mp4", network, "auto")
    assert len(alive) == 20 + ESTIMATED
    assert max(alive) <= ESTIMATED + 1
    assert max(alive[10 + ESTIMATED :]) <= 2


@pytest.fixture
def model(tmp_path: Path) -> str:
    random_network().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_command(tmp_path: Path, model: str) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=3)

    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["denoise", *map(str, arguments), "--model", model])

    done = call(source, "-o", tmp_path / "b.mp4", "--crf", 30)
    assert done.exit_code == 0, done.output
    assert f"{source} -> {tmp_path / 'b.mp4'}, 3 frames of 64 x 48, sigma " in done.stdout
    assert " (estimated)" in done.stdout
    assert call(source, "-o", tmp_path / "folder").exit_code == 0
    assert (tmp_path / "folder" / "a.mp4").stat().st_size > (tmp_path / "b.mp4").stat().st_size
    for arguments, message in {
        (source, tmp_path / "b.mp4", "-o", tmp_path / "c"): "with 1 more; accepted: a video alone, or images",
        (source, "-o", tmp_path / "c.mp4", "--format", "png"): "format: given with a video; accepted: with images",
        (source, "-o", tmp_path / "c.mp4", "--manifest", "m"): "manifest: given with a video; accepted: with images",
        (source, "-o", tmp_path / "c.mp4", "--max-megapixels", 0.003): "frames of 64 x 48 pixels; accepted: at most",
        (tmp_path / "a.png", "-o", tmp_path / "c.png", "--crf", 20): "crf: 20, but the input is no video",
        (tmp_path / "missing.mp4", "-o", tmp_path / "new" / "c.mp4"): "missing.mp4: cannot be read as a video: No such",
    }.items():
        failed = call(*arguments)
        assert failed.exit_code == 1
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_an_interrupted_command_says_so(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastden.cli.video.denoise_video", interrupt)
    arguments = ["denoise", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "new" / "b.mp4"), "--model", model]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (130, "error: interrupted; nothing was written\n")
    assert not (tmp_path / "new").exists()


def test_a_command_out_of_memory_says_so(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("fastden.cli.video.denoise_video", full)
    arguments = ["denoise", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "x" / "y" / "b.mp4"), "--model", model]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (1, "error: out of memory; a smaller --max-memory or --tile needs less\n")
    assert not (tmp_path / "x").exists()


def test_without_pyav(tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"install: pip install 'fastden\[video\]'"):
        run(source, tmp_path / "b.mp4", network)
