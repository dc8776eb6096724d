"""Streams that a container keeps in its own way, or not at all: timecodes, covers, sound."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fastden.errors import UserError
from fastden.network.fused import FusedDenoiser
from fastden.video import copy
from tests.video.clips import HEIGHT, WIDTH, cut, decoded, frame, make_clip, make_video, run, streams

av = pytest.importorskip("av")


@pytest.mark.parametrize("suffix", [".mov", ".mp4"])
def test_a_timecode_stays(suffix: str, tmp_path: Path, network: FusedDenoiser) -> None:
    """The writer makes its track; a copy beside it made MOV's writer fail after all frames."""
    source = make_video(tmp_path / f"a{suffix}", tags={"timecode": "10:00:00:00"})
    target = tmp_path / f"b{suffix}"
    assert run(source, target, network).notes == []
    for path in (source, target):
        with av.open(str(path)) as reader:
            assert [stream.type for stream in reader.streams] == ["video", "data"]
            assert [stream.metadata["timecode"] for stream in reader.streams] == ["10:00:00:00"] * 2


@pytest.mark.parametrize("suffix", [".mkv", ".m4v"])
def test_a_timecode_that_is_lost_is_named(suffix: str, tmp_path: Path, network: FusedDenoiser) -> None:
    """It was "data, unknown"."""
    source = make_video(tmp_path / "a.mov", tags={"timecode": "10:00:00:00"})
    result = run(source, tmp_path / f"b{suffix}", network)
    assert result.notes == [f"stream 1 (data, timecode) cannot be copied into {suffix}, and is missing"]


@pytest.mark.parametrize("sound", ["ac3", "aac", "flac"])
def test_sound_that_loses_its_times_in_avi_is_refused(sound: str, tmp_path: Path, network: FusedDenoiser) -> None:
    source = make_video(tmp_path / "a.avi", "mpeg4", sound=sound)
    calls: list[int] = []
    with pytest.raises(
        UserError, match=rf"b\.avi: stream 1 \(audio, {sound}\) would lose its times in \.avi; accepted"
    ):
        run(source, tmp_path / "b.avi", network, progress=lambda *call: calls.append(1))
    assert calls == []
    run(source, tmp_path / "b.mkv", network)
    assert streams(tmp_path / "b.mkv", "audio")[-1][0] == pytest.approx(streams(source, "audio")[-1][0], abs=0.03)


@pytest.mark.parametrize("sound", ["pcm_s16le", "adpcm_ms", "mp2", "libmp3lame", "wmav2"])
def test_sound_that_keeps_its_times_in_avi(sound: str, tmp_path: Path, network: FusedDenoiser) -> None:
    source, target = make_video(tmp_path / "a.avi", "mpeg4", frames=20, sound=sound), tmp_path / "b.avi"
    run(source, target, network)
    before, after = streams(source, "audio"), streams(target, "audio")
    assert [data for _, data in before] == [data for _, data in after]
    assert len(before) > 5
    assert [float(time) for time, _ in after] == pytest.approx([float(time) for time, _ in before], abs=1e-3)


def shown(path: Path) -> float:
    """The seconds of sound from the first packet to the first frame."""
    with av.open(str(path)) as reader:
        packets = [packet for packet in reader.demux(reader.streams.audio[0]) if packet.size]
    return float(decoded(path)[0].time) - float(packets[0].pts * packets[0].time_base)


def test_sound_that_an_edit_list_hides_stays_hidden(tmp_path: Path, network: FusedDenoiser) -> None:
    source, target = cut(make_clip(tmp_path / "a.mp4", frames=40), tmp_path / "cut.mp4"), tmp_path / "b.mkv"
    with av.open(str(source)) as reader:
        packets = [packet for packet in reader.demux(reader.streams.audio[0]) if packet.size]
    hidden = sum(packet.is_discard for packet in packets)
    assert hidden > 5
    run(source, target, network)
    # The last hidden one stays: decoders begin with it.
    expected = [bytes(packet) for packet in packets][hidden - 1 :]
    assert [data for _, data in streams(target, "audio")] == expected
    assert shown(target) < 0.06


def cover(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "cover.jpg"), ("PNG", "cover.png")])
def test_a_cover_stays_a_cover(kind: str, name: str, tmp_path: Path, network: FusedDenoiser) -> None:
    """In Matroska it is an attachment; a copied stream is a second video."""
    source, picture = make_video(tmp_path / "base.mkv", sound="aac"), cover(kind)
    with_cover = tmp_path / "a.mkv"
    with av.open(str(source)) as reader, av.open(str(with_cover), "w") as writer:
        outputs = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        writer.add_attachment(name, f"image/{kind.lower()}", picture)
        for packet in reader.demux():
            if packet.size:
                packet.stream = outputs[packet.stream.index]
                writer.mux(packet)
    for before, after in ((with_cover, tmp_path / "b.mp4"), (tmp_path / "b.mp4", tmp_path / "c.mkv")):
        assert run(before, after, network).notes == []
        with av.open(str(after)) as reader:
            (still,) = (s for s in reader.streams.video if s.disposition & av.stream.Disposition.attached_pic)
            assert bytes(next(packet for packet in reader.demux(still))) == picture
            assert len(reader.streams) == 3
    with av.open(str(tmp_path / "c.mkv")) as reader:
        assert reader.streams.video[1].metadata["filename"] == name
    # MOV's writer took it, and wrote nothing of it.
    codec = {"JPEG": "mjpeg", "PNG": "png"}[kind]
    for source in (with_cover, tmp_path / "b.mp4"):
        result = run(source, tmp_path / "d.mov", network, overwrite=True)
        assert result.notes == [f"stream 2 (cover picture, {codec}) cannot be attached, and is missing"]
    with av.open(str(tmp_path / "d.mov")) as reader:
        assert [stream.type for stream in reader.streams] == ["video", "audio"]


@pytest.mark.parametrize(("name", "kind"), [("f__t.ttf", "x-font"), ("c__r.jpg", "image/jpeg")])
def test_names_of_attachments_in_another_encoding(name: str, kind: str, tmp_path: Path, network: FusedDenoiser) -> None:
    """Latin-1, which is read as surrogates: neither a font nor a cover may be lost by its name."""
    with av.open(str(tmp_path / "a.mkv"), "w") as writer:
        stream = writer.add_stream("libx264", 25)
        stream.width, stream.height = WIDTH, HEIGHT
        writer.add_attachment(name, kind, cover("JPEG"))
        writer.mux(stream.encode(frame(0, "yuv420p")))
        writer.mux(stream.encode(None))
    latin = name.replace("__", "öö").encode("latin-1")
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "b.mkv").write_bytes(data.replace(name.encode(), latin))
    assert run(tmp_path / "b.mkv", tmp_path / "c.mkv", network).notes == []
    assert latin in (tmp_path / "c.mkv").read_bytes()


def test_a_cover_that_matroska_does_not_attach_is_said(tmp_path: Path, network: FusedDenoiser) -> None:
    notes: list[str] = []
    made = copy._Copy.__new__(copy._Copy)
    made.note = notes.append  # type: ignore[method-assign]
    made.input = SimpleNamespace(covers={2: b"BM"})  # type: ignore[assignment]
    assert made._add_cover(SimpleNamespace(index=2, metadata={}), "bmp") is None
    assert notes == ["stream 2 (cover picture, bmp) cannot be attached, and is missing"]
