"""Parts of a video file beside its frames: subtitles, chapters, attachments, rotation, and the times of frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastden
from fastden.errors import UserError
from fastden.video import copy
from tests.batch.conftest import Blend
from tests.video.clips import HEIGHT, TIMES, WIDTH, decoded, frame, make_clip, run, streams

av = pytest.importorskip("av")

CHAPTERS = [
    {"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}},
    {"id": 2, "start": 200, "end": 470, "time_base": Fraction(1, 1000), "metadata": {"title": "Two, é"}},
]
SUBTITLES = "1\n00:00:00,040 --> 00:00:00,200\nHello\n\n2\n00:00:00,300 --> 00:00:00,420\nWorld, é\n\n"
#: FFmpeg's encoder of MP4's subtitles needs this header.
STYLE = "[Script Info]\r\nScriptType: v4.00+\r\n\r\n[V4+ Styles]\r\nFormat: Name\r\nStyle: Default\r\n\r\n[Events]\r\n"


@pytest.fixture(scope="module")
def network() -> fastden.FusedDenoiser:
    return Blend(fastden.Denoiser().eval()).float().eval()


def with_all(path: Path) -> Path:
    """A clip with sound, subtitles and chapters; into Matroska an attachment too."""
    base, text = make_clip(path.with_stem("base")), path.with_suffix(".srt")
    text.write_text(SUBTITLES, encoding="utf-8")
    with av.open(str(base)) as clip, av.open(str(text)) as titles, av.open(str(path), "w") as writer:
        outputs = {stream.index: writer.add_stream_from_template(stream) for stream in clip.streams}
        mp4 = path.suffix != ".mkv"
        if mp4:
            subtitles = writer.add_stream("mov_text")
            subtitles.codec_context.subtitle_header = STYLE.encode()
            subtitles.codec_context.time_base = Fraction(1, 1000)
        else:
            subtitles = writer.add_stream_from_template(titles.streams[0])
            writer.add_attachment("font.ttf", "application/x-truetype-font", b"a font" * 20)
        subtitles.metadata["language"] = "fra"
        writer.set_chapters(CHAPTERS)
        for packet in clip.demux():
            if packet.size:
                packet.stream = outputs[packet.stream.index]
                writer.mux(packet)
        for packet in titles.demux():
            if packet.size:
                data = bytes(packet)
                cue = av.Packet(len(data).to_bytes(2, "big") + data if mp4 else data)
                cue.pts, cue.dts, cue.duration = packet.pts, packet.dts, packet.duration
                cue.time_base, cue.stream = packet.time_base, subtitles
                writer.mux(cue)
    return path


def chapters(path: Path) -> list[tuple[Fraction, Fraction, str]]:
    with av.open(str(path)) as reader:
        found = reader.chapters()
    unit = [chapter["time_base"] for chapter in found]
    return [(c["start"] * u, c["end"] * u, c["metadata"]["title"]) for c, u in zip(found, unit, strict=True)]


def kinds(path: Path) -> list[tuple[str, str | None]]:
    with av.open(str(path)) as reader:
        return [(stream.type, stream.metadata.get("language")) for stream in reader.streams]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_subtitles_chapters_and_attachments_stay(suffix: str, tmp_path: Path, network: Any) -> None:
    """MP4 keeps chapters as a stream of titles, which must not be copied."""
    source, target = with_all(tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}"
    assert run(source, target, network).notes == []
    assert chapters(target) == chapters(source)
    assert [title for _, _, title in chapters(target)] == ["One", "Two, é"]
    assert [(start, end) for start, end, _ in chapters(target)] == [
        (0, Fraction(1, 5)),
        (Fraction(1, 5), Fraction(47, 100)),
    ]
    assert streams(target, "subtitle") == streams(source, "subtitle")
    shown = [(time, data) for time, data in streams(target, "subtitle") if data != b"\0\0"]
    assert [time for time, _ in shown] == [Fraction(1, 25), Fraction(3, 10)]
    assert "World, é".encode() in shown[1][1]
    assert streams(target, "audio") == streams(source, "audio")
    assert kinds(target) == kinds(source)
    assert ("subtitle", "fra") in kinds(target)
    if suffix == ".mkv":
        with av.open(str(target)) as reader:
            (font,) = (stream for stream in reader.streams if stream.type == "attachment")
            assert (font.metadata["filename"], bytes(font.data)) == ("font.ttf", b"a font" * 20)
    again = tmp_path / f"c{suffix}"
    run(target, again, network)
    assert streams(again, "subtitle") == streams(source, "subtitle")


def test_what_another_container_does_not_take_is_said(tmp_path: Path, network: Any) -> None:
    matroska, mp4 = with_all(tmp_path / "a.mkv"), with_all(tmp_path / "a.mp4")
    result = run(matroska, tmp_path / "b.mp4", network)
    assert result.notes == [
        "stream 2 (subtitle, srt) cannot be copied into .mp4, and is missing",
        "stream 3 (attachment, unknown) cannot be copied into .mp4, and is missing",
    ]
    assert [title for _, _, title in chapters(tmp_path / "b.mp4")] == ["One", "Two, é"]
    result = run(mp4, tmp_path / "b.mkv", network)
    assert result.notes == ["stream 2 (subtitle, mov_text) cannot be copied into .mkv, and is missing"]
    assert [title for _, _, title in chapters(tmp_path / "b.mkv")] == ["One", "Two, é"]
    assert [kind for kind, _ in kinds(tmp_path / "b.mkv")] == ["video", "audio"]


def make(path: Path, times: list[int], codec: str = "libx264", unit: int = 1000, **settings: Any) -> Path:
    """A clip whose frames come at ``times``, in units of 1 / ``unit`` s."""
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream(codec, options=settings.get("options", {}))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        context.time_base, context.framerate = Fraction(1, unit), Fraction(25)
        if path.suffix == ".avi":
            context.max_b_frames = 0
        stream.metadata.update(settings.get("tags", {}))
        if "matrix" in settings:
            stream.set_display_matrix(settings["matrix"])
        for index, time in enumerate(times):
            picture = frame(index, "yuv420p")
            picture.pts, picture.time_base = time, Fraction(1, unit)
            writer.mux(stream.encode(picture))
        writer.mux(stream.encode(None))
    return path


def matrix_of(path: Path) -> list[int]:
    found = decoded(path)[0].side_data
    # Indexed by number: in PyAV 19 an iteration gives kinds.
    (data,) = (data for data in map(found.__getitem__, range(len(found))) if data.type.name == "DISPLAYMATRIX")
    return np.frombuffer(bytes(data), np.int32).tolist()


ONE = 1 << 16
#: The upper left four numbers of display matrices.
TURNS = {
    "90": (0, ONE, -ONE, 0),
    "180": (-ONE, 0, 0, -ONE),
    "270": (0, -ONE, ONE, 0),
    "mirrored": (-ONE, 0, 0, ONE),
    "upside down": (ONE, 0, 0, -ONE),
    "transposed": (0, ONE, ONE, 0),
}


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize("turn", TURNS)
def test_turned_and_mirrored_videos_stay_so(suffix: str, turn: str, tmp_path: Path, network: Any) -> None:
    """The matrix is kept; the frames are not turned."""
    a, b, c, d = TURNS[turn]
    source, target = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    make(source, [0, 40], matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    assert run(source, target, network).notes == []
    assert matrix_of(target) == matrix_of(source)
    assert matrix_of(target)[:2] + matrix_of(target)[3:5] == [a, b, c, d]
    assert (decoded(target)[0].width, decoded(target)[0].height) == (WIDTH, HEIGHT)


def times_of(path: Path) -> list[int]:
    return [round(1000 * picture.time) for picture in decoded(path)]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".mov", "libx264"), (".webm", "libvpx-vp9")]
)
@pytest.mark.parametrize("start", [0, 500])
def test_varying_times_stay(suffix: str, codec: str, start: int, tmp_path: Path, network: Any) -> None:
    """Times vary from the beginning or later, with frames that are stored out of order."""
    times = [start + time for time in TIMES]
    options = {"bf": "3"} if codec == "libx264" else {}
    source, target = make(tmp_path / f"a{suffix}", times, codec, options=options), tmp_path / f"b{suffix}"
    run(source, target, network)
    assert times_of(source) == times_of(target) == times


def test_times_that_look_like_a_high_rate(tmp_path: Path, network: Any) -> None:
    """Without its rate, a copied short clip seems to have a thousand frames a second, which SVT-AV1 refuses."""
    source = with_all(tmp_path / "a.mkv")
    with av.open(str(source)) as reader:
        assert reader.streams.video[0].average_rate > 240
    silent = tmp_path / "silent.mkv"
    with av.open(str(source)) as reader, av.open(str(silent), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    result = run(silent, tmp_path / "b.webm", network)
    assert result.notes == ["h264 cannot be encoded into .webm; the video is encoded as av1"]
    assert times_of(tmp_path / "b.webm") == TIMES


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi(codec: str, tmp_path: Path, network: Any) -> None:
    """AVI has no times of frames: delays of frames that a decoder holds back must not add up."""
    source = make(tmp_path / "a.avi", list(range(6)), codec, unit=25)
    run(source, tmp_path / "b.avi", network)
    run(tmp_path / "b.avi", tmp_path / "c.avi", network)
    assert times_of(tmp_path / "c.avi") == times_of(tmp_path / "b.avi") == times_of(source)
    run(source, tmp_path / "b.mkv", network)
    assert times_of(tmp_path / "b.mkv") == [0, 40, 80, 120, 160, 200]
    with pytest.raises(UserError, match=r"d\.avi: AVI has no times of frames; accepted for \.mkv: \.mkv, \.mp4"):
        run(tmp_path / "b.mkv", tmp_path / "d.avi", network)
    assert not (tmp_path / "d.avi").exists()


def tags_of(path: Path) -> dict[str, str]:
    with av.open(str(path)) as reader:
        return {key.upper(): value for key, value in reader.streams.video[0].metadata.items()}


def test_alpha_that_is_not_decoded_is_said(tmp_path: Path, network: Any) -> None:
    source = make(tmp_path / "a.webm", [0, 40], "libvpx-vp9", tags={"alpha_mode": "1", "title": "Clip"})
    assert tags_of(source)["ALPHA_MODE"] == "1"
    result = run(source, tmp_path / "b.webm", network)
    assert result.notes == ["transparency (alpha) of this video is not decoded, and is missing"]
    assert tags_of(tmp_path / "b.webm").keys() == {"TITLE", "DURATION"}


def test_statistics_of_the_old_encoding_are_not_copied(tmp_path: Path, network: Any) -> None:
    statistics = ("BPS", "BPS-eng", "NUMBER_OF_BYTES", "NUMBER_OF_FRAMES-pt-BR", "_STATISTICS_TAGS-eng", "DURATION-eng")
    source, target = tmp_path / "a.mkv", tmp_path / "b.mkv"
    make(source, [0, 40], tags={**dict.fromkeys(statistics, "1"), "title": "Clip", "BPS_KEY": "mine"})
    assert {name.upper() for name in statistics} < tags_of(source).keys()
    run(source, target, network)
    assert tags_of(target).keys() == {"TITLE", "BPS_KEY", "DURATION"}
    # Sound is copied as it is: its numbers still hold.
    both = tmp_path / "both.mkv"
    with av.open(str(with_all(tmp_path / "all.mkv"))) as reader, av.open(str(both), "w") as writer:
        outputs = {stream.index: writer.add_stream_from_template(stream) for stream in tuple(reader.streams)[:2]}
        outputs[1].metadata["BPS"] = "99"
        for packet in reader.demux(*tuple(reader.streams)[:2]):
            if packet.size:
                packet.stream = outputs[packet.stream.index]
                writer.mux(packet)
    run(both, tmp_path / "c.mkv", network)
    with av.open(str(tmp_path / "c.mkv")) as reader:
        assert reader.streams.audio[0].metadata["BPS"] == "99"


class SideData(bytes):
    """A stand-in for side data of a frame, whose kind is ``type.name``."""

    type: Any


def side_data(name: str, first: int = 0) -> SideData:
    made = SideData(first.to_bytes(4, "little"))
    made.type = SimpleNamespace(name=name)
    return made


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (
            side_data("SPHERICAL"),
            ["the projection of a spherical (360 degree) video cannot be written, and is missing"],
        ),
        (side_data("ICC_PROFILE"), ["the ICC profile of the frames cannot be written, and is missing"]),
        (side_data("STEREO3D", 2), ["the arrangement of a stereoscopic (3D) video cannot be written, and is missing"]),
        (side_data("STEREO3D"), []),  # it says: not stereoscopic
    ],
)
def test_what_frames_lose_is_said(
    data: SideData, notes: list[str], tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "_side_data", lambda frame: [data])
    assert run(make(tmp_path / "a.mp4", [0, 40]), tmp_path / "b.mp4", network).notes == notes


def test_stereoscopy_is_kept_in_matroska_alone(tmp_path: Path, network: Any) -> None:
    source = make(tmp_path / "a.mkv", [0, 40], tags={"stereo_mode": "left_right"})
    assert run(source, tmp_path / "b.mkv", network).notes == []
    assert tags_of(tmp_path / "b.mkv")["STEREO_MODE"] == "left_right"
    (note,) = run(source, tmp_path / "b.mp4", network).notes
    assert note.startswith("the arrangement of a stereoscopic (3D) video")
