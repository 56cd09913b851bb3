"""The commands and Python blocks of the README and of docs/start.md, and the walk through fine-tuning, run as they stand, in
order, in an empty folder; only the amount of work is cut.

`make readme` runs this. Trainings get a few steps on small pictures, the data set a few images: what is tested is that the
words work.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paqdetr import evaluate

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
START = (REPO / "docs" / "start.md").read_text(encoding="utf-8")
FINETUNING = (REPO / "docs" / "finetuning.md").read_text(encoding="utf-8")
FEWER_STEPS = ["max_steps=3", "image_size=96", "log_every=1"]
FEWER_IMAGES = {"--train": "8", "--val": "2", "--test": "2"}

pytestmark = pytest.mark.readme


def blocks(language: str, page: str = README) -> list[str]:
    """Fenced blocks of one language, "" for plain ones."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(plain: list[str] | None = None) -> list[list[str]]:
    """Every `paqdetr ...` line of plain blocks, by default the README's."""
    lines = [line for block in plain or blocks("") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("paqdetr ")]


def shortened(words: list[str]) -> list[str]:
    """The same command with less to do."""
    if words[1] == "train":
        return words + FEWER_STEPS
    if words[1:4] == ["data", "make", "digits"]:
        return [FEWER_IMAGES.get(words[i - 1], word) for i, word in enumerate(words)]
    return words


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def execute(listed: list[list[str]], folder: Path) -> str:
    """All of them, with less to do; what they said."""
    said = ""
    for words in listed:
        done = run([sys.executable, "-m", *shortened(words)], folder)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        said += done.stdout + done.stderr
    return said


def execute_python(page: str, folder: Path) -> None:
    """The one Python block of a page, its training cut."""
    (block,) = blocks("python", page)
    small = 'epochs=1, **{"image_size": 96}, settings={"max_steps": 3, "log_every": 1, '
    cut = re.sub(r"epochs=\d+(, settings=\{|(?=\)))", lambda match: small + ("" if match[1] else "}"), block)
    assert cut != block
    done = run([sys.executable, "-c", cut], folder)
    assert done.returncode == 0, f"{cut}\n{done.stdout}\n{done.stderr}"


def test_readme(tmp_path: Path) -> None:
    first, *rest = commands()
    assert [words[1] for words in (first, *rest)] == ["data", "data", "train", "eval", "predict", "analyze", "export"]
    execute([first], tmp_path)
    execute_python(README, tmp_path)
    said = execute(rest, tmp_path)
    assert "no errors" in said
    expected = evaluate(tmp_path / "runs/mine", data=tmp_path / "data/digits", split="test").figures.AP
    assert json.loads((tmp_path / "runs/mine/test.json").read_text(encoding="utf-8"))["AP"] == pytest.approx(expected)
    assert any((tmp_path / "runs/mine/drawn").glob("*.jpg"))
    assert (tmp_path / "runs/report/index.html").is_file()
    assert (tmp_path / "runs/mine.onnx").is_file()


def test_first_page(tmp_path: Path) -> None:
    """Its Python; its commands are the README's, and tests/test_docs_pages.py reads them."""
    execute(commands(blocks("", START))[:1], tmp_path)
    execute_python(START, tmp_path)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
    assert (REPO / "docs/assets/attention.jpg").stat().st_size < 120_000


def test_walk_through_finetuning(tmp_path: Path) -> None:
    listed = commands(blocks("", FINETUNING)[:1])
    assert [words[1] for words in listed] == ["data", "data", "train", "train", "eval"]
    assert "init runs/base: 10 of 10 classes known by name" in execute(listed, tmp_path)
    assert (tmp_path / "runs/tuned/best.safetensors").is_file()


def test_make_targets_exist() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for block in blocks("") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def stand_in_venv(folder: Path) -> None:
    """A .venv that counts as installed: its `paqdetr` runs with this interpreter, and nothing in it could install into ours."""
    (folder / "bin").mkdir(parents=True)
    for name, line in {
        "paqdetr": f'exec {shlex.quote(sys.executable)} -m paqdetr "$@"',
        "python": "echo 'a test may not install' >&2; exit 1",
    }.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    (folder / ".installed").touch()


def test_quickstart_in_small(tmp_path: Path) -> None:
    """`make quickstart` with a few images and steps, twice: the second call reuses everything."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "src"):
        (clone / name).symlink_to(REPO / name)
    stand_in_venv(clone / ".venv")
    small = ["DIGITS_ARGS=--train 8 --val 2 --test 2", f"QUICKSTART_ARGS={' '.join(FEWER_STEPS)}"]
    first = run(["make", "quickstart", *small], clone)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("best.safetensors", "config.yaml", "metrics.jsonl", "curves.png", "predictions.png", "test.json"):
        assert (clone / "runs/quickstart" / name).is_file(), name
    before = (clone / "runs/quickstart/metrics.jsonl").read_bytes()
    second = run(["make", "quickstart", *small], clone)
    assert second.returncode == 0, second.stdout + second.stderr
    assert (clone / "runs/quickstart/metrics.jsonl").read_bytes() == before
