"""The packets and frames of a video file, and what is wrong with them."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastden.errors import UserError, shown_bytes

#: How far, in seconds, a Matroska file may end before the end that it states. Its last packet may have no duration: of
#: Opus and FLAC up to 0.12 s.
UNSURE_END = 0.15
#: How many of its longest frames a video may lack: FFmpeg moves a cut inside of a frame to its beginning.
UNSURE_FRAMES = 1.25
#: Bytes of other streams that are held until the first frame comes: seconds of sound in the usual files.
MOST_BEFORE = 256 << 20


def opened(av: Any, source: Path) -> Any:
    """The container of a file.

    Raises:
        UserError: FFmpeg cannot read it.
    """
    try:
        # Absolute: FFmpeg takes what precedes a colon for a protocol.
        return av.open(os.path.abspath(source), **tag_errors(av))
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{source}: cannot be read as a video: {error.strerror or error}") from error


def tag_errors(av: Any) -> dict[str, str]:
    """Options with which PyAV reads and writes tags of other encodings (AVI's are often Latin-1) as they are.

    PyAV does so from version 19 on. Before, they stopped the reading.
    """
    return {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}


def is_cover(av: Any, stream: Any) -> bool:
    """Whether a video stream is a still picture beside the video."""
    return stream.type == "video" and bool(stream.disposition & av.stream.Disposition.attached_pic)


class Input:
    """The first video of a container, with the packets of the other streams.

    Args:
        av: the module of PyAV.
        source: the file's name.
        reader: its container.
        note: called with what a user should know about the file.
    """

    def __init__(self, av: Any, source: Path, reader: Any, note: Callable[[str], None]) -> None:
        self.av, self.source, self.reader, self.note = av, source, reader, note
        pictures = [stream for stream in reader.streams.video if not is_cover(av, stream)]
        if not pictures:
            raise UserError(f"{source}: no video stream; accepted: a file with one")
        self.video = pictures[0]
        self.video.thread_type = "AUTO"
        self.is_avi = reader.format.name == "avi"
        self.damaged = 0
        #: The bytes of cover pictures by index of their stream. FFmpeg gives them before all frames.
        self.covers: dict[int, bytes] = {}
        self._ends: dict[int, float] = {}
        self._longest = 0.0

    def expected(self) -> int:
        """The number of frames, as far as the header tells it; 0 if unknown."""
        rate, duration = self.video.average_rate, self.reader.duration
        return self.video.frames or (int(duration / self.av.time_base * rate) if rate and duration else 0)

    def time(self, frame: Any) -> int | None:
        """When a frame is shown, in units of the video's time base.

        An AVI has no such times, only the order of its packets. FFmpeg takes their numbers for times of frames, which
        are out of order where packets are: with H.264 and B-frames 1, 4, 3, 5, 2. The number of the packet that brought
        the decoder to give the frame counts up.
        """
        time = frame.dts if self.is_avi else frame.pts
        return None if time is None else int(time)

    def delay(self, first: Any) -> int:
        """By how much :meth:`time` is late: an AVI's, by as many packets as the decoder holds back."""
        return (self.time(first) or 0) - (self.video.start_time or 0) if self.is_avi else 0

    def first_frame(self) -> tuple[Any, Iterator[Any]]:
        """The first frame, which tells more than the header, and packets and frames from the beginning."""
        items: list[Any] = []
        packets = self._packets()
        held = 0
        for packet in packets:
            if packet.stream is not self.video:
                items.append(packet)
                held += packet.size
                if held > MOST_BEFORE:
                    text = f"{shown_bytes(held)} of other streams before the first frame"
                    raise UserError(f"{self.source}: {text}; accepted: at most {shown_bytes(MOST_BEFORE)}")
                continue
            frames = self._frames(packet)
            items.extend(frames)
            if frames:
                return frames[0], _chain(items, packets)
        raise UserError(f"{self.source}: no frame can be decoded ({self.damaged} damaged)")

    def items(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Packets to copy, and decoded frames of the video."""
        for item in packets:
            if isinstance(item, self.av.Packet) and item.stream is self.video:
                yield from self._frames(item)
            else:
                yield item

    def _packets(self) -> Iterator[Any]:
        try:
            for packet in self.reader.demux():
                if packet.size:
                    self._look_at(packet)
                if packet.size or packet.stream is self.video:
                    yield packet
        except self.av.error.InvalidDataError:
            self.note("the input ends early: it is damaged")
        else:
            self._check_end()

    def _look_at(self, packet: Any) -> None:
        stream = packet.stream
        if is_cover(self.av, stream):
            self.covers.setdefault(stream.index, bytes(packet))
        begin = packet.dts if packet.pts is None else packet.pts
        if stream is self.video:
            self._longest = max(self._longest, float((packet.duration or 0) * packet.time_base))
        if begin is not None:
            end = float((begin + (packet.duration or 0)) * packet.time_base)
            self._ends[stream.index] = max(end, self._ends.get(stream.index, end))

    def _frames(self, packet: Any) -> list[Any]:
        try:
            frames = packet.decode()
        except (self.av.error.MemoryError, self.av.error.DecoderNotFoundError):
            raise
        except self.av.error.FFmpegError:
            # Not InvalidDataError alone: of a damaged frame PNG's decoder raises ExternalError, that of Theora
            # PermissionError, that of CineForm ArgumentError, that of JPEG 2000 PatchWelcomeError.
            self.damaged += 1
            return []
        # A damaged frame is kept as the decoder repaired it: a missing frame would be more visible.
        self.damaged += sum(frame.is_corrupt for frame in frames)
        return list(frames)

    def _check_end(self) -> None:
        """Note where less is there than the header states. FFmpeg takes a file that is cut off for one that ends."""
        video, start = self.video, float((self.video.start_time or 0) * self.video.time_base)
        end, unsure = self._ends.get(video.index, start), UNSURE_FRAMES * self._longest
        if self.is_avi:  # what FFmpeg takes for its duration is that of a part where the index is missing
            stated = start + float(video.frames * video.time_base)
        elif video.duration and "mp4" in self.reader.format.name.split(","):
            # Not the number of frames, which counts those that an edit list hides.
            # Of DASH, whose header states no frames, FFmpeg's duration counts from 0: 2.48 s, with 2.40 s from 0.08 on.
            stated = (start if video.frames else 0.0) + float(video.duration * video.time_base)
        elif "matroska" in self.reader.format.name.split(",") and self.reader.duration and video.duration is None:
            # Counted from 0 too. Where none is stated (live recordings), FFmpeg guesses one from the bit rate, 2.63 s
            # for 2.40 s, and gives the video one as well.
            stated = self.reader.duration / self.av.time_base
            unsure = max(UNSURE_END, unsure)
            own = _seconds(video.metadata.get("DURATION", ""))
            if end < own - unsure and own < stated + unsure:  # sound may lie in front of the video, and be complete
                stated = own
            else:
                end = max(self._ends.values(), default=0.0)
        else:
            return
        if end < stated - unsure:
            self.note(f"the input ends early, at {end:.2f} s; its header states {stated:.2f} s")


def _seconds(text: str) -> float:
    """A time as Matroska's tags have it, ``00:01:02.345000000``; 0 for other text."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(\.\d+)?)", text)
    return 0.0 if found is None else 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3])


def _chain(items: list[Any], packets: Iterator[Any]) -> Iterator[Any]:
    """The items, each dropped when it is taken, then the packets."""
    queue = deque(items)
    items.clear()
    while queue:
        yield queue.popleft()
    yield from packets
