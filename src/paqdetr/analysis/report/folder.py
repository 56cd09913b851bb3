"""A report's folder: index.html and data/, there whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from paqdetr.analysis.report.page import GENERATOR, Chapter, data_file
from paqdetr.analysis.section import Table
from paqdetr.outputs import made_by, require_free, whole_folder
from paqdetr.serialize import plain


def require_report_place(output: Path) -> None:
    """Raise ConfigError unless the folder is new, empty, or an earlier report, which is replaced."""
    require_free(output, lambda file: _is_part(file, output))


def _is_part(file: Path, report: Path) -> bool:
    """Whether a report has such a file: the page, or numbers behind one of its parts."""
    name = file.relative_to(report).as_posix()
    if name == "index.html":
        return made_by(file) == GENERATOR
    if name in ("data", "data/against"):  # empty
        return True
    if not re.fullmatch(r"data/(against/)?\w+\.json", name):
        return False
    with file.open("rb") as opened:
        return opened.read(20).startswith(b'{\n "caption": ')


def write_folder(output: Path, page: str, chapters: Sequence[Chapter]) -> None:
    """Write page and numbers in place of `output`.

    Raises:
        ConfigError: as `require_report_place`.
        StorageError: it cannot be written; what was there before still is.
    """
    require_report_place(output)
    with whole_folder(output, replace=True) as new:
        (new / "data").mkdir()
        (new / "index.html").write_text(page, encoding="utf-8")
        for chapter in chapters:
            for place, section in enumerate(chapter.sections):
                for part in section.parts:
                    name = data_file(part, place)
                    if name is None:
                        continue
                    (new / name).parent.mkdir(exist_ok=True)
                    data = {"rows": list(part.rows)} if isinstance(part, Table) else part.data
                    text = json.dumps({"caption": part.caption, "data": plain(data)}, indent=1)
                    (new / name).write_text(text, encoding="utf-8")
