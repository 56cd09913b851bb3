"""Video in and out by PyAV: frames upright and with their own times, from files, cameras and network streams; H.264 that plays.

PyAV and not OpenCV: it says how a frame is rotated, keeps variable frame times, and its wheel writes H.264 that browsers play.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
from PIL import Image

from paqdetr.errors import DataError, import_extra
from paqdetr.files import open_regular

_LOG = logging.getLogger(__name__)

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv"}
)
LIVE_SCHEMES = ("camera:", "rtsp://", "rtsps://", "rtmp://", "tcp://", "udp://", "srt://")

# Seconds: to open a network stream, and to wait for more of it.
_TIMEOUT = (15.0, 15.0)
# Seconds between two attempts to reconnect: doubled from the first to the last.
_FIRST_WAIT, _LAST_WAIT = 0.5, 30.0
# Frames that wait where all are wanted: at 1920 x 1080 pixels some 200 MB.
_BUFFERED = 64
# Of a written video: ticks per second.
_TICKS = 90_000


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a video.

    Attributes:
        image: RGB, upright.
        index: its number from 0, in the order shown. Of a live source: of those that arrived, so that skipped frames leave gaps.
        time: in seconds, as the file has it. Of a live source: since its first frame, by when it arrived, or with `buffer` by the
            times that the source gives.
    """

    image: Image.Image
    index: int
    time: float


def read_video(address: str | Path, *, every: int = 1) -> Iterator[Frame]:
    """The frames of a video file or address, one at a time.

    Args:
        address: a file's path, or a URL.
        every: every so many frames, beginning with the first.

    Raises:
        DataError: it cannot be read, or has no video. What is damaged in the middle is skipped, with a warning in the log.
        BackendError: PyAV is not installed.
    """
    av = import_extra("av", "video")
    shown = public_address(str(address))
    where, timeout = str(address), _TIMEOUT
    if isinstance(address, Path):
        open_regular(address).close()
        where, timeout = f"file:{address}", None  # else a name like `a:1.mp4` would be a protocol
    index, now = -1, -math.inf
    # From version 19 on, no metadata fail to be decoded.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        with av.open(where, timeout=timeout, **lenient) as container:
            step = 1 / float(_video_stream(container, shown).average_rate or 25)
            for index, frame in enumerate(_decoded(container, shown, threads="AUTO")):
                now = (max(now, -step) + step) if frame.time is None else float(frame.time)
                if index % every == 0:
                    yield Frame(upright(frame), index, now)
    except av.FFmpegError as error:
        if index < 0:
            problem = f"{shown}: not a readable video: {_reason(error)}"
            raise DataError(problem, "check that it is a video and complete") from None
        _LOG.warning("%s: the video is damaged after frame %d: %s", shown, index, _reason(error))
    if index < 0:
        raise DataError(f"{shown}: has no frames", "check that it is a video and complete")


def read_live(address: str, *, every: int = 1, buffer: bool = False, patience: float = 600.0) -> Iterator[Frame]:
    """The newest frame of a live source, as often as one is asked for; a thread reads and drops the others meanwhile.

    Args:
        address: `camera:0`, `rtsp://...`, or an http address of an MJPEG stream.
        every: only every so many frames that arrive.
        buffer: all of them, in order. Where 64 wait for a slower reader, no more is read from the source until one is taken: a
            sender over TCP waits, others lose frames.
        patience: a lost connection is tried again, at growing intervals, for so many seconds without a frame.

    Raises:
        DataError: it cannot be opened, or was lost for longer than `patience`.
        BackendError: PyAV is not installed.
    """
    import_extra("av", "video")
    reader = _LiveReader(address, every, patience, buffer=buffer)
    reader.start()
    try:
        while True:
            yield reader.take()
    finally:
        reader.stop()


class _LiveReader(threading.Thread):
    """Reads a live source and keeps its newest frame alone, or with `buffer` those that are not taken yet."""

    def __init__(self, address: str, every: int, patience: float, *, buffer: bool) -> None:
        super().__init__(name="paqdetr live source", daemon=True)
        self._address, self._every, self._patience, self._buffer = address, every, patience, buffer
        self._stopped = threading.Event()
        # Frames, each with its number and time; or the error that ended the source.
        self._frames: Queue[tuple[Any, int, float] | DataError] = Queue(_BUFFERED if buffer else 1)
        self._count, self._began, self._latest = 0, 0.0, 0.0

    def take(self) -> Frame:
        """Wait for the next frame."""
        while True:
            with contextlib.suppress(Empty):
                found = self._frames.get(timeout=1.0)
                if isinstance(found, DataError):
                    raise found
                frame, index, now = found
                return Frame(upright(frame), index, now)

    def stop(self) -> None:
        """End the thread; one that waits for the network ends when its wait does."""
        self._stopped.set()
        self.join(timeout=2.0)

    def _give(self, found: tuple[Any, int, float] | DataError) -> None:
        """Put it behind what waits, once there is room; or in its place."""
        while not self._stopped.is_set():
            try:
                return self._frames.put(found, timeout=1.0 if self._buffer else 0.0)
            except Full:
                if not self._buffer:
                    with contextlib.suppress(Empty):
                        self._frames.get_nowait()

    def run(self) -> None:
        shown, wait, lost = public_address(self._address), _FIRST_WAIT, None
        while not self._stopped.is_set():
            before, problem = self._count, "the stream ended"
            try:
                self._read()
            except Exception as error:  # an error here must reach the caller: the thread has none
                problem = error.message if isinstance(error, DataError) else _reason(error)
            if self._stopped.is_set():
                return
            if self._count > before:
                wait, lost = _FIRST_WAIT, None
            lost = lost or time.monotonic()
            if self._count == 0 or time.monotonic() - lost > self._patience:
                what = "no frame arrived" if self._count == 0 else "the connection was lost"
                remedy = "check the address, the network, and that no other program uses the camera"
                return self._give(DataError(f"{shown}: {what}: {problem}", remedy))
            _LOG.warning("%s: %s; connecting again in %g s", shown, problem, wait)
            self._stopped.wait(wait)
            wait = min(2 * wait, _LAST_WAIT)

    def _read(self) -> None:
        with _open_live(self._address, buffer=self._buffer) as container:
            start = None
            for frame in _decoded(container, public_address(self._address), threads="SLICE"):
                if self._stopped.is_set():
                    return
                self._began = self._began if self._count else time.monotonic()
                now = time.monotonic() - self._began
                if self._buffer and frame.time is not None:  # one that had to wait arrives late
                    start = max(now, self._latest) - frame.time if start is None else start
                    now = start + frame.time
                self._latest = now
                index, self._count = self._count, self._count + 1
                if index % self._every == 0:
                    self._give((frame, index, now))


