"""Prediction over very many pictures on a Ray cluster: one model a worker, Parquet shards that appear whole, resumed by what is
there. A shard is the detections in a fixed part of the list, so that no picture is lost or done twice, whichever workers die.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL.Image import Image

from paqdetr._version import __version__
from paqdetr.errors import BackendError, ConfigError, DataError, UserError, import_extra
from paqdetr.files import open_regular, storage_errors, write_whole
from paqdetr.images import PICTURE_EXTENSIONS, is_leftover, read_image
from paqdetr.runtime.video import VIDEO_EXTENSIONS
from paqdetr.structures import Detections

PLAN = "plan.json"
_COLUMNS = ("image", "path", "file_name")


@dataclass(frozen=True, slots=True)
class RayPredictions:
    """What `predict_on_ray` wrote.

    Attributes:
        output: folder of the shards, `part-000000.parquet` and so on.
        images: pictures in them, those that could not be read included.
        objects: detections.
        skipped: shards that were there before.
        unreadable: up to a hundred pictures that could not be read, with the reason.
        failures: how many there are.
    """

    output: str
    images: int
    objects: int
    skipped: int
    unreadable: dict[str, str]
    failures: int


def predict_on_ray(
    model: str | Path,
    source: str | Path,
    *,
    output: str | Path,
    address: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    shard_size: int = 1000,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
    **how: Any,
) -> RayPredictions:
    """Detect in all pictures of a source, in parallel, and write Parquet shards.

    Args:
        model: a checkpoint, a run's folder or an exported model, readable under this path on every node.
        source: a folder with all pictures below it that are not hidden; a text file with one path a line; or a Parquet file, or
            a folder of such without pictures, with a column `image`, `path` or `file_name`; local or any address that fsspec
            knows (`s3://bucket/folder`). So may be the paths.
        output: a new or empty folder, or one of an earlier call with the same arguments, whose shards are kept.
        address: of a cluster ("auto": the one that this machine belongs to); None starts one on this machine.
        workers: processes with a model each; None: as many as the cluster has room for.
        cpus, gpus: of each of them.
        shard_size: pictures of a shard, which is what is done again if a worker dies.
        batch_size: pictures that go through the model together.
        progress: called with (shards done, shards in all).
        how: arguments of `predict`, such as `threshold` and `nms`.

    Raises:
        DataError: the source is missing, or names no picture; or none could be read.
        ConfigError: `output` holds other things, or was made with other arguments.
        BackendError: Ray is not installed, or the cluster does not answer.
    """
    _import("ray.data")
    files = _Files.at(str(output))
    images = list_images_of(str(source))
    file = _loading().require_model(model).absolute()
    plan = {
        "model": hashlib.sha256(file.read_bytes()).hexdigest(),
        "images": len(images),
        "list": hashlib.sha256("\n".join(images).encode("utf-8", "surrogateescape")).hexdigest(),
        "shard_size": shard_size,
        "how": {key: str(value) for key, value in sorted(how.items())},
    }
    _require_same_plan(files, plan)
    groups = [images[start : start + shard_size] for start in range(0, len(images), shard_size)]
    shards = {f"part-{number:06d}.parquet": group for number, group in enumerate(groups)}
    done = set(files.names()) & shards.keys()
    todo = [{"shard": name, "images": group} for name, group in shards.items() if name not in done]
    if todo:
        ray = connect_ray(address)
        room = int(ray.cluster_resources().get("CPU", 1) // max(cpus, 0.01)) or 1
        size = max(1, min(workers or room, len(todo)))
        rows = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _Actor,
            fn_constructor_args=(str(file), files.root, batch_size, "cuda" if gpus else "cpu", how),
            batch_size=1,
            num_cpus=cpus,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(size=size),
        )
        with errors_of_workers():
            for count, _ in enumerate(rows.iter_rows(), start=1):
                if progress is not None:
                    progress(len(done) + count, len(shards))
    return _summary(files, list(shards), len(done))


def list_images_of(source: str) -> list[str]:
    """The pictures that a source of `predict_on_ray` names, each once; local paths are absolute.

    Raises:
        DataError: it is missing, or names none.
    """
    files, root = _import("fsspec").core.url_to_fs(source)
    try:
        if not files.exists(root):
            raise DataError(f"{source}: no such file or folder", "check the address")
        folder = files.isdir(root)
        inside = _shown(files.find(root), root) if folder else []
        pictures = [path for path in inside if PurePosixPath(path).suffix.lower() in PICTURE_EXTENSIONS]
        videos = [path for path in inside if PurePosixPath(path).suffix.lower() in VIDEO_EXTENSIONS]
        tables = [path for path in [root, *inside] if path.endswith(".parquet")]
        for kind, files_of in (("videos", videos), ("Parquet files beside pictures", tables if pictures else [])):
            if files_of:
                logging.getLogger(__name__).warning(
                    "%s: %s are left out: %d, such as %s", source, kind, len(files_of), files_of[0]
                )
        if tables and not pictures:
            lines = _column(_import("pyarrow.dataset").dataset(root, filesystem=files, format="parquet"), source)
        elif folder:
            lines = [files.unstrip_protocol(path) for path in pictures]
        else:
            lines = [line.rstrip("\r") for line in files.cat_file(root).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise DataError(f"{source}: no UTF-8 text", "give a list with one path a line, or Parquet") from None
    except ValueError as error:  # pyarrow's own are such
        raise DataError(f"{source}: not readable as Parquet ({str(error)[:200]})", "write it again") from None
    except OSError as error:
        remedy = "check the address and what it takes to read it"
        raise DataError(f"{source}: cannot be read: {error}", remedy) from None
    base = files.unstrip_protocol(root if folder else root.rpartition("/")[0])
    paths = (line if "://" in line or line.startswith("/") else f"{base}/{line}" for line in lines if line)
    found = list(dict.fromkeys(path.removeprefix("file://") for path in paths))
    if not found:
        raise DataError(f"{source}: names no pictures", "name a folder with pictures, or a list of them")
    return found


def _shown(paths: Sequence[str], root: str) -> list[str]:
    """What lies in a folder, without hidden files and folders and leftovers, as `predict` does it elsewhere."""
    names = ((path, path[len(root) :].lstrip("/")) for path in sorted(paths))
    return [path for path, name in names if "/." not in f"/{name}" and not is_leftover(name)]


def _column(table: Any, source: str) -> list[str | None]:
    types = _import("pyarrow.types")
    fields = {field.name: field.type for field in table.schema}
    plain = {n: kind.value_type if types.is_dictionary(kind) else kind for n, kind in fields.items()}
    texts = {n for n, kind in plain.items() if types.is_string(kind) or types.is_large_string(kind)}
    column = next((name for name in _COLUMNS if name in texts), None)
    if column is None:
        found = ", ".join(f"{name} ({kind})" for name, kind in fields.items())[:200]
        remedy = f"add one of paths or addresses as text that is called {' or '.join(_COLUMNS)}"
        raise DataError(f"{source}: has the columns {found}", remedy)
    return table.to_table(columns=[column])[column].to_pylist()


@dataclass(frozen=True, slots=True)
class _Files:
    """The output folder, local or not."""

    fs: Any
    root: str

    @classmethod
    def at(cls, address: str) -> _Files:
        fs, root = _import("fsspec").core.url_to_fs(address)
        return cls(fs, fs.unstrip_protocol(root))

    def names(self) -> list[str]:
        if not self.fs.exists(self.root):
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Whole, or not at all: an object of a store appears when it is complete."""
        place = f"{self.root}/{name}"
        if place.startswith("file://"):
            write_whole(Path(place.removeprefix("file://")), lambda path: path.write_bytes(content))
        else:
            with storage_errors(place):
                self.fs.pipe_file(place, content)


