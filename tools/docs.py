"""Write everything in the documentation that is generated: from settings, kept results and reports of benchmarks.

python tools/docs.py                                      # write all tables and files anew (`make docs`)
python tools/docs.py --check                              # write nothing; exit 1 if something would change
python tools/docs.py take-run NAME RUN "COMMANDS"         # first take in a finished run with its test.json
python tools/docs.py take-study DIR                       # first take in the folder that `paqdetr study --output DIR` has filled
python tools/docs.py plan-studies DATA_ROOT               # first work out what the studies of studies/ would take
python tools/docs.py count                                # first count parameters and FLOPs of every model: minutes

A table stands in a page between `<!-- KIND WORDS -->` and `<!-- end of KIND WORDS -->` and is made by the function of that kind,
called with the words. A new kind is a function here or beside it, and a line in TABLES.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import fault_campaign
import jupytext
import performance_tables
import run_tables
import settings_tables
import study_tables
import yaml

import paqdetr
from paqdetr.models import list_models
from paqdetr.models.cost import model_cost

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "docs" / "results"
NOTEBOOKS = REPO / "docs" / "notebooks"
COSTS = Path(paqdetr.__file__).parent / "configs" / "costs.yaml"
_PLACE = re.compile(r"<!-- (\w+)((?: \S+)*) -->\n(.*?)\n?<!-- end of \1\2 -->", re.DOTALL)
_START = re.compile(r"<!-- (?!end of)(\w+(?: \S+)*) -->")

sys.path.append(str(REPO / "benchmarks"))
import paq_cost  # noqa: E402
import peers  # noqa: E402
import plugin_digits  # noqa: E402


def _kept(file: str) -> dict:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def gradients(*models: str) -> str:
    """What DDP sends in a step of training: the gradients in float32, of which a ring sends nearly twice the bytes."""
    costs = yaml.safe_load(COSTS.read_text(encoding="utf-8"))
    rows = ["| model | MB | ms at 10 Gbit/s | at 100 Gbit/s | at 400 Gbit/s |", "|---|---:|---:|---:|---:|"]
    for name in models:
        size = 4 * costs[name]["trainable"]
        times = [2 * 8 * size / (gigabits * 1e9) * 1e3 for gigabits in (10, 100, 400)]
        shown = [f"{time:.0f}" if time >= 10 else f"{time:.1f}" for time in times]
        rows.append(f"| {' | '.join([name, f'{size / 1e6:.0f}', *shown])} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[..., str]] = {
    "settings": settings_tables.table,
    "study": study_tables.table,
    "performance": performance_tables.table,
    "gradients": gradients,
    "results": run_tables.table,
    "headline": run_tables.headline,
    "peers": lambda folder: peers.table(peers.collect(RESULTS / folder)),
    "paq_cost": lambda name: paq_cost.markdown(_kept(f"paq_cost/{name}.json")),
    "plugin_digits": lambda: plugin_digits.markdown(_kept("plugin_digits.json")),
    "campaign": lambda: fault_campaign.table(_kept("fault_campaign.json")).rstrip(),
}


def write(page: str, name: str = "page") -> str:
    """The page with every table made anew.

    Raises:
        SystemExit: a table is of no known kind, has no end, or what it is made from is missing.
    """
    ended = {match[1] + match[2] for match in _PLACE.finditer(page)}
    for place in _START.findall(page):
        if place.split()[0] not in TABLES:
            raise SystemExit(f"{name}: <!-- {place} -->: no such kind of table: {', '.join(TABLES)}")
        if place not in ended:
            raise SystemExit(f"{name}: <!-- {place} --> has no <!-- end of {place} -->")

    def made(match: re.Match[str]) -> str:
        kind, words = match[1], match[2]
        return f"<!-- {kind}{words} -->\n{TABLES[kind](*words.split())}\n<!-- end of {kind}{words} -->"

    return _PLACE.sub(made, page)


def generated() -> dict[Path, str]:
    """Every file that is generated, or holds a table that is -> its content made anew."""
    pages = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
    found = {page: write(page.read_text(encoding="utf-8"), page.name) for page in pages}
    found |= {script.with_suffix(".md"): notebook_page(script) for script in sorted(NOTEBOOKS.glob("*.py"))}
    return found | {run_tables.MEASURED: run_tables.measured(), run_tables.BADGES: run_tables.badges()}


def notebook_page(script: Path) -> str:
    """The notebook as a page: its text, and its code in blocks."""
    notebook = jupytext.read(script, fmt="py:percent")
    cells = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```" for cell in notebook.cells
    ]
    title, *rest = cells
    note = (
        f"*A notebook: [{script.name}]({script.name}). Open it in Jupyter (with jupytext) or VS Code, or make an .ipynb of it: "
        f"`jupytext --to ipynb {script.name}`. It runs as it stands, on a CPU.*"
    )
    return "\n\n".join([title, note, *rest]) + "\n"


def count_models() -> None:
    """Write configs/costs.yaml, which `paqdetr models` shows; tests/models/test_cost.py notices if it is old."""
    costs = {name: model_cost(name) for name in list_models()}
    rows = {name: {"parameters": c.parameters, "trainable": c.trainable, "flops": c.flops} for name, c in costs.items()}
    head = "# Written by tools/docs.py: one image of 800 x 1333 pixels, a multiply-add counted once.\n"
    COSTS.write_text(head + yaml.safe_dump(rows), encoding="utf-8")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["take-run", name, run, commands]:
            run_tables.take_in(name, Path(run), commands)
        case ["take-study", folder]:
            study_tables.take_in(Path(folder))
        case ["plan-studies", root]:
            study_tables.make_plan(Path(root))
        case ["count"]:
            count_models()
        case [] | ["--check"]:
            pass
        case _:
            raise SystemExit(__doc__)
    check = arguments == ["--check"]
    changed = {
        file: text
        for file, text in generated().items()
        if not file.is_file() or file.read_text(encoding="utf-8") != text
    }
    for file, text in changed.items():
        print(file.relative_to(REPO), "is old: run `make docs`" if check else "is written anew")
        if not check:
            file.write_text(text, encoding="utf-8")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
