"""What becomes of pixel formats: transparency, palettes, raw colours, and the code of HEVC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastden.inference.run import Wishes
from fastden.network.fused import FusedDenoiser
from tests.video.clips import HEIGHT, WIDTH, decoded, make_video, run

av = pytest.importorskip("av")


def test_transparency_stays_where_an_encoder_takes_it(tmp_path: Path, network: FusedDenoiser) -> None:
    """ProRes 4444 is decoded with 12 bits and encoded with 10; the nearest format without alpha was taken."""
    source = tmp_path / "a.mov"
    with av.open(str(source), "w") as writer:
        stream = writer.add_stream("prores_ks", 25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuva444p10le"
        stream.codec_context.profile = "4444"
        values = np.full((HEIGHT, WIDTH, 4), 120, np.uint8)
        values[:, : WIDTH // 2, 3] = 30
        writer.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgba").reformat(format="yuva444p10le")))
        writer.mux(stream.encode(None))
    result = run(source, tmp_path / "b.mov", network)
    (note,) = result.notes
    assert note.endswith("the video is prores, yuva444p10le")
    alpha = decoded(tmp_path / "b.mov")[0].to_ndarray(format="rgba")[:, :, 3].astype(int)
    assert abs(alpha[:, : WIDTH // 2 - 8].mean() - 30) < 2
    assert alpha[:, WIDTH // 2 + 8 :].mean() > 110
    (note,) = run(source, tmp_path / "b.webm", network).notes
    assert note.endswith("the video is av1, yuv420p10le, without transparency (alpha)")
    rgba = make_video(tmp_path / "c.mov", "qtrle", "argb")
    (note,) = run(rgba, tmp_path / "c.mkv", network).notes
    assert note.endswith("the video is ffv1, bgra")  # H.264 comes before, and has no alpha


@pytest.mark.parametrize(
    ("codec", "pixel_format", "before", "suffix", "crf"),
    [
        ("qtrle", "argb", ".mov", ".mkv", 20),
        ("png", "rgba", ".mov", ".mkv", 20),
        ("rawvideo", "bgra", ".avi", ".mkv", 20),  # which FFV1 takes as it is
        ("qtrle", "argb", ".mov", ".mp4", 20),
        ("qtrle", "argb", ".mov", ".mp4", None),
        ("rawvideo", "argb", ".mov", ".mp4", None),
        ("rawvideo", "bgra", ".avi", ".mp4", None),
        ("utvideo", "gbrap", ".avi", ".mp4", None),
        ("magicyuv", "gbrap", ".avi", ".mp4", None),
    ],
)
def test_ffv1_is_left_out_with_a_rate_factor_and_in_mp4(
    codec: str, pixel_format: str, before: str, suffix: str, crf: int | None, tmp_path: Path, network: FusedDenoiser
) -> None:
    """FFV1 keeps it; it has no rate factor, with which the run ended in an error, and players take none in MP4."""
    source = make_video(tmp_path / f"a{before}", codec, pixel_format)
    (note,) = run(source, tmp_path / f"b{suffix}", network, crf=crf).notes
    text = f"{codec} in {pixel_format} cannot be encoded into {suffix}; the video is h264, yuv444p"
    assert note == f"{text}, without transparency (alpha)"


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_hevc_plays_on_apples_players(suffix: str, tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_video(tmp_path / "a.mkv", "libx265", **{"x265-params": "log-level=error"})
    run(source, tmp_path / f"b{suffix}", network)
    with av.open(str(tmp_path / f"b{suffix}")) as reader:
        assert reader.streams.video[0].codec_context.codec_tag == "hvc1"
    assert len(decoded(tmp_path / f"b{suffix}")) == 4


@pytest.mark.parametrize(("suffix", "made"), [(".avi", "bgr24"), (".mov", "bgr24"), (".mkv", "yuv444p")])
def test_palettes_become_colours(suffix: str, made: str, tmp_path: Path, network: FusedDenoiser) -> None:
    """FFmpeg's scaler cannot write them, and raw video's encoder names no other formats. Matroska takes no raw RGB."""
    source, target = tmp_path / "a.avi", tmp_path / f"b{suffix}"
    with av.open(str(source), "w") as writer:
        stream = writer.add_stream("rawvideo", 25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "pal8"
        palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1)
        indices = np.tile(np.linspace(20, 200, WIDTH).astype(np.uint8), (HEIGHT, 1))
        writer.mux(stream.encode(av.VideoFrame.from_ndarray((indices, palette), format="pal8")))
        writer.mux(stream.encode(None))
    assert decoded(source)[0].format.name == "pal8"
    result = run(source, target, network, wishes=Wishes(0.0))
    (note,) = result.notes
    assert note.startswith(f"rawvideo in pal8 cannot be encoded into {suffix}; the video is ")
    assert note.endswith(f", {made}")
    before, after = (decoded(path)[0].to_ndarray(format="rgb24").astype(int) for path in (source, target))
    assert np.abs(before - after).max() <= 8


def test_raw_colours_in_matroska(tmp_path: Path, network: FusedDenoiser) -> None:
    """Its writer refuses raw RGB at the first frame, and takes raw gray and YUV."""
    (note,) = run(make_video(tmp_path / "a.avi", "rawvideo", "bgr24"), tmp_path / "a.mkv", network).notes
    assert note == "rawvideo in bgr24 cannot be encoded into .mkv; the video is h264, yuv444p"
    assert run(make_video(tmp_path / "b.mkv", "rawvideo", "gray"), tmp_path / "c.mkv", network).notes == []
