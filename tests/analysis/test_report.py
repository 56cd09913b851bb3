"""The page and its folder: one file, nothing of the data executed, its size bounded, written whole or not at all."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr.analysis.analyze import _labels
from paqdetr.errors import ConfigError, StorageError
from paqdetr.report import plots
from paqdetr.report.page import Chapter, Heading, render, require_report_place, write_folder, written
from paqdetr.report.section import Column, Figure, Picture, Section, Slides, Table

EVIL = "</script><script>alert(1)</script>"
HEADING = Heading("A report", ("one",), (("Data", "somewhere"),))


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def a_figure(name: str = "curve") -> Figure:
    axes = plots.new_axes()
    plots.line(axes, [0, 1], [0, 1], label=EVIL)
    plots.legend(axes)
    data = {"x": np.arange(3), "y": [float("nan"), np.float32(0.5)]}
    return Figure(name, f"A curve of {EVIL}.", plots.to_svg(axes), data)


def a_section(key: str = "all") -> Section:
    table = Table(
        "classes",
        "By class.",
        (Column("class", "class", "text"), Column("n", "n", "integer"), Column("ap", "AP"), Column("share", "share", "percent")),
        ({"class": EVIL, "n": 12345, "ap": 0.12345, "share": 0.5}, {"class": "cat", "n": 1, "ap": None, "share": float("nan")}),
    )  # fmt: skip
    slides = Slides("layers", "Layer by layer.", ("layer 1", "layer 2"), (noise(1), noise(2)), {"k": [1, 2]})
    return Section(
        key, "Everything", f"Lead {EVIL}", (a_figure(), table, slides, Picture("photo", "A photo.", noise(3)))
    )


def test_two_models_never_share_a_label() -> None:
    """What is kept by label would be lost."""
    detectors: Any = [SimpleNamespace(name="dino")] * 2
    assert _labels(["a/one", "a/two"], detectors) == ["dino (a/one)", "dino (a/two)"]
    assert _labels(["x/run/best", "y/run/best"], detectors) == ["dino (run/best) A", "dino (run/best) B"]
    assert _labels(["a/one"], detectors[:1]) == ["dino"]


class Tags(HTMLParser):
    """Every start tag, and the ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else_and_executes_nothing_of_the_data() -> None:
    page = render(HEADING, [Chapter((a_section(),))])
    tags = Tags(page).tags
    sources = [
        a.get("src") or a.get("href") or "" for tag, a in tags if tag in ("img", "script", "link", "image", "use", "a")
    ]
    assert all(source.startswith(("data:", "#")) or not source for source in sources)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert sum(tag == "script" for tag, _ in tags) == 1  # our own
    assert "alert(1)" in page  # shown as text
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_ids_are_unique_and_every_picture_has_words() -> None:
    heading = Heading("Two", ("one", "two"), ())
    page = render(heading, [Chapter((a_section(), a_section()))])
    tags = Tags(page).tags
    ids = [a["id"] for _, a in tags if a.get("id")]
    assert len(ids) == len(set(ids))
    images = [a for tag, a in tags if tag == "img"]
    assert len(images) == 8 and all(a.get("alt") for a in images)
    assert [a["alt"] for a in images if a["alt"].startswith("Layer by layer")][:2] == [
        "Layer by layer. \N{EN DASH} layer 1",
        "Layer by layer. \N{EN DASH} layer 2",
    ]
    assert sum(tag == "input" and bool(a.get("aria-label")) for tag, a in tags) == 2


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("figure", 0.12345, "0.123"),
        ("figure", 1234.5, "1234"),
        ("figure", -0.0004, "0.000"),
        ("figure", None, "\N{EN DASH}"),
        ("figure", float("nan"), "\N{EN DASH}"),
        ("difference", 0.0126, "+0.013"),
        ("difference", -0.25, "-0.250"),
        ("difference", -0.0004, "0.000"),
        ("amount", 13.0, "13.0"),
        ("amount", 169.23, "169.2"),
        ("percent", 0.256, "25.6 %"),
        ("integer", 12345, "12\N{NARROW NO-BREAK SPACE}345"),
        ("text", "cat", "cat"),
    ],
)
def test_values_are_written_by_kind(kind: str, value: object, text: str) -> None:
    assert written(value, Column("x", "x", kind)) == text  # type: ignore[arg-type]


def test_names_that_would_clash_or_leave_the_folder_are_refused() -> None:
    with pytest.raises(ValueError, match="two parts"):
        render(HEADING, [Chapter((Section("a", "A", "", (a_figure(), a_figure())),))])
    with pytest.raises(ValueError, match="letters, digits"):
        render(HEADING, [Chapter((Section("a", "A", "", (a_figure("../x"),)),))])


def test_pictures_are_made_smaller_and_kept_whole() -> None:
    page = render(HEADING, [Chapter((Section("a", "A", "", (Picture("photo", "A photo.", noise(0, 900)),)),))])
    uri = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(uri[0]))) as picture:
        assert len(uri) == 1 and max(picture.size) == 640


# ------------------------------------------------------------------------------------------------- folder


def test_the_folder_holds_the_page_and_the_numbers_behind_every_part(tmp_path: Path) -> None:
    chapters = [Chapter((a_section(), a_section()))]
    write_folder(tmp_path / "report", "<html>", chapters)
    found = {str(p.relative_to(tmp_path / "report")) for p in (tmp_path / "report").rglob("*.json")}
    assert found == {f"data/{where}{n}.json" for where in ("", "against/") for n in ("curve", "classes", "layers")}
    curve = json.loads((tmp_path / "report/data/curve.json").read_text())
    assert curve["data"] == {"x": [0, 1, 2], "y": [None, 0.5]}
    rows = json.loads((tmp_path / "report/data/classes.json").read_text())["data"]["rows"]
    assert rows[0]["n"] == 12345 and rows[1]["share"] is None


def test_an_earlier_report_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    page = render(HEADING, [Chapter((a_section(),))])
    write_folder(tmp_path / "report", page, [Chapter((a_section(),))])
    write_folder(tmp_path / "report", page, [])
    assert [p.name for p in tmp_path.iterdir()] == ["report"]  # nothing is left beside it
    assert not list((tmp_path / "report/data").iterdir())
    (tmp_path / "report/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        write_folder(tmp_path / "report", page, [])
    assert (tmp_path / "report/notes.txt").exists()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path):
        with pytest.raises(ConfigError):
            require_report_place(wrong)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = render(HEADING, [Chapter((a_section(),))])
    write_folder(tmp_path / "report", page, [])
    before = (tmp_path / "report/index.html").read_text()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(StorageError, match="No space left"):
            write_folder(tmp_path / "report", page, [Chapter((a_section(),))])
    assert (tmp_path / "report/index.html").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
