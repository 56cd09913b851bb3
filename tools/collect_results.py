"""Keep what a finished run reached, and write it into the table of the README and the list that `paqdetr models` shows.

python tools/collect_results.py NAME RUN "COMMANDS THAT MADE IT"     # take a run in
python tools/collect_results.py    # only write the table anew

RUN is a run's folder with a test.json beside its checkpoint (`paqdetr eval RUN --split test --json RUN/test.json`).
Kept are settings, figures and the log, not weights; every number of the tables is read from there.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "docs" / "results"
MEASURED = REPO / "src" / "paqdetr" / "configs" / "measured.yaml"
MARKERS = ("<!-- results -->", "<!-- end of results -->")


def take_in(name: str, run: Path, commands: str) -> None:
    """Copy what is worth keeping of a run to docs/results/NAME."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.yaml", "metrics.jsonl", "test.json"):
        shutil.copyfile(run / file, folder / file)
    (folder / "commands.txt").write_text(commands.strip() + "\n", encoding="utf-8")


def table() -> str:
    """Markdown rows of everything in docs/results."""
    lines = [
        "| data | model | input | test AP | AP50 | AP after NMS | training | peak memory | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(folder) for folder in sorted(RESULTS.iterdir()) if (folder / "test.json").is_file()]
    return "\n".join(lines)


def write_tables(*files: Path) -> None:
    """Put the table between the markers of each file."""
    start, end = MARKERS
    for file in files:
        text = file.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{file}: has no {start} ... {end}")
        file.write_text(pattern.sub(lambda _: f"{start}\n{table()}\n{end}", text), encoding="utf-8")


def measured() -> str:
    """YAML: model -> what it reached on the test split of which data."""
    rows: dict[str, list[dict[str, object]]] = {}
    for folder in sorted(RESULTS.iterdir()):
        if not (folder / "test.json").is_file():
            continue
        figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        row = {"data": folder.name, "AP": round(figures["AP"], 3), "AP50": round(figures["AP50"], 3)}
        rows.setdefault(_model_of(config["name"]), []).append(row)
    head = "# Written by tools/collect_results.py from docs/results: one seed each, on the test split.\n"
    return head + yaml.safe_dump(rows, sort_keys=True)


def _model_of(name: str) -> str:
    """The model that a recipe trains."""
    recipe = REPO / "src" / "paqdetr" / "configs" / "recipes" / f"{name}.yaml"
    return _model_of(yaml.safe_load(recipe.read_text(encoding="utf-8"))["base"]) if recipe.is_file() else name


def _row(folder: Path) -> str:
    figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(record for record in records if record["kind"] == "start")
    finished = next(record for record in records if record["kind"] == "finished")
    cells = [
        f"[{folder.name}](docs/results/{folder.name})",
        config["name"],
        str(config["image_size"]),
        f"{figures['AP']:.3f}",
        f"{figures['AP50']:.3f}",
        f"{figures['AP_nms']:.3f}",
        f"{finished['seconds'] / 60:.1f} min",
        f"{finished['peak_memory_gib']:.1f} GiB",
        f"{start['cores']} CPU cores, torch {start['torch'].split('+')[0]}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Take a run in if one is named, then write the tables."""
    if len(sys.argv) == 4:
        take_in(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    elif len(sys.argv) != 1:
        raise SystemExit(__doc__)
    write_tables(REPO / "README.md")
    MEASURED.write_text(measured(), encoding="utf-8")


if __name__ == "__main__":
    main()
