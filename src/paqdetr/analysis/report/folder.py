"""A report's folder: index.html and data/, there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.analysis.report.page import GENERATOR, Chapter, data_file
from paqdetr.analysis.section import Table
from paqdetr.errors import ConfigError, StorageError


def require_free(output: Path) -> None:
    """Raise ConfigError unless the folder is new, empty, or an earlier report, which is replaced."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: a file is in the way", "choose another --output")
    if output.is_dir() and any(output.iterdir()) and not _is_report(output):
        raise ConfigError(
            f"{output}: the folder holds other files and no report",
            "choose another --output, or an empty folder",
        )


def _is_report(folder: Path) -> bool:
    page = folder / "index.html"
    if not page.is_file() or {entry.name for entry in folder.iterdir()} - {"index.html", "data"}:
        return False
    with page.open(encoding="utf-8", errors="replace") as file:
        return f'content="{GENERATOR}' in file.read(2000)


def write_folder(output: Path, page: str, chapters: Sequence[Chapter]) -> None:
    """Write page and numbers beside `output`, then move them there.

    Raises:
        ConfigError: as `require_free`.
        StorageError: it cannot be written; what was there before still is.
    """
    require_free(output)
    beside = output.resolve()
    new = beside.with_name(f".{beside.name}.{os.getpid()}.tmp")
    old = beside.with_name(f".{beside.name}.{os.getpid()}.old")
    try:
        (new / "data").mkdir(parents=True)
        (new / "index.html").write_text(page, encoding="utf-8")
        for chapter in chapters:
            for place, section in enumerate(chapter.sections):
                for part in section.parts:
                    name = data_file(part, place)
                    if name is None:
                        continue
                    (new / name).parent.mkdir(exist_ok=True)
                    data = {"rows": list(part.rows)} if isinstance(part, Table) else part.data
                    text = json.dumps({"caption": part.caption, "data": _plain(data)}, indent=1)
                    (new / name).write_text(text, encoding="utf-8")
        if beside.exists():
            beside.rename(old)
        try:
            new.rename(beside)
        except OSError:
            if old.exists():
                old.rename(beside)
            raise
    except OSError as error:
        raise StorageError(
            f"{output}: cannot be written ({error.strerror or error})",
            "check the disk's space and the folder's permissions",
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if beside.exists():
            shutil.rmtree(old, ignore_errors=True)


def _plain(value: Any) -> Any:
    """As json can have it: arrays are lists, what is not a finite number is null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
