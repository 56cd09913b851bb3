"""Reads files that may come from anywhere: regular files alone, of limited size, as UTF-8 text or json. Writes files whole or not
at all. Locks files: at most one process trains in a folder, makes a data set, writes a file; the system releases a lock when its
last holder ends, however it ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any, BinaryIO, cast
from weakref import WeakSet

from paqdetr.errors import DataError, StorageError, UserError
from paqdetr.values import environment_integer

# `filelock` would not do: a study hands its lock on to the training that it starts, which takes the open file itself.
try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

MAX_JSON_BYTES = environment_integer("PAQDETR_MAX_JSON_GIB", 4, low=1, high=2**20) * 2**30
"""The largest annotation file that is read: ten times the size of that of COCO train2017."""

MAX_SIDE_BYTES = 2**26
"""The largest file with the annotations of one image, or with a list of images."""

EXPORTED = (".onnx", ".xml")
"""Endings of exported models that run without torch."""

EXPORTED_BY_TORCH = (".pt2", ".torchscript")
"""Endings of exported models that torch runs."""

# Unfinished files lie in folders of such names, each with a lock that its writer holds.
_UNFINISHED = ".paqdetr-{}.tmp"

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | Path, *, error: type[UserError] = DataError) -> BinaryIO:
    """The file, opened to be read as bytes. A pipe or a device, which may wait or go on forever, is refused.

    Raises:
        error: it is missing, may not be read, or is no regular file.
    """
    descriptor = -1
    try:
        # Opening a pipe waits for whoever writes into it, unless O_NONBLOCK is set.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFREG:
            return cast(BinaryIO, os.fdopen(descriptor, "rb"))
        os.close(descriptor)
    except FileNotFoundError:
        raise error(f"{path}: no such file", "Check the path.") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}", "Check the file.") from None
    except ValueError:  # NUL in the path, or a lone surrogate
        raise error(f"{str(path)!r}: cannot be the name of a file", "Check the path.") from None
    raise error(f"{path}: is {_KINDS.get(kind, 'no regular file')}, expected a file", "Name a regular file.")


def read_bytes(path: Path, *, limit: int | None = MAX_SIDE_BYTES, error: type[UserError] = DataError) -> bytes:
    """The file's content.

    Raises:
        error: as `open_regular`, or it is larger than `limit` bytes; None: of any size.
    """
    with open_regular(path, error=error) as file:
        try:
            content = file.read() if limit is None else file.read(limit + 1)
        except OSError as problem:
            raise error(f"{path}: cannot be read: {problem.strerror}", "Check the file.") from None
        if limit is not None and len(content) > limit:
            size, unit = (2**20, "MiB") if limit >= 2**20 else (2**10, "KiB")
            raise error(
                f"{path}: has {os.fstat(file.fileno()).st_size / size:,.0f} {unit}, more than the {limit / size:,.0f} "
                "that are read",
                "check that it is the right file; PAQDETR_MAX_JSON_GIB=N raises the limit of annotation files",
            )
        return content


def read_text(path: Path, *, limit: int = MAX_SIDE_BYTES, error: type[UserError] = DataError) -> str:
    """The file as UTF-8 text, with or without a byte order mark.

    Raises:
        error: as `read_bytes`, or it is not UTF-8.
    """
    content = read_bytes(path, limit=limit, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}: no UTF-8 text at byte {problem.start} (line {line})", "Save the file as UTF-8.") from None


def parse_json(text: str, where: str, *, error: type[UserError] = DataError) -> Any:
    """What the json text says; `where` names it in errors.

    Raises:
        error: no json (naming line and column), a key that an object has twice, nested too deeply, or a number of thousands of
            digits.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key in content if counts[key] > 1)
            raise error(f"{where}: an object has the key {twice!r} twice", "Keep one of the two.")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as problem:
        raise error(
            f"{where}: no valid json at line {problem.lineno}, column {problem.colno}: {problem.msg}",
            "Export or download the file again.",
        ) from None
    except RecursionError:
        raise error(f"{where}: the json is nested too deeply", "Check what wrote it: no annotations are.") from None
    except ValueError as problem:  # an integer of more digits than Python converts
        raise error(f"{where}: no usable json: {problem}", "Export or download the file again.") from None


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES, error: type[UserError] = DataError) -> Any:
    """What the json file holds.

    Raises:
        error: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit=limit, error=error), str(path), error=error)


def load_json(path: Path, *, expected: str, remedy: str = "Export or download the file again.") -> dict[str, Any]:
    """The file's content, an object.

    Args:
        expected: the keys of such an object, for errors.
        remedy: what to do about a file that holds something else.

    Raises:
        DataError: as `read_json`, or it is no object.
    """
    content = read_json(path, limit=MAX_JSON_BYTES)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected {expected}", remedy)
    return content


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as `write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there once it lies safely on the disk: see `whole_file`."""
    with whole_file(path) as temporary:
        write(temporary)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which is moved there at the end of the block, once it lies safely on the disk, and vanishes if
    the block fails. Its permissions are those of any new file (0666 less the umask), whatever the block gives it.

    Raises:
        StorageError: any step of it fails; what was at `path` before is still there.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers_once(path.parent)
        with unfinished(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != mode:  # safetensors replaces the file by a private one
                temporary.chmod(mode)
            _flush(temporary)
            temporary.replace(path)
        _flush(path.parent)


@contextlib.contextmanager
def storage_errors(path: Path | str, then: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about `path`; `then` ends its remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error})",
            f"check the disk's space and the folder's permissions{then}",
        ) from None


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A place of the same name in a new hidden folder beside `path`, which is removed at the end."""
    before, after = _UNFINISHED.split("{}")
    while True:
        folder = Path(mkdtemp(prefix=before, suffix=after, dir=path.parent))
        try:
            with contextlib.suppress(Busy), held(folder / "lock"):  # Busy: somebody just takes it for a leftover
                yield folder / path.name
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of `write_whole` whose writers were killed; those of a living writer stay."""
    for leftover in folder.glob(_UNFINISHED.format("*")):
        with contextlib.suppress(Busy, OSError), held(leftover / "lock") as lock:
            if lock is not None:  # without locks nobody knows whether the writer lives
                shutil.rmtree(leftover, ignore_errors=True)


_remove_leftovers_once = functools.cache(remove_leftovers)


def _flush(path: Path) -> None:
    """fsync a file's content, or a folder's entries."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------- locks


_held: WeakSet[IO[bytes]] = WeakSet()


class Busy(Exception):
    """Another process holds the lock."""


def acquire(path: Path, *, wait: bool = False) -> IO[bytes] | None:
    """Take a lock, held until the returned file is closed everywhere.

    A process that is forked from this one closes its copy at once (those that load images must not keep a run locked whose
    training was killed); one that is started with `subprocess` and `pass_fds` keeps it.

    Args:
        path: the lock file; made if absent, and never replaced. Only its holder may remove it.
        wait: for the other process to let go.

    Returns:
        the open file; None where there are no such locks (Windows, some network file systems).

    Raises:
        Busy: another process holds it, and `wait` is off.
        OSError: the file cannot be made.
    """
    if fcntl is None:
        return None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise Busy(str(path)) from None
        except OSError:
            file.close()
            return None
        if _is_at(file, path):
            _held.add(file)
            return file
        file.close()  # its last holder has removed it in between: whoever comes next makes another


@contextlib.contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[IO[bytes] | None]:
    """Hold a lock for as long as the block runs; see `acquire`."""
    file = acquire(path, wait=wait)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _close_held() -> None:
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)
