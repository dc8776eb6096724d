"""Video files through PyAV: frames are denoised one by one, everything else is copied.

Memory does not grow with the length, and the output appears when it is complete. The way from a frame to pixels and
back is in :mod:`fastden.video.frames`.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastden.errors import UserError
from fastden.images.codec import MAX_PIXELS, check_size
from fastden.images.kinds import VIDEO, kind_of_suffix
from fastden.images.pixels import Array
from fastden.images.ranges import ORDINARY
from fastden.video.demuxing import Input, is_cover, opened, tag_errors
from fastden.video.encoders import Encoders
from fastden.video.frames import FrameConverter, has_alpha
from fastden.whole_files import check_target, sync, whole_file

if TYPE_CHECKING:
    from fastden.network.fused import FusedDenoiser

#: Of outputs.
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
#: Frames whose noise ``sigma="auto"`` estimates. The whole video gets their median, so that it does not flicker.
ESTIMATED = 5
#: Sound whose times AVI's writer makes anew, wrongly: it takes the header's size of a block, which FFmpeg's reader has
#: set, for a constant size of packets. Of 1.5 s of AC-3 0.13 s were left, of AAC 0.36 s. PCM, ADPCM, MP2, MP3 and WMA
#: keep theirs.
NO_AVI_SOUND = ("aac", "ac3", "flac", "vorbis")
#: Kinds of cover pictures that Matroska attaches, by FFmpeg's name of their codec, and the ends of their names.
COVERS = {"mjpeg": ("image/jpeg", "jpg"), "png": ("image/png", "png")}
#: Tags about the container and the encoder, not about the content.
NOT_COPIED = ("major_brand", "minor_version", "compatible_brands", "encoder", "duration")
#: Tags about the old encoding, which are wrong for a new one: Matroska's statistics (with a language), and its alpha.
OF_ENCODING = re.compile(r"(bps|number_of_(bytes|frames)|duration|_statistics_\w+)(-[\w-]+)?|alpha_mode", re.IGNORECASE)
#: Kinds of side data that PyAV reads and cannot write.
LOST = {
    "MASTERING_DISPLAY_METADATA": "the mastering display's description (HDR10)",
    "CONTENT_LIGHT_LEVEL": "the content light level (HDR10)",
    "DYNAMIC_HDR_PLUS": "HDR10+ metadata",
    "DOVI_METADATA": "Dolby Vision metadata",
    "A53_CC": "closed captions inside the video stream",
    "SPHERICAL": "the projection of a spherical (360 degree) video",
    "STEREO3D": "the arrangement of a stereoscopic (3D) video",
    "ICC_PROFILE": "the ICC profile of the frames",
}


@dataclass
class VideoResult:
    """The result of a video: what was denoised, and notes.

    Attributes:
        frames, width, height: of the video stream.
        sigma: the noise level taken, on the scale 0-255; None for a blind network.
        damaged: packets that could not be decoded, and frames that the decoder repaired.
        notes: what differs from the input, each a line.
    """

    frames: int = 0
    width: int = 0
    height: int = 0
    sigma: float | None = None
    damaged: int = 0
    notes: list[str] = field(default_factory=list)


def is_video(path: str | Path) -> bool:
    """Whether the suffix is that of a video that can be read."""
    return kind_of_suffix(Path(path).suffix) == VIDEO


def is_output(path: str | Path) -> bool:
    """Whether the suffix is that of a video that can be written."""
    return Path(path).suffix.lower() in SUFFIXES


def denoise_video(
    source: str | Path,
    target: str | Path,
    sigma: float | Literal["auto"],
    load: Callable[[bool, bool], FusedDenoiser],
    *,
    crf: int | None = None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> VideoResult:
    """Denoise the video stream of a file and copy its other streams.

    Audio, subtitles, chapters, metadata, rotation, colour tags, and the time of every frame are kept. Not kept is
    the position of chroma between the pixels: PyAV sets none in encoders. Memory does not grow with the length. The
    video is encoded with the input's codec where there is an encoder for it that takes the input's pixel format, else
    with another, which is noted.

    Args:
        source: a file that FFmpeg can read.
        target: its suffix chooses the container; appears when it is complete.
        sigma: on the scale 0-255 of the coded values, or ``"auto"``: the median of the estimates on frames from all
            over the video, or on the first that can be judged where it cannot be sought in.
        load: gives the network, told whether the video has 8 bits, and whether its noise is white.
        crf: constant rate factor of the encoder (lower is better and larger); None is 8 to 24, depending on the codec.
        overwrite: replace an existing ``target``.
        max_pixels: frames with more pixels are refused.
        progress: called after each frame with the frames done and the frames in all (0 if unknown).
        **options: of :func:`fastden.inference.run.run_network`.

    Returns:
        What was done, with notes.

    Raises:
        UserError: a file that cannot be read, written or encoded, or PyAV is missing.
    """
    av = _av()
    source, target = Path(source), Path(target)
    if not is_output(target):
        raise UserError(f"output: {target}; accepted suffixes for a video: {', '.join(SUFFIXES)}")
    check_target(target, overwrite)
    if source.exists() and target.exists() and os.path.samefile(source, target):
        raise UserError(f"output: {target} is the input; accepted: another file")
    with _QUIET.during(av), whole_file(target, target.suffix.lower(), overwrite=overwrite) as temporary:
        try:
            with (
                opened(av, source) as reader,
                av.open(str(temporary), "w", options=_container_options(reader, target), **tag_errors(av)) as writer,
            ):
                copy = _Copy(av, source, target, reader, writer, crf)
                copy.run(sigma, load, max_pixels, progress, options)
            sync(temporary)
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{target}: cannot be made of {source}: {error.strerror or error}") from error
    return copy.result


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        how = "Python 3.11 or later" if sys.version_info < (3, 11) else "pip install 'fastden[video]'"
        raise UserError(f"video: the package {error.name} is missing; install: {how}") from error
    return av


class _Quiet:
    """What is printed besides errors while videos are denoised: nothing, as errors are raised in any case.

    Both settings are the process's. The first of several threads makes them, the last one restores what was before.
    """

    def __init__(self) -> None:
        self._lock, self._videos = threading.Lock(), 0
        self._level: int | None = None
        self._named = False

    @contextmanager
    def during(self, av: Any) -> Iterator[None]:
        """A context around one video."""
        with self._lock:
            self._videos += 1
            if self._videos == 1:
                self._level, self._named = av.logging.get_level(), "SVT_LOG" in os.environ
                av.logging.set_level(av.logging.FATAL)
                os.environ.setdefault("SVT_LOG", "1")
        try:
            yield
        finally:
            with self._lock:
                self._videos -= 1
                if not self._videos:
                    av.logging.set_level(self._level)
                    if not self._named:
                        os.environ.pop("SVT_LOG", None)


_QUIET = _Quiet()


def _side_data(frame: Any) -> list[Any]:
    # By number: an iterator gives the data in PyAV 18 and its kind in PyAV 19.
    return [frame.side_data[number] for number in range(len(frame.side_data))]


def _container_options(reader: Any, target: Path) -> dict[str, str]:
    # Cameras write keys of their own, which MP4 and MOV keep only on request. PyAV warns of options that are not taken.
    keys = target.suffix.lower() in (".mp4", ".m4v", ".mov") and any(key.startswith("com.") for key in reader.metadata)
    return {"movflags": "use_metadata_tags"} if keys else {}


class _Copy:
    """One run of :func:`denoise_video` over opened containers."""

    def __init__(self, av: Any, source: Path, target: Path, reader: Any, writer: Any, crf: int | None) -> None:
        self.av, self.source, self.target, self.reader, self.writer = av, source, target, reader, writer
        self.crf = crf
        self.result = VideoResult()
        self.input = Input(av, source, reader, self.note)
        self.video = self.input.video
        self.total = self.input.expected()
        self.is_matroska = writer.format.name in ("matroska", "webm")
        self.hidden: dict[int, Any] = {}
        #: Of each copied stream, by index: the decoding time of the last packet.
        self.last: dict[int, int] = {}
        if writer.format.name == "avi" and reader.format.name != "avi":
            raise UserError(f"output: {target}: AVI has no times of frames; accepted for {source.suffix}: .mkv, .mp4")

    def _is_gap(self, packet: Any) -> bool:
        """Whether a packet is the gap between two subtitles of an MP4. The writer makes such gaps itself."""
        codec = packet.stream.codec_context
        return codec is not None and codec.name == "mov_text" and bytes(packet) == b"\0\0"

    def _heard(self, packet: Any) -> list[Any]:
        """The packets to write for the next one of a stream that is copied.

        Sound that an edit list hides (MP4, MOV) would be heard again in Matroska, which has no such lists: 0.98 s of a
        clip that was cut without encoding. The last packet before what is heard stays, as decoders begin with it.
        """
        index = packet.stream.index
        if not self.is_matroska or packet.stream.type != "audio":
            return [packet]
        if packet.is_discard:
            self.hidden[index] = packet
            return []
        return [self.hidden.pop(index), packet] if index in self.hidden else [packet]

    def _copy(self, packet: Any, output: Any) -> None:
        """Write a packet of a stream that is copied.

        One whose time goes back is left out, as damage: no writer takes it. With a later time its sound would stay, but
        no longer where it belongs beside the picture; where one time is far too late, all that follows would move.
        """
        index, kind, dts = packet.stream.index, packet.stream.type, packet.dts
        if dts is not None:
            last = self.last.get(index, dts - 1)
            # Matroska, and subtitles and data everywhere, may have one time twice.
            if dts < last or (dts == last and kind in ("audio", "video") and not self.is_matroska):
                self.input.damaged += 1
                return
            self.last[index] = dts
        packet.stream = output
        try:
            self.writer.mux(packet)
        except (self.av.error.ArgumentError, self.av.error.InvalidDataError) as error:
            when = "" if dts is None else f" at {float(dts * packet.time_base):.2f} s"
            text = f"stream {index} ({kind}) cannot be copied{when}: {error.strerror}"
            raise UserError(f"{self.target}: cannot be made of {self.source}: {text}") from error

    def note(self, text: str) -> None:
        if text not in self.result.notes:
            self.result.notes.append(text)

    def run(
        self,
        sigma: float | Literal["auto"],
        load: Callable[[bool, bool], FusedDenoiser],
        max_pixels: int,
        progress: Callable[[int, int], None] | None,
        options: dict[str, Any],
    ) -> None:
        first, packets = self.input.first_frame()
        self.result.width, self.result.height = first.width, first.height
        try:
            check_size(first.width, first.height, max_pixels)
        except UserError as error:
            raise UserError(f"{self.source}: frames of {error}") from error
        converter = FrameConverter(self.av, first)
        eight_bit = max(component.bits for component in first.format.components) <= 8
        network = load(eight_bit, False)
        outputs = self._add_streams(first)
        encoder = outputs[self.video.index]
        times = _Times(self.input.delay(first))
        asked: Any = sigma
        waiting: deque[tuple[Any, Array]] = deque()
        if sigma == "auto" and network.noise_level_input:
            waiting.extend(self._spread(first, converter))
            estimate = _held(sigma, network, waiting)
            waiting.clear()
            if getattr(estimate, "decided", False):
                asked = estimate
                network = load(eight_bit, True) if estimate.is_white else network

        def finish() -> None:
            """Denoise and write the waiting frames."""
            nonlocal asked, network
            held = _held(asked, network, waiting)
            if not getattr(held, "decided", True):  # black, as many videos begin: the frames behind are judged
                self.note("frames that give nothing to judge the noise by (flat, clipped) are taken as clean")
            elif waiting:
                asked = held
            if getattr(held, "is_white", False):
                network = load(eight_bit, True)
            while waiting:
                frame, pixels = waiting.popleft()
                encoded = converter.frame(self._denoised(pixels, held, network, options), frame, encoder.pix_fmt)
                encoded.pts = times.after(self.input.time(frame))
                self.writer.mux(encoder.encode(encoded))
                self.result.frames += 1
                if progress is not None:
                    progress(self.result.frames, self.total)

        for item in self.input.items(packets):
            if isinstance(item, self.av.Packet):
                if item.stream.index in outputs and not self._is_gap(item):
                    for packet in self._heard(item):
                        self._copy(packet, outputs[packet.stream.index])
                continue
            self._check_frame(item, first)
            waiting.append((item, converter.pixels(item)))
            if asked != "auto" or not network.noise_level_input or len(waiting) == ESTIMATED:
                finish()
        finish()
        self.writer.mux(encoder.encode(None))
        self.result.damaged = self.input.damaged
        if self.result.damaged:
            self.note(
                f"{self.result.damaged} damaged packets or frames in the input, missing or made up by the decoder"
            )

    def _denoised(self, pixels: Array, sigma: Any, network: FusedDenoiser, options: dict[str, Any]) -> Array:
        """A frame (H, W, C) denoised; its alpha stays."""
        from fastden.inference.run import denoise_pixels

        colours = pixels.shape[2] // 3 * 3 or 1
        done, self.result.sigma = denoise_pixels(pixels[:, :, :colours], sigma, network, values=ORDINARY, **options)
        return np.concatenate([done, pixels[:, :, colours:]], 2)

    def _spread(self, first: Any, converter: FrameConverter) -> Iterator[tuple[Any, Array]]:
        """Frames from all over the video, as far as it can be sought in: many begin and end in black.

        They are read from the file anew, so that the copy stays where it is. None come from a pipe: a second reader
        would take what the copy reads.
        """
        if not os.path.isfile(self.source) or not self.reader.duration:
            return
        with opened(self.av, self.source) as reader:
            stream, length = reader.streams[self.video.index], self.reader.duration
            for index in range(ESTIMATED):
                wanted = (reader.start_time or 0) + length * (2 * index + 1) // (2 * ESTIMATED)
                try:
                    reader.seek(wanted)
                    for frame in reader.decode(stream):
                        if frame.pts is None or frame.pts * frame.time_base * self.av.time_base >= wanted:
                            kinds = {(one.width, one.height, one.format.name) for one in (frame, first)}
                            if len(kinds) == 1 and not frame.is_corrupt:
                                yield frame, converter.pixels(frame)
                            break
                except (self.av.error.FFmpegError, OSError):
                    continue

    def _check_frame(self, frame: Any, first: Any) -> None:
        if (frame.width, frame.height, frame.format.name) != (first.width, first.height, first.format.name):
            now, before = (f"{f.width} x {f.height} {f.format.name}" for f in (frame, first))
            raise UserError(f"{self.source}: frames change from {before} to {now}; accepted: frames of one kind")
        if frame.interlaced_frame:
            self.note("interlaced frames were denoised as whole frames, and are written as progressive ones")
        for data in _side_data(frame):
            if data.type.name in LOST and not (data.type.name == "STEREO3D" and self._is_flat_or_kept(data)):
                self.note(f"{LOST[data.type.name]} cannot be written, and is missing")

    def _is_flat_or_kept(self, stereo: Any) -> bool:
        """Whether side data about stereoscopy say that there is none, or Matroska writes them from its tag."""
        return not any(bytes(stereo)[:4]) or (self.is_matroska and "stereo_mode" in self.video.metadata)

    def _add_streams(self, first: Any) -> dict[int, Any]:
        """The output's stream for each of the input's that goes into it, by index."""
        outputs = {}
        for stream in self.reader.streams:
            made = self._add_encoder(first) if stream is self.video else self._add_copy(stream)
            if made is None:
                continue
            if made.type != "attachment":  # these are written with the header
                outputs[stream.index] = made
            made.metadata.update(_content(stream.metadata, encoded=stream is self.video))
            made.disposition = stream.disposition
        self.writer.metadata.update(_content(self.reader.metadata))
        chapters = self.reader.chapters()
        if chapters:
            self.writer.set_chapters(chapters)
        return outputs

    def _add_copy(self, stream: Any) -> Any:
        if stream.discard == self.av.stream.Discard.all:  # the titles of chapters, which are written as chapters
            return None
        if stream.type == "data" and "timecode" in stream.metadata and self.writer.format.name in ("mov", "mp4"):
            # The writer makes this stream itself, from the tag that the video or the file has too. MOV's fails at its
            # end where it gets the stream as well.
            return None
        codec = stream.codec_context.name if stream.codec_context else "unknown"
        if stream.type == "data" and "timecode" in stream.metadata:
            codec = "timecode"  # FFmpeg has no codec for it
        if self.writer.format.name in ("matroska", "mov") and is_cover(self.av, stream):
            return self._add_cover(stream, codec)
        if self.writer.format.name == "avi" and codec in NO_AVI_SOUND:
            text = f"stream {stream.index} (audio, {codec}) would lose its times in .avi"
            raise UserError(f"output: {self.target}: {text}; accepted: .mkv")
        try:
            self._try_copy(stream)
        except (ValueError, self.av.error.FFmpegError) as error:
            text = f"stream {stream.index} ({stream.type}, {codec}) cannot be copied into {self.target.suffix}"
            if stream.type == "audio":
                raise UserError(f"output: {text}; accepted: {self.source.suffix}, or .mkv") from error
            self.note(f"{text}, and is missing")
            return None
        if stream.type == "video" and not is_cover(self.av, stream):
            self.note(f"stream {stream.index}, a second video, is copied as it is")
        return self.writer.add_stream_from_template(stream, opaque=True)

    def _add_cover(self, stream: Any, codec: str) -> Any:
        """Attach a cover picture, which is how Matroska keeps one. As a stream it would become a second video.

        None goes into MOV: its writer takes the stream and writes nothing of it.
        """
        picture = self.input.covers.get(stream.index)
        if codec not in COVERS or picture is None or self.writer.format.name == "mov":
            self.note(f"stream {stream.index} (cover picture, {codec}) cannot be attached, and is missing")
            return None
        kind, suffix = COVERS[codec]
        # Its own name, which may be in any encoding, follows with the other tags.
        return self.writer.add_attachment(f"cover.{suffix}", kind, picture)

    def _try_copy(self, stream: Any) -> None:
        """Raise where the container refuses a stream. Some containers do so only when they write their header."""
        name = self.writer.format.name
        with self.av.open(io.BytesIO(), "w", format=name, **tag_errors(self.av)) as scratch:
            scratch.add_stream_from_template(stream, opaque=True)
            scratch.start_encoding()

    def _add_encoder(self, first: Any) -> Any:
        encoders = Encoders(self.av, self.video, self.writer, self.target.suffix, self.crf, self.note)
        codec, pixel_format = encoders.choose(first)
        # VP8 and VP9 keep alpha as a second picture beside each frame, which FFmpeg's own decoders pass over.
        tags = {key.lower(): value for key, value in self.video.metadata.items()}
        if tags.get("alpha_mode") == "1" and not has_alpha(first.format):
            self.note("transparency (alpha) of this video is not decoded, and is missing")
        stream = self.writer.add_stream(codec.name, options=encoders.options(codec.name))
        encoders.configure(stream.codec_context, first, pixel_format)
        stream.time_base = self.video.time_base
        matrix = next((data for data in _side_data(first) if data.type.name == "DISPLAYMATRIX"), None)
        if matrix is not None:
            stream.set_display_matrix(np.frombuffer(bytes(matrix), np.int32).tolist())
        return stream


class _Times:
    """Times of the output's frames: those of the input, each after the one before.

    Args:
        late: by how much the input's times are late, in units of its time base.
    """

    def __init__(self, late: int) -> None:
        self.late = late
        self.last: int | None = None

    def after(self, time: int | None) -> int:
        """The time of the next frame; ``time`` is the input's, None where it has none."""
        moved = None if time is None else time - self.late
        # After damage a decoder gives no time, or the same time twice.
        if moved is None or (self.last is not None and moved <= self.last):
            moved = 0 if self.last is None else self.last + 1
        self.last = moved
        return moved


def _content(metadata: dict[str, str], *, encoded: bool = False) -> dict[str, str]:
    """The tags to copy; fewer for a stream that is encoded anew."""
    content = {key: value for key, value in metadata.items() if key.lower() not in NOT_COPIED}
    return {key: value for key, value in content.items() if not (encoded and OF_ENCODING.fullmatch(key))}


def _held(sigma: Any, network: FusedDenoiser, waiting: deque[tuple[Any, Array]]) -> Any:
    """The noise level for all frames: the given one, or the median of the estimates on the waiting frames."""
    from fastden.inference.estimate import estimate_of, median_estimate

    if sigma != "auto" or not network.noise_level_input or not waiting:
        return sigma
    colours = waiting[0][1].shape[2] // 3 * 3 or 1
    pictures = [pixels[:, :, :colours] for _, pixels in waiting]
    return median_estimate([estimate_of(picture, ORDINARY, network.estimator) for picture in pictures])
