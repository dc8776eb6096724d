"""Inputs that are cut off, damaged, of another time or another encoding, and what surrounds a run."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fastden.errors import UserError
from fastden.network.fused import FusedDenoiser
from fastden.video import copy
from fastden.video.demuxing import Input
from tests.video.clips import HEIGHT, WIDTH, copied, cut, decoded, frame, make_clip, make_video, run, streams

av = pytest.importorskip("av")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_video_that_is_cut_off_says_so(suffix: str, tmp_path: Path, network: FusedDenoiser) -> None:
    source = tmp_path / f"a{suffix}"
    make_video(source, "mjpeg", "yuvj420p", frames=50)
    if suffix == ".mp4":  # with its index in front
        copied(source, tmp_path / "front.mp4", movflags="faststart").replace(source)
    assert run(source, tmp_path / f"b{suffix}", network).notes == []
    data = source.read_bytes()
    part = tmp_path / f"part{suffix}"
    part.write_bytes(data[: len(data) * 6 // 10])
    result = run(part, tmp_path / f"c{suffix}", network)
    assert 10 < result.frames < 40
    assert any(note.startswith("the input ends early, at ") for note in result.notes)
    assert any(note.endswith("its header states 2.00 s") for note in result.notes)


def test_a_matroska_that_begins_later(tmp_path: Path, network: FusedDenoiser) -> None:
    """Its duration counts from 0; the time of its beginning was added once more."""
    source = make_video(tmp_path / "base.mkv", "mjpeg", "yuvj420p", frames=50)
    late = copied(source, tmp_path / "a.mkv", Fraction(-2))
    with av.open(str(late)) as reader:
        assert (reader.start_time, reader.duration) == (2_000_000, 4_000_000)
    assert run(late, tmp_path / "b.mkv", network).notes == []
    data = late.read_bytes()
    (tmp_path / "part.mkv").write_bytes(data[: len(data) * 6 // 10])
    (note,) = run(tmp_path / "part.mkv", tmp_path / "c.mkv", network).notes
    assert note.startswith("the input ends early, at 3.")
    assert note.endswith("its header states 4.00 s")


def test_a_matroska_whose_sound_came_first_is_cut_off(tmp_path: Path, network: FusedDenoiser) -> None:
    """The sound was complete, and so nothing was missing from its end."""
    base = make_video(tmp_path / "base.mkv", "mjpeg", "yuvj420p", frames=50, sound="aac")
    source = tmp_path / "a.mkv"
    with av.open(str(base)) as reader, av.open(str(source), "w", options={"max_interleave_delta": "1"}) as writer:
        outputs = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        for packet in sorted((one for one in reader.demux() if one.size), key=lambda one: one.stream.type):
            packet.stream = outputs[packet.stream.index]
            writer.mux_one(packet) if hasattr(writer, "mux_one") else writer.mux(packet)
    assert run(source, tmp_path / "b.mkv", network).notes == []
    data = source.read_bytes()
    (tmp_path / "part.mkv").write_bytes(data[: len(data) * 7 // 10])
    notes = run(tmp_path / "part.mkv", tmp_path / "c.mkv", network).notes
    assert any(note.startswith("the input ends early, at 0.") and note.endswith("states 2.00 s") for note in notes), (
        notes
    )


def test_sound_before_the_first_frame_has_a_limit(
    tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_video(tmp_path / "a.mkv", frames=4, sound="aac")
    monkeypatch.setattr(Input, "_frames", lambda self, packet: [])
    monkeypatch.setattr("fastden.video.demuxing.MOST_BEFORE", 500)
    with pytest.raises(
        UserError, match=r"a\.mkv: .* of other streams before the first frame; accepted: at most 500 bytes"
    ):
        run(source, tmp_path / "b.mkv", network)


def test_a_duration_that_is_a_guess_is_no_statement(tmp_path: Path, network: FusedDenoiser) -> None:
    """Of a live recording, from its size and the bit rate of its sound: 2.63 s for 2.40 s."""
    source = make_video(tmp_path / "base.mkv", "mpeg4", frames=60, sound="ac3")
    live = copied(source, tmp_path / "a.mkv", live="1")
    with av.open(str(live)) as reader:
        assert reader.duration > 2_600_000
    assert run(live, tmp_path / "b.mkv", network).notes == []


def test_a_video_in_fragments(tmp_path: Path, network: FusedDenoiser) -> None:
    """Of DASH the duration counts from 0; the time of the first frame, 0.08 s, was added."""
    source = make_video(tmp_path / "base.mp4", frames=60, sound="aac")
    dash = copied(source, tmp_path / "a.mp4", movflags="dash")
    with av.open(str(dash)) as reader:
        video = reader.streams.video[0]
        assert (video.frames, video.start_time * video.time_base) == (0, Fraction(2, 25))
    assert run(dash, tmp_path / "b.mp4", network).notes == []
    data = dash.read_bytes()
    (tmp_path / "part.mp4").write_bytes(data[: len(data) // 2])
    (note,) = run(tmp_path / "part.mp4", tmp_path / "c.mp4", network).notes
    assert note.endswith("its header states 2.48 s")


def test_an_edit_list_is_no_end_that_is_missing(tmp_path: Path, network: FusedDenoiser) -> None:
    source = cut(make_clip(tmp_path / "a.mp4", frames=40), tmp_path / "cut.mp4")
    for suffix in (".mp4", ".mkv"):
        assert run(source, tmp_path / f"b{suffix}", network).notes == []


def test_frames_of_an_avi_with_b_frames(tmp_path: Path, network: FusedDenoiser) -> None:
    """FFmpeg gives times 1, 4, 3, 5, 2: the first frame stayed for three."""
    source = make_video(tmp_path / "a.avi", frames=12, bf="2", **{"x264-params": "b-adapt=0"})
    assert [picture.pts for picture in decoded(source)] != sorted(picture.pts for picture in decoded(source))
    run(source, tmp_path / "b.mkv", network)
    assert [round(1000 * picture.time) for picture in decoded(tmp_path / "b.mkv")] == list(range(0, 480, 40))


def test_one_damaged_frame_does_not_end_a_run(tmp_path: Path, network: FusedDenoiser) -> None:
    """PNG's decoder reports it as an error of a library, not as invalid data."""
    source = make_video(tmp_path / "a.mov", "png", "rgb24", frames=6)
    with av.open(str(source)) as reader:
        packet = [packet for packet in reader.demux(video=0) if packet.size][3]
        place, size = packet.pos, packet.size
    data = bytearray(source.read_bytes())
    data[place + size // 2 : place + size // 2 + 200] = b"\xff" * 200
    source.write_bytes(data)
    with pytest.raises(av.error.ExternalError):
        decoded(source)
    result = run(source, tmp_path / "b.mov", network)
    assert (result.frames, result.damaged) == (5, 1)
    assert result.notes == ["1 damaged packets or frames in the input, missing or made up by the decoder"]


@pytest.mark.parametrize("name", ["MemoryError", "DecoderNotFoundError"])
def test_errors_that_are_no_damage_end_a_run(name: str) -> None:
    error = getattr(av.error, name)(1, "as asked")

    class Packet:
        def decode(self) -> Any:
            raise error

    reading = Input.__new__(Input)
    reading.av, reading.damaged = av, 0
    with pytest.raises(type(error)):
        reading._frames(Packet())
    assert reading.damaged == 0


def test_tags_in_another_encoding_stay(tmp_path: Path, network: FusedDenoiser) -> None:
    """Latin-1, as old AVIs have it: each letter beyond ASCII became a replacement character."""
    source = make_video(tmp_path / "a.avi", "mpeg4")
    with av.open(str(source)) as reader, av.open(str(tmp_path / "b.avi"), "w") as writer:
        writer.metadata["title"] = "Gr__e!"
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    data = (tmp_path / "b.avi").read_bytes()
    assert data.count(b"Gr__e!") == 1
    (tmp_path / "c.avi").write_bytes(data.replace(b"Gr__e!", "Grüße!".encode("latin-1")))
    for suffix in (".avi", ".mkv"):
        assert run(tmp_path / "c.avi", tmp_path / f"d{suffix}", network).notes == []
        assert "Grüße!".encode("latin-1") in (tmp_path / f"d{suffix}").read_bytes()


def test_a_video_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make_video(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    seen: list[int] = []

    def sync(path: Path) -> None:
        assert not target.exists()
        seen.append(path.stat().st_size)

    monkeypatch.setattr(copy, "sync", sync)
    run(source, target, network)
    assert seen == [target.stat().st_size]


def test_a_missing_input_with_an_output_that_exists(tmp_path: Path, network: FusedDenoiser) -> None:
    (tmp_path / "b.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"a\.mp4: cannot be read as a video: No such file"):
        run(tmp_path / "a.mp4", tmp_path / "b.mp4", network, overwrite=True)
    assert (tmp_path / "b.mp4").read_bytes() == b"mine"


def test_a_cameras_own_keys(tmp_path: Path, network: FusedDenoiser, caplog: pytest.LogCaptureFixture) -> None:
    """MP4 and MOV get an option that keeps them; PyAV warns that Matroska does not know it."""
    source = tmp_path / "a.mov"
    with av.open(str(source), "w", options={"movflags": "use_metadata_tags"}) as writer:
        writer.metadata["com.apple.quicktime.make"] = "Apple"
        stream = writer.add_stream("libx264", 25)
        stream.width, stream.height = WIDTH, HEIGHT
        writer.mux(stream.encode(frame(0, "yuv420p")))
        writer.mux(stream.encode(None))
    for suffix in (".mkv", ".mov", ".mp4"):
        run(source, tmp_path / f"b{suffix}", network)
        assert caplog.text == ""
        with av.open(str(tmp_path / f"b{suffix}")) as reader:
            kept = {key.lower(): value for key, value in reader.metadata.items()}
        assert kept["com.apple.quicktime.make"] == "Apple"


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_one_packet_of_sound_whose_time_goes_back(suffix: str, tmp_path: Path, network: FusedDenoiser) -> None:
    """It ended the whole video with "Invalid argument". The rest of the sound stays where it was."""
    source = make_video(tmp_path / "a.mkv", frames=25, sound="aac")
    data = bytearray(source.read_bytes())
    before = streams(source, "audio")
    # A block's time, 16 bits from that of its cluster, lies in front of its flags and its data.
    place = data.index(before[20][1]) - 3
    data[place : place + 2] = (100).to_bytes(2, "big")
    source.write_bytes(data)
    times = [time for time, _ in streams(source, "audio")]
    assert times != sorted(times)
    result = run(source, tmp_path / f"b{suffix}", network)
    assert result.damaged == 1
    assert [note[:34] for note in result.notes] == ["1 damaged packets or frames in the"]
    after = streams(tmp_path / f"b{suffix}", "audio")
    assert [packet for _, packet in after] == [packet for number, (_, packet) in enumerate(before) if number != 20]
    kept = [float(time) for number, (time, _) in enumerate(before) if number != 20]
    assert [float(time) for time, _ in after] == pytest.approx(kept, abs=0.002)


def test_a_packet_that_cannot_be_written_is_named(
    tmp_path: Path, network: FusedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_video(tmp_path / "a.mkv", frames=4, sound="aac")
    monkeypatch.setattr(copy._Copy, "_heard", lambda self, packet: [_earlier(packet)])
    with pytest.raises(UserError, match=r"b\.mkv: cannot be made of .*a\.mkv: stream 1 \(audio\) cannot be copied at "):
        run(source, tmp_path / "b.mkv", network)
    assert not (tmp_path / "b.mkv").exists()


def _earlier(packet: Any) -> Any:
    packet.pts = packet.dts - 1
    return packet