def _require_same_plan(files: _Files, plan: dict[str, Any]) -> None:
    """Write the plan, or check the one that is there."""
    names = [name for name in files.names() if not name.startswith(".")]
    if PLAN not in names:
        if names:
            raise ConfigError(
                f"{files.root}: the folder holds other files, such as {names[0]}", "choose another --output"
            )
        files.write(PLAN, json.dumps({"made_by": f"paqdetr predict {__version__}", **plan}, indent=1).encode())
        return
    try:
        found = json.loads(files.read(PLAN))
        changed = next((key for key in plan if found.get(key) != plan[key]), None)
    except (ValueError, AttributeError):
        changed = PLAN
    if changed is not None:
        what = {"model": "another model", "how": "other settings"}.get(changed, f"another {changed}")
        raise ConfigError(f"{files.root}: its shards were made with {what}", "choose another --output")


def connect_ray(address: str | None) -> Any:
    """The module `ray`, connected to a cluster.

    Args:
        address: of the cluster, "auto" for the one that this machine belongs to; None starts one on this machine.

    Raises:
        BackendError: Ray is not installed, or the cluster does not answer.
    """
    _import("ray.data")
    ray = _import("ray")
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        how: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="error", **how)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error)[:200]
            raise BackendError(
                f"--ray: no cluster answers at {address}: {reason}", "check it with `ray status`"
            ) from None
        ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Raise what a worker raised as if it had happened here, if it is a UserError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        # Ray's own errors are of the worker's class as well, and hold the error itself as `cause`.
        while cause is not None and (hasattr(cause, "cause") or not isinstance(cause, UserError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from None


class _Actor:
    """One process with a model, which turns shards of the list into shards of detections."""

    def __init__(self, model: str, output: str, batch_size: int, device: str, how: dict[str, Any]) -> None:
        self.files, self.batch_size, self.how = _Files.at(output), batch_size, how
        self.model: Any = _loading().load(model, device=device)
        self.readers = ThreadPoolExecutor(4)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        for name, images in zip(batch["shard"], batch["images"], strict=True):
            if not self.files.fs.exists(f"{self.files.root}/{name}"):  # a worker that died may just have written it
                self.files.write(str(name), shard_of(self._rows(list(images))))
        return {"shard": list(map(str, batch["shard"]))}

    def _rows(self, images: list[str]) -> Iterator[tuple[str, Image | str, Detections | None]]:
        """Every picture, or why it cannot be read; the next ones are read while the model works."""
        step = self.batch_size
        groups = [images[i : i + step] for i in range(0, len(images), step)]
        pending: list[Any] = []
        for group, following in zip([[], *groups], [*groups, []], strict=True):
            read, pending = [one.result() for one in pending], [self.readers.submit(_read, name) for name in following]
            good = [picture for picture in read if not isinstance(picture, str)]
            found = iter(self.model.predict(good, batch_size=step, **self.how) if good else [])
            for name, picture in zip(group, read, strict=True):
                yield name, picture, None if isinstance(picture, str) else next(found)


def _read(address: str) -> Image | str:
    """The picture, or why there is none."""
    try:
        if "://" not in address:
            return read_image(address)
        with _import("fsspec").open(address, "rb") as file:
            return read_image(file.read())
    except DataError as error:
        return error.message
    except Exception as error:  # stores have errors of their own
        return f"{address}: {type(error).__name__}: {error}"[:500]


def _utf8(text: str) -> str:
    """For Parquet, which takes UTF-8 alone, where the name of a file may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def shard_of(rows: Iterator[tuple[str, Image | str, Detections | None]]) -> bytes:
    """A Parquet file with a row a picture: image, width, height, boxes (xyxy in pixels), scores, labels (category ids), names,
    and error, the reason why the picture could not be read (then width and height are null)."""
    pa, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    text, whole, numbers = pa.string(), pa.int32(), pa.list_(pa.float32())
    columns = {"image": text, "width": whole, "height": whole, "boxes": pa.list_(numbers), "scores": numbers}
    columns |= {"labels": pa.list_(pa.int64()), "names": pa.list_(text), "error": text}
    written = []
    for name, picture, found in rows:
        row: dict[str, Any] = {"image": _utf8(name), "boxes": [], "scores": [], "labels": [], "names": []}
        if isinstance(picture, str) or found is None:
            row["error"] = _utf8(str(picture))
        else:
            values = (*picture.size, found.boxes.tolist(), found.scores.tolist(), found.labels.tolist())
            row |= dict(zip(("width", "height", "boxes", "scores", "labels"), values, strict=True))
            row["names"] = [found.names.get(label, str(label)) for label in row["labels"]]
        written.append(row)
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(written, schema=pa.schema(columns)), buffer)
    return buffer.getvalue()


def read_shards(path: str | Path) -> list[dict[str, Any]]:
    """COCO results, as `Detections.to_coco` has them, of one shard or of a folder of them; the path of a picture is its id.

    Raises:
        DataError: there is none, or it is of another kind.
        BackendError: pyarrow is not installed.
    """
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    images = 0
    for file in files:
        with open_regular(file) as opened:
            try:
                for row in _table(opened.read(), "image", "boxes", "scores", "labels", "names", "error").to_pylist():
                    images += 1
                    if row["error"] is not None:
                        failures.append(row["error"])
                    found = Detections(
                        np.array(row["boxes"], np.float32).reshape(-1, 4),
                        np.array(row["scores"], np.float32),
                        np.array(row["labels"], np.int64),
                        dict(zip(row["labels"], row["names"], strict=True)),
                        image_id=row["image"],
                    )
                    rows += found.to_coco()
            except (ValueError, TypeError, OSError) as error:  # pyarrow's own are such
                reason = str(error)[:200]
                raise DataError(
                    f"{file}: not detections in Parquet ({reason})", "name what `predict --ray` wrote"
                ) from None
    if failures:
        logging.getLogger(__name__).warning(
            "%s: %d of %d images could not be read and count as images without detections; the first: %s",
            path,
            len(failures),
            images,
            failures[0],
        )
    return rows


def _table(content: bytes, *columns: str) -> Any:
    """Columns of a Parquet file, read in this thread alone: those of pyarrow may abort a process that ends."""
    pa, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    return parquet.read_table(pa.BufferReader(content), columns=list(columns), use_threads=False, pre_buffer=False)


def _summary(files: _Files, names: Sequence[str], skipped: int) -> RayPredictions:
    images = objects = failures = 0
    unreadable: dict[str, str] = {}
    for name in names:
        table = _table(files.read(name), "image", "scores", "error")
        images += len(table)
        objects += len(table["scores"].combine_chunks().flatten())
        bad = [row for row in table.drop(["scores"]).to_pylist() if row["error"] is not None]
        failures += len(bad)
        unreadable |= {row["image"]: row["error"] for row in bad[: 100 - len(unreadable)]}
    if failures == images:
        reason = next(iter(unreadable.values()), "")
        raise DataError(
            f"none of {images} images could be read; the first: {reason}", "remove the output, and try again"
        )
    return RayPredictions(files.root.removeprefix("file://"), images, objects, skipped, unreadable, failures)


def _import(name: str) -> Any:
    return import_extra(name, "ray")


def _loading() -> Any:
    """By name: what loads checkpoints lies above this room, and is torch's."""
    return import_module("paqdetr.loading")
