"""Which images a run was trained on: noted when its training begins, so that it does not count as one of other images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paqdetr.checkpoint import write_whole
from paqdetr.errors import ConfigError
from paqdetr.files import MAX_SIDE_BYTES, read_json
from paqdetr.study.runs import Places, PlannedRun


def note_source(planned: PlannedRun, places: Places) -> None:
    """Keep what a training that is about to begin is trained on. One that has begun keeps what it began with."""
    if places.run(planned.key).config_file.is_file():
        return
    file = places.source(planned.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(planned.source) + "\n"
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def read_source(file: Path) -> dict[str, Any] | None:
    """What was noted; None of a run from before such notes were made, or one that was put here by hand."""
    if not file.exists():
        return None
    content = read_json(file, limit=MAX_SIDE_BYTES, error=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: holds a {type(content).__name__}, expected an object",
            "remove it if the run beside it is to be trusted",
        )
    return content


def require_same_source(planned: PlannedRun, found: Mapping[str, Any] | None, where: Path) -> None:
    """Raise ConfigError if a run that is there, or its result, is known to be of other images than are planned.

    Args:
        found: as noted; None if nothing is known.
    """
    for key, value in planned.source.items():
        if found is not None and found.get(key) != value:
            raise ConfigError(
                f"{where}: was made of data with {key}={found.get(key)!r}, the study now says {value!r}",
                "give changed data a new name among the data sets, or choose another --output; "
                "with folds, the order of the seeds says which part is held out",
            )
