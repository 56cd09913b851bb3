"""Where a verb is going to write, checked before it works for hours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from paqdetr.errors import ConfigError


def require_writable(**options: Path | None) -> None:
    """Check files that are written at the end, by the name of their option; None is an option that was not given.

    Raises:
        ConfigError: one is a folder, cannot be written, lies below a file or in a folder that cannot be written, or two are one.
    """
    taken: dict[Path, str] = {}
    for name, path in options.items():
        if path is None:
            continue
        said = f"--{name.replace('_', '-')} {path}"
        if path.is_dir():
            raise ConfigError(f"{said}: a folder, where a file is to be written", "name a file")
        other = taken.setdefault(path.resolve(), said)
        if other != said:
            raise ConfigError(f"{said}: the same file as {other}", "name two files")
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"{said}: {folder} is a file, not a folder", "choose another place")
        wanted = path if path.exists() else folder
        if not os.access(wanted, os.W_OK):
            raise ConfigError(f"{said}: {wanted} may not be written", "choose another place")


def write_json(path: Path | None, content: Any) -> None:
    """Write what a verb has found; nothing for None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        indent = 1 if isinstance(content, dict) else None
        path.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