def _open_live(address: str, *, buffer: bool) -> Any:
    av = import_extra("av", "video")
    kind, _, rest = address.partition(":")
    if kind == "camera":
        device, form = {"darwin": (rest, "avfoundation"), "win32": (f"video={rest}", "dshow")}.get(
            sys.platform, (f"/dev/video{rest}" if rest.isdigit() else rest, "v4l2")
        )
        options = {"framerate": "30"} if form == "avfoundation" else {}
        return av.open(device, format=form, options=options, timeout=_TIMEOUT)
    # Without: seconds of frames before the first is given. With: those that tell its format apart are lost.
    options = {} if buffer else {"fflags": "nobuffer", "fpsprobesize": "0"}
    if kind in ("http", "https"):
        return av.open(address, format="mpjpeg", options=options, timeout=_TIMEOUT)
    if kind in ("rtsp", "rtsps"):
        options["rtsp_transport"] = "tcp"  # lost packets of udp are grey blocks in the picture
    return av.open(address, options=options, timeout=_TIMEOUT)


def _video_stream(container: Any, shown: str) -> Any:
    if not container.streams.video:
        raise DataError(f"{shown}: has no video", "name a video file or a picture")
    return container.streams.video[0]


def _decoded(container: Any, shown: str, *, threads: str) -> Iterator[Any]:
    """The decoded frames, without those that are damaged."""
    av, damaged = import_extra("av", "video"), 0
    stream = _video_stream(container, shown)
    stream.thread_type = threads
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            damaged += 1
            if damaged == 1:
                _LOG.warning("%s: damaged frames are skipped", shown)


def upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned and mirrored as its display matrix says, which PyAV leaves to the caller."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        # 3 x 3 in fixed point: a pixel (x, y) is shown at (a x + c y, b x + d y), x to the right and y down.
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, across, down = pixels.swapaxes(0, 1), c, b
        else:
            across, down = a, d
        pixels = pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))


class VideoWriter:
    """H.264 in an mp4, with the distances in time that its frames are given. Its size is that of the first frame, made even.

    Args:
        path: the file; it plays once `close` has been called.
        comment: goes into the file's metadata.

    Raises:
        BackendError: PyAV is not installed.
    """

    def __init__(self, path: Path, *, comment: str = "") -> None:
        self._av = import_extra("av", "video")
        self._container = self._av.open(f"file:{path}", "w", format="mp4")
        self._container.metadata["comment"] = comment
        self._stream: Any = None
        self._start = 0  # of the source's clock, in ticks
        self._last, self._gap = -1, 1

    def add(self, image: Image.Image, seconds: float) -> None:
        """Append a frame.

        Args:
            image: RGB.
            seconds: when it is shown, by the source's clock: the first frame's time is the file's beginning. A time that is not
                later than the last one's follows it at once; where it is over a second earlier, the clock has begun anew (as in
                recordings that were joined), and goes on from here.
        """
        if self._stream is None:
            self._stream = self._begin(image.width + image.width % 2, image.height + image.height % 2)
        width, height = self._stream.width, self._stream.height
        if (width - image.width, height - image.height) not in ((0, 0), (0, 1), (1, 0), (1, 1)):
            image = image.resize((width, height))  # a live source came back in another size
        pixels = np.asarray(image)
        room = ((0, height - image.height), (0, width - image.width), (0, 0))
        frame = self._av.VideoFrame.from_ndarray(np.pad(pixels, room, mode="edge"), format="rgb24")
        ticks = round(seconds * _TICKS)
        if self._last < 0:
            self._start = ticks
        elif ticks - self._start < self._last - _TICKS:
            self._start = ticks - (self._last + self._gap)
        at = max(ticks - self._start, self._last + 1)
        self._last, self._gap = at, at - self._last
        frame.pts, frame.time_base = at, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    def _begin(self, width: int, height: int) -> Any:
        # A short look-ahead: the encoder would hold some 40 frames, which are gigabytes at 4K.
        options = {"preset": "veryfast", "crf": "21", "rc-lookahead": "8"}
        stream = self._container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, _TICKS)
        return stream

    def close(self) -> None:
        """Write what the encoder still holds and the index."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def public_address(address: str) -> str:
    """An address as it may be shown: without the user's name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", address)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
