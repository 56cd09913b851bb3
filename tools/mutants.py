"""Plants small mistakes in the package, one at a time, and reports which tests catch them.

    python tools/mutants.py map --coverage FILE          once: which tests run which line (the whole suite, slowly)
    python tools/mutants.py run --coverage FILE --json OUT [--tier unit|all] [--only NUMBER ...]

A mutant is a snippet that stands exactly once in the package, and what replaces it; it is found wherever the file has gone,
so that the same list serves before and after code is moved. Only tests that run its first line are started, the unit tier's
first. `map` needs the package `coverage`. The list covers paq, losses, models, data, evaluation and training: comparisons,
arithmetic, indices, constants, dropped terms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SOURCE = REPO / "src" / "paqdetr"
# A mutant that makes a test hang is caught too.
TIMEOUT = 600
ROOMS = ("paq", "losses", "models", "data", "engine", "training", "evaluation")

# One line each: what stands there | what the mistake puts in its place.
MUTANTS = [
    tuple(line.split(" | "))
    for line in (REPO / "tools" / "mutants.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def find(old: str) -> tuple[Path, int]:
    """The file that has the snippet, and the number of its first line.

    Raises:
        SystemExit: it does not stand exactly once in the rooms.
    """
    found = [
        (path, number)
        for room in [*ROOMS, ""]
        for path in sorted((SOURCE / room).glob("*.py" if not room else "**/*.py"))
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if old in line
    ]
    if len(found) != 1:
        raise SystemExit(f"{old!r} stands {len(found)} times: mend tools/mutants.txt")
    return found[0]


def map_coverage(file: Path) -> None:
    """Run unit and integration tests under coverage, with the test's name as context."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "coveragerc"
        config.write_text(f"[run]\nsource = {SOURCE}\ndynamic_context = test_function\ndata_file = {file}\n")
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={config}", "-m", "pytest", "-q", "-m"]
        subprocess.run([*command, "not slow and not readme"], cwd=REPO, check=False)


def tests_of(file: Path, path: Path, line: int) -> list[str]:
    """Test files that run the line of the file, with the functions, as pytest takes them."""
    with sqlite3.connect(file) as store:
        rows = store.execute(
            "select context.context, line_bits.numbits from line_bits join file on file.id = line_bits.file_id"
            " join context on context.id = line_bits.context_id where file.path = ?",
            (str(path),),
        ).fetchall()
    names = {context for context, bits in rows if context and line // 8 < len(bits) and bits[line // 8] >> line % 8 & 1}
    return sorted(names)


def select(names: list[str]) -> list[str]:
    """`tests.paq.test_costs.test_x` and the like -> arguments of pytest."""
    chosen = []
    for name in names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            for start in range(end):
                path = REPO / "tests" / ("/".join(parts[start:end]) + ".py")
                if path.is_file():
                    chosen.append("::".join([str(path.relative_to(REPO)), *parts[end:]]))
                    break
            else:
                continue
            break
    return sorted(set(chosen))


def caught(source: Path, tests: list[str], marker: str) -> str | None:
    """The first test that fails on the mutated source; None if all pass."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PAQDETR_MUTANT": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, *tests]
    try:
        done = subprocess.run(
            command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return "no test ended"
    if done.returncode in (0, 5):  # 5: none of this tier
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].partition(" - ")[0] if lines else done.stdout[-300:]


def plant(number: int, coverage: Path, tier: str) -> dict[str, Any]:
    """One mutant's row of the result."""
    old, new = MUTANTS[number - 1]
    path, line = find(old)
    names = tests_of(coverage, path, line)
    tests = select(names)
    row: dict[str, Any] = {
        "mutant": number,
        "file": str(path.relative_to(SOURCE)),
        "old": old,
        "new": new,
        "tests": len(tests),
    }
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "paqdetr"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        mutated = copy / path.relative_to(SOURCE)
        mutated.write_text(mutated.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        unit = "not integration and not slow and not readme"
        row["unit"] = caught(Path(folder), tests, unit) if tests else None
        if row["unit"] is None and tier == "all":
            row["integration"] = caught(Path(folder), tests, "integration") if tests else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["map", "run", "check"])
    parser.add_argument("--coverage", type=Path, default=REPO / ".coverage-of-tests")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tier", choices=["unit", "all"], default="all")
    parser.add_argument("--only", type=int, nargs="*")
    options = parser.parse_args()
    for old, _ in MUTANTS:
        find(old)
    if options.verb == "map":
        map_coverage(options.coverage)
    if options.verb != "run":
        return
    rows = []
    for number in options.only or range(1, len(MUTANTS) + 1):
        rows.append(plant(number, options.coverage, options.tier))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    unit = sum(row["unit"] is not None for row in rows)
    integration = sum(row.get("integration") is not None for row in rows)
    print(f"{len(rows)} mutants: {unit} caught by unit tests, {integration} more by integration tests")


if __name__ == "__main__":
    main()
