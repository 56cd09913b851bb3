"""The files a verb is going to write: looked at before it works for hours, and written at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paqdetr.errors import ConfigError


class OutputFiles:
    """What a verb writes, by the name of the option that says where.

    Args:
        command: the verb, as in "paqdetr eval"; only its own files of earlier calls are replaced.
        overwrite: any file is replaced.
        paths: where; None for an option that was not given. `results_out` is for COCO results.

    Raises:
        ConfigError: one cannot be written or would replace something else, or two are one.
    """

    def __init__(self, command: str, *, overwrite: bool = False, **paths: Path | None) -> None:
        from paqdetr.outputs import RESULTS, require_replaceable

        self._paths = {name: path for name, path in paths.items() if path is not None}
        self._makers = {name: RESULTS if name == "results_out" else command for name in paths}
        self._overwrite = overwrite
        taken: dict[Path, str] = {}
        for name, path in self._paths.items():
            option = f"--{name.replace('_', '-')}"
            other = taken.setdefault(path.resolve(), f"{option} {path}")
            if other != f"{option} {path}":
                raise ConfigError(f"{option} {path}: the same file as {other}", "name two files")
            try:
                require_replaceable(path, self._makers[name], overwrite=overwrite)
            except ConfigError as error:
                raise ConfigError(f"{option} {error.message}", error.remedy) from None

    def write(self, name: str, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Write a json file; nothing if its option was not given.

        Raises:
            StorageError: it cannot be written.
        """
        from paqdetr.outputs import write_json

        if name in self._paths:
            write_json(self._paths[name], content, maker=self._makers[name], overwrite=self._overwrite)
