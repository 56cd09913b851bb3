"""Links of the documentation lead somewhere, and the commands of its guides are ones that the program takes.

What the commands do is another matter: `make readme` runs the walk through fine-tuning.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from paqdetr.cli import app
from paqdetr.config import list_configs, load_config, parse_overrides

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*(REPO / "docs").rglob("*.md"), REPO / "README.md"])
GUIDES = [page for page in PAGES if page.parent in (REPO, REPO / "docs")]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """What a link may have behind its #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """The `paqdetr ...` lines of a guide's blocks: without what starts several processes and what is in [brackets], and of
    several|choices the first."""
    found = re.findall(r"^```(?:sh)?\n(.*?)^```$", text, flags=re.M | re.S)
    lines = [re.sub(r"^(\$ |torchrun .*? -m )", "", line) for block in found for line in block.splitlines()]
    plain = [re.sub(r" \[.*?\]|\|[^|\s]+", "", line) for line in lines if line.startswith("paqdetr ")]
    return [shlex.split(line, comments=True)[1:] for line in plain]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the program makes of a command's words."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    return command.make_context("paqdetr", list(words)).params


def test_links_lead_somewhere() -> None:
    lost = []
    for page in PAGES:
        for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", text_of(page)):
            if "://" in target:
                continue
            file = (page.parent / target).resolve() if target else page
            if not file.exists() or (anchor and anchor not in anchors(text_of(file))):
                lost.append(f"{page.relative_to(REPO)}: {target}#{anchor}")
    assert lost == []


def test_index_names_every_page() -> None:
    index = text_of(REPO / "docs" / "README.md")
    site = text_of(REPO / "mkdocs.yml")
    docs = REPO / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")}
    assert not {name for name in pages if not re.search(rf"^ *- {re.escape(name)}$", site, flags=re.MULTILINE)}
    assert not {
        name for name in pages - {"README.md"} if f"]({name})" not in index and not name.startswith("decisions/0")
    }


@pytest.mark.parametrize("page", [page for page in GUIDES if commands(text_of(page))], ids=lambda page: page.stem)
def test_commands_are_understood(page: Path) -> None:
    for words in commands(text_of(page)):
        given = parsed(words)
        model, settings = given.get("model"), given.get("settings")
        if isinstance(model, str):
            source = model if model in list_configs() else "dino_r50"
            assert source == model or model == "MODEL", shlex.join(words)
            load_config(source, parse_overrides(settings or []))


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["train", "dino_r50", "--data", "DIR", "--output", "RUN", "--epochs", "3"])


def test_citation_is_what_the_format_asks_for() -> None:
    """Citation File Format 1.2.0: keys that are required, and what GitHub shows."""
    cited = yaml.safe_load(text_of(REPO / "CITATION.cff"))
    project = tomllib.loads(text_of(REPO / "pyproject.toml"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    assert cited["license"] == project["license"] and cited["keywords"] == project["keywords"]
    assert cited["authors"] == project["authors"]
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"].endswith("2603.06917") and paper["title"] in " ".join(text_of(REPO / "README.md").split())


def test_kept_results_are_explained() -> None:
    """No json lies beside docs/results/README.md without a word on it."""
    folder = REPO / "docs" / "results"
    page = text_of(folder / "README.md")
    loose = [*folder.glob("*.json"), *folder.glob("paq_cost/*.json")]
    assert loose
    assert not {file.name for file in loose if file.name not in page}


def test_the_campaign_lost_nothing() -> None:
    kept = json.loads((REPO / "docs" / "results" / "fault_campaign.json").read_text(encoding="utf-8"))
    assert len(kept["rows"]) == 6 and not any(row["lost"] for row in kept["rows"])
