"""Where pictures come from: files, folders, patterns, addresses, lists on standard input, videos and cameras, always lazily."""

from __future__ import annotations

import glob
import http.client
import itertools
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from PIL import Image

from paqdetr._version import __version__
from paqdetr.errors import ConfigError, DataError
from paqdetr.images import PICTURE_EXTENSIONS, is_leftover, list_images, pictures_in, read_image
from paqdetr.runtime.video import LIVE_SCHEMES, VIDEO_EXTENSIONS, public_address, read_live, read_video

MAX_DOWNLOAD = 20 * 2**20
"""The largest picture that is fetched from an address, in bytes."""

# Seconds: for the next bytes of an address, and for all of them.
_WAIT, _WHOLE = 20.0, 60.0

# Characters of an address that stay as they are; % too, since it may have been quoted already.
_KEPT = "%/:?[]@!$&'()*+,;=~"

Kind = Literal["picture", "video", "live", "address", "given"]


@dataclass(frozen=True, slots=True)
class Source:
    """One picture or video that is going to be read.

    Attributes:
        address: a path, a URL, `camera:0`, or the picture itself.
        name: what its results are called: a relative path with forward slashes, without `..`.
        kind: "address" is an http address, of which its answer says what it is; "given" a picture itself.
    """

    address: Any
    name: str
    kind: Kind

    @property
    def shown(self) -> str:
        """The address for messages, without a password."""
        return self.name if self.kind == "given" else public_address(str(self.address))


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to detect in.

    Attributes:
        source: where it comes from.
        image: RGB, upright.
        frame: its number in a video, from 0; None for a picture that stands alone.
        time: of the frame in seconds.
        live: it comes from a live source, where waiting for more pictures makes results late.
    """

    source: Source
    image: Image.Image
    frame: int | None = None
    time: float | None = None
    live: bool = False


OnUnreadable = Callable[[Source, DataError], object]


def refuse(source: Source, error: DataError) -> NoReturn:
    """What happens where a source cannot be read, if nobody wants it left out."""
    raise error


def list_sources(
    sources: Iterable[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    leave_out: Path | None = None,
    on_unreadable: OnUnreadable = refuse,
) -> Iterator[Source]:
    """What the given sources hold, in their order; folders in order of name. Lines of standard input come as they are written.

    Args:
        sources: files, folders, patterns such as `data/*.jpg` (`**` stands for any folders), http addresses, `rtsp://...`,
            `camera:0`, and `-` for a list of all of these on standard input, one a line.
        recursive: folders with all that is below them, each once where links lead to it again; names keep the path below the
            folder. Hidden folders are left out.
        leave_out: a folder that is not looked into: results of an earlier call.
        on_unreadable: called with lines of standard input that name nothing, which are then left out; by default an error.

    Raises:
        DataError: one does not exist, or is of another kind; a folder or pattern without pictures and videos.
    """
    for given in sources:
        if str(given) == "-":
            lines = (line.rstrip("\r\n") for line in sys.stdin)
            for line in filter(None, lines):
                try:
                    for source in list_source(line, recursive=recursive, leave_out=leave_out):
                        # A list names files of many folders: relative paths are kept.
                        keep = source.address == Path(line) and not Path(line).is_absolute()
                        yield replace(source, name=_relative(line)) if keep else source
                except DataError as error:
                    on_unreadable(Source(line, line, "picture"), error)
        else:
            yield from list_source(given, recursive=recursive, leave_out=leave_out)


def require_sources(sources: Iterable[str | os.PathLike[str]], *, recursive: bool = False) -> None:
    """Raise DataError, as `list_sources` would, for the first that does not exist or has nothing to look at; those of standard
    input are not looked at. Done before a model is loaded, which takes seconds."""
    for given in sources:
        if str(given) != "-":
            next(list_source(given, recursive=recursive), None)


def list_source(
    given: str | os.PathLike[str], *, recursive: bool = False, leave_out: Path | None = None
) -> Iterator[Source]:
    """As `list_sources`, of one of them; "-" is a file of this name."""
    text, path = os.fspath(given), Path(given)
    if not text:
        raise DataError("the path of a picture is empty", "name a file, a folder or a pattern")
    if text.startswith(LIVE_SCHEMES):
        shown = re.sub(r"\W+", "-", public_address(text.split("?")[0]), flags=re.ASCII).strip("-")
        yield Source(text, shown, "live")
    elif text.startswith(("http://", "https://")):
        name = _relative(urllib.parse.unquote(re.sub(r"^https?://[^/?#]*|[?#].*", "", text))).rsplit("/", 1)[-1]
        yield Source(text, name or "picture", "address")
    elif path.is_dir():
        yield from _in_folder(path, recursive, leave_out)
    elif glob.has_magic(text) and not os.path.lexists(path):
        plain = next((part for part in [path, *path.parents] if not glob.has_magic(str(part))), Path())
        found = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207  takes absolute ones too
        own = [one for one in found if one.is_file() and _kind(one) and not _within(one, leave_out)]
        if not own:
            raise DataError(
                f"{text}: no pictures or videos match",
                f"look at what {plain} holds; quote a pattern that the shell expands",
            )
        yield from (Source(one, _relative(one.relative_to(plain)), _kind(one) or "picture") for one in own)
    elif path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file():
        yield Source(path, path.name, "video")
    else:
        yield from (Source(one, one.name, "picture") for one in list_images(path))


def _in_folder(folder: Path, recursive: bool, leave_out: Path | None) -> Iterator[Source]:
    """Pictures and videos of a folder, by name."""
    found, seen = False, set()
    for root, folders, names in os.walk(folder, followlinks=True):
        state = Path(root).stat()
        if (state.st_dev, state.st_ino) in seen:  # a link to a folder above it, or to one that was looked into
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        shown = (Path(root, name) for name in names if name[:1] != "." and not is_leftover(name))
        videos = {path for path in shown if _kind(path) == "video"}
        for path in sorted(videos.union(pictures_in(Path(root)))):
            found = True
            yield Source(path, path.relative_to(folder).as_posix(), "video" if path in videos else "picture")
        folders[:] = sorted(
            name
            for name in folders
            if recursive and name[:1] != "." and not is_leftover(name) and not _within(Path(root, name), leave_out)
        )
    if not found and not recursive:
        try:
            below = next(_in_folder(folder, True, leave_out))
        except DataError:
            list_images(folder)  # which says what it looked for
        else:
            raise DataError(
                f"{folder}: holds no pictures or videos, but folders below it do, such as {below.name}",
                "add --recursive (model.stream(..., recursive=True)), or name one of these folders",
            )
    if not found:
        raise DataError(f"{folder}: neither it nor a folder below it holds pictures or videos", "check the path")


def _within(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder.resolve())


def _kind(path: Path) -> Kind | None:
    ending = path.suffix.lower()
    return "video" if ending in VIDEO_EXTENSIONS else "picture" if ending in PICTURE_EXTENSIONS else None


def _relative(name: str | Path) -> str:
    """A name that leads out of no folder, with forward slashes."""
    return "/".join(part for part in Path(name).parts if part not in ("..", "/") and not part.endswith((":", ":\\")))


def read_source(source: Source, *, every: int = 1, buffer: bool = False) -> Iterator[Picture]:
    """The pictures of one source, each read when it is asked for.

    Args:
        source: of `list_sources`.
        every: of a video every so many frames, beginning with the first.
        buffer: of a live source all frames, in place of the newest.

    Raises:
        DataError: it cannot be read, is too large, or its address does not answer.
    """
    address = source.address
    content = _fetch(address) if source.kind == "address" else address
    if source.kind == "given" or isinstance(content, bytes):
        try:
            yield Picture(source, read_image(content))
        except DataError as error:
            raise DataError(f"{source.shown}: {error.message}", error.remedy) from error.__cause__
        return
    kind = content if source.kind == "address" else source.kind
    if kind == "picture":
        yield Picture(source, read_image(address))
        return
    live = kind == "live"
    frames = read_live(str(address), every=every, buffer=buffer) if live else read_video(address, every=every)
    yield from (Picture(source, frame.image, frame.index, frame.time, live) for frame in frames)


def _fetch(url: str) -> bytes | Literal["video", "live"]:
    """The picture at an address; or what else is there.

    Raises:
        DataError: it does not answer, refuses, takes too long, or has more than `MAX_DOWNLOAD`.
    """
    shown, end = public_address(url), time.monotonic() + _WHOLE
    too_large = DataError(
        f"{shown}: has more than {MAX_DOWNLOAD // 2**20} MB, the most that is fetched", "download it and name the file"
    )
    try:
        parts = urllib.parse.urlsplit(url)  # as browsers send it: blanks and letters beyond ASCII by their codes
        parts = parts._replace(path=urllib.parse.quote(parts.path, _KEPT), query=urllib.parse.quote(parts.query, _KEPT))
        request = urllib.request.Request(parts.geturl(), headers={"User-Agent": f"paqdetr/{__version__}"})
        with urllib.request.urlopen(request, timeout=_WAIT) as answer:  # http and https alone come here
            kind = answer.headers.get_content_type()
            if kind == "multipart/x-mixed-replace":
                return "live"
            if kind.startswith("video/") or "mpegurl" in kind:
                return "video"
            if int(answer.headers.get("Content-Length") or 0) > MAX_DOWNLOAD:
                raise too_large
            pieces, size = [], 0
            while part := answer.read1(2**16):
                pieces.append(part)
                size += len(part)
                if size > MAX_DOWNLOAD:
                    raise too_large
                if time.monotonic() > end:
                    raise TimeoutError(f"not complete after {_WHOLE:g} s")
            return b"".join(pieces)
    except urllib.error.HTTPError as error:
        raise DataError(f"{shown}: the server answers {error.code} {error.reason}", "check the address") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{shown}: cannot be fetched: {reason}", "check the address and the network") from None


def read_sources(
    sources: Iterable[Source],
    *,
    every: int = 1,
    max_frames: int | None = None,
    buffer: bool = False,
    on_unreadable: OnUnreadable = refuse,
) -> Iterator[Picture]:
    """The pictures of many sources, lazily.

    Args:
        sources: of `list_sources`.
        every, buffer: as of `read_source`.
        max_frames: the most that are given of each video or live source.
        on_unreadable: called with what cannot be read, which is then left out; by default an error.

    Raises:
        DataError: as `read_source`, unless `on_unreadable` is given.
        ConfigError: `every` or `max_frames` is below 1.
    """
    for name, value in (("every", every), ("max_frames", max_frames)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, found {value}", "it counts the frames of a video")
    for source in sources:
        pictures = read_source(source, every=every, buffer=buffer)
        try:
            yield from itertools.islice(pictures, max_frames)
        except DataError as error:
            on_unreadable(source, error)
        finally:
            pictures.close()  # type: ignore[attr-defined]  # a reader thread ends now, not when Python finds the time


def batches(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Pictures in groups of `batch_size`; those of a live source come alone, so that nothing waits for the next ones."""
    group: list[Picture] = []
    for picture in pictures:
        group.append(picture)
        if len(group) >= batch_size or picture.live:
            yield group
            group = []
    if group:
        yield group
