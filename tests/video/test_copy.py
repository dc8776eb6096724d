"""Videos: frames are denoised; times, sound, depth, tags and everything else stay."""

from __future__ import annotations

import os
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastden
from fastden.errors import UserError
from fastden.inference.estimate import NoiseEstimate
from fastden.inference.run import Wishes
from fastden.network.fused import FusedDenoiser, fuse
from fastden.network.loading import load_network
from fastden.video.copy import ESTIMATED, denoise_video
from fastden.video.encoders import Encoders
from fastden.video.frames import FrameConverter
from tests.helpers import random_network
from tests.video.clips import FRAMES, HEIGHT, TIMES, WIDTH, decoded, luma, make_clip, run, streams

av = pytest.importorskip("av")


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


def test_without_pyav(tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_clip(tmp_path / "a.mp4", frames=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"install: pip install 'fastden\[video\]'"):
        run(source, tmp_path / "b.mp4", network)
