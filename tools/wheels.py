"""Asks pip whether every dependency has a wheel for each platform and Python, and writes the answers; nothing is installed.

    python tools/wheels.py --json docs/results/wheels.json

Dependencies of dependencies are not asked about: their markers are those of the interpreter that runs pip. What is printed as
there was resolved, not run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = {
    "Linux x86-64": ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"),
    "Linux arm64": (
        "manylinux_2_28_aarch64",
        "manylinux_2_27_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    ),
    "macOS arm64": ("macosx_14_0_arm64", "macosx_12_0_arm64", "macosx_11_0_arm64", "macosx_11_0_universal2"),
    "Windows x86-64": ("win_amd64",),
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def main() -> None:
    """Ask for every pair, print a table and write the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="what was found, added to what is there")
    parser.add_argument("--only", default="", help="a part of the platform's name")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [need.partition(";")[0].strip() for need in project["dependencies"]]
    known = json.loads(arguments.json.read_text(encoding="utf-8"))["found"] if arguments.json.exists() else {}
    for platform in (name for name in PLATFORMS if arguments.only in name):
        for python in PYTHONS:
            found = ask(wanted, PLATFORMS[platform], python)
            known.setdefault(platform, {})[python] = found
            missing = [name for name, version in found.items() if version is None]
            print(f"{platform}, Python {python}: {len(found) - len(missing)} of {len(found)}", *missing, flush=True)
            content = {
                "command": "python tools/wheels.py --json docs/results/wheels.json",
                "date": datetime.now(UTC).date().isoformat(),
                "requirements": wanted,
                "found": known,
            }
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def ask(requirements: list[str], tags: tuple[str, ...], python: str) -> dict[str, str | None]:
    """The version of each that pip would install from a wheel; None where there is none."""
    names = [_name(requirement) for requirement in requirements]
    report = resolve(requirements, tags, python)
    if report is not None:
        versions = {_name(row["metadata"]["name"]): row["metadata"]["version"] for row in report["install"]}
        return {name: versions.get(name) for name in names}
    if len(requirements) == 1:
        return {names[0]: None}
    half = len(requirements) // 2
    return ask(requirements[:half], tags, python) | ask(requirements[half:], tags, python)


def resolve(requirements: list[str], tags: tuple[str, ...], python: str) -> dict[str, Any] | None:
    """pip's report, or None where one of them has no wheel."""
    with tempfile.TemporaryDirectory() as folder:
        target = [part for tag in tags for part in ("--platform", tag)]
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"),
            *(
                "--only-binary=:all:",
                "--python-version",
                python,
                "--target",
                folder,
                "--report",
                f"{folder}/report.json",
            ),
            *target,
            *requirements,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if "No matching distribution" not in done.stderr:  # no answer: a network that fails, say
                sys.exit(done.stderr)
            return None
        return json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


if __name__ == "__main__":
    main()
