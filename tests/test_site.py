"""The site that `make docs` builds: no dead links, nothing from the network, every public name, and search from a disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import paqdetr
import paqdetr.paq

REPO = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.integration


def build(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is made of: it is built inside the project's folder, so of a copy."""
    pytest.importorskip("zensical")
    copy = tmp_path_factory.mktemp("project")
    for name in ("docs", "src"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copyfile(REPO / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def site(project: Path) -> Path:
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "build" / "site"


@pytest.fixture
def phone(browser: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page without network, as narrow as a phone, and what goes wrong on it."""
    context = browser.new_context(offline=True, viewport={"width": 390, "height": 844})
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"{request.url} failed"))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    yield page, wrong
    context.close()


def test_pages_open_from_a_disk(site: Path, phone: tuple[Any, list[str]]) -> None:
    page, wrong = phone
    pages = [file for file in sorted(site.rglob("*.html")) if file.name != "404.html"]  # that one is for servers
    assert len(pages) > len(list((REPO / "docs").glob("*.md")))
    for file in pages:
        page.goto(file.as_uri(), wait_until="load")
        assert not wrong, f"{file.name}: {wrong}"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{file.name} is wider than the screen"
        paragraphs = page.eval_on_selector_all("article p", "all => all.map(one => one.innerText)")
        assert not [text for text in paragraphs if re.search(r"(?m)^- ", text)], (
            f"{file.name}: a list needs an empty line before it"
        )
        # What zensical's own check leaves out: files beside the pages, and pages that are included in others.
        for link in page.eval_on_selector_all("a[href], img[src]", "all => all.map(one => one.href ?? one.src)"):
            if link.startswith("file:"):
                place = Path(re.sub("[?#].*", "", link).removeprefix("file://"))
                assert place.is_file(), f"{file.name}: {link}"


def test_search_works_from_a_disk(site: Path, phone: tuple[Any, list[str]]) -> None:
    page, wrong = phone
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("Control+k")
    page.locator("input[placeholder=Search]").fill("checkpointing")
    page.get_by_text("Activation checkpointing").first.wait_for(timeout=20_000)
    assert not wrong


def test_every_public_name_is_described(site: Path) -> None:
    headings = re.findall(r"<h3 .*?</h3>", (site / "api.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    names = [re.findall(r"\w+", re.sub("<[^>]*>", "", heading))[0] for heading in headings]
    assert sorted(names) == sorted({*paqdetr.__all__, *paqdetr.paq.__all__})


def test_a_dead_link_is_noticed(project: Path, site: Path) -> None:
    page = project / "docs" / "data.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[gone](gone.md)\n", encoding="utf-8")
    done = build(project)
    assert done.returncode != 0 and "data.md" in done.stdout + done.stderr
