"""Plants small mistakes in the package, one at a time, and reports which tests catch them.

    python tools/mutants.py check                                       does every mutant of mutants.txt fit the sources?
    python tools/mutants.py run --json OUT [--tier unit|all] [--only NUMBER ...] [--near] [--checkout FOLDER]

A mutant is a snippet that stands exactly once in the package, and what replaces it; it is found wherever the file has gone and
however it is wrapped, so that the same list serves before and after code is moved. Tests of the file's name run first, then
those of its room, then the tier's others, until one fails. The list covers paq, losses, models, data, evaluation and training:
comparisons, arithmetic, indices, constants, dropped terms.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOMS = ("paq", "losses", "models", "data", "engine", "training", "evaluation", "")
TIERS = {"unit": "not integration and not slow and not readme", "integration": "integration and not slow"}
# Seconds for a step of the search. A mutant that makes a test hang is caught too.
TIMEOUT = 1200

# One line each: what stands there | what the mistake puts in its place.
MUTANTS = [
    tuple(line.split(" | "))
    for line in (TOOLS / "mutants.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def find(old: str, source: Path) -> tuple[Path, re.Match[str]] | None:
    """The file that has the snippet, and where; None if it does not stand exactly once in the rooms."""
    pattern = re.compile(r"\s*".join(re.escape(token) for token in re.findall(r"\w+|[^\w\s]", old)))
    found = [
        (path, match)
        for room in ROOMS
        for path in sorted((source / room).glob("**/*.py" if room else "*.py"))
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    return found[0] if len(found) == 1 else None


def steps(path: Path, tests: Path, *, near: bool) -> list[list[str]]:
    """Arguments of pytest: tests that are named like the file, then those of its room, then all, unless only near ones count."""
    named = sorted(str(test) for test in tests.rglob(f"test_{path.stem}*.py"))
    room = tests / path.parent.name
    return [each for each in (named, [str(room)] if room.is_dir() else [], [] if near else [str(tests)]) if each]


def caught(source: Path, checkout: Path, path: Path, marker: str, *, near: bool) -> str | None:
    """The first test that fails on the mutated source; None if all pass."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    for tests in steps(path, checkout / "tests", near=near):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, *tests]
        try:
            done = subprocess.run(
                command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return "no test ended"
        if done.returncode not in (0, 5):  # 5: none of this tier
            lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return lines[0].partition(" - ")[0] if lines else done.stdout[-300:]
    return None


def plant(number: int, checkout: Path, tier: str, *, near: bool) -> dict[str, Any]:
    """One mutant's row of the result."""
    old, new = MUTANTS[number - 1]
    package = checkout / "src" / "paqdetr"
    row: dict[str, Any] = {"mutant": number, "old": old, "new": new}
    found = find(old, package)
    if found is None:
        return row | {"file": None}
    path, match = found
    row["file"] = str(path.relative_to(package))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "paqdetr"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        text = path.read_text(encoding="utf-8")
        mutated = text[: match.start()] + new + text[match.end() :]
        (copy / path.relative_to(package)).write_text(mutated, encoding="utf-8")
        for name in ("unit", "integration") if tier == "all" else ("unit",):
            row[name] = caught(Path(folder), checkout, path, TIERS[name], near=near)
            if row[name] is not None:
                break
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "check"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tier", choices=["unit", "all"], default="all")
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--near", action="store_true", help="leave out tests of other rooms: minutes instead of hours")
    parser.add_argument("--checkout", type=Path, default=TOOLS.parent, help="of another commit")
    options = parser.parse_args()
    if options.verb == "check":
        package = options.checkout.resolve() / "src" / "paqdetr"
        lost = [(n, old) for n, (old, _) in enumerate(MUTANTS, start=1) if find(old, package) is None]
        sys.exit("\n".join(f"{n}: not exactly once: {old}" for n, old in lost) if lost else 0)
    rows = []
    for number in options.only or range(1, len(MUTANTS) + 1):
        rows.append(plant(number, options.checkout.resolve(), options.tier, near=options.near))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    unit = sum(row.get("unit") is not None for row in rows)
    integration = sum(row.get("integration") is not None for row in rows)
    planted = sum(row["file"] is not None for row in rows)
    print(f"{planted} mutants planted: {unit} caught by unit tests, {integration} more by integration tests")


if __name__ == "__main__":
    main()
