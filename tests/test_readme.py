"""The commands and Python blocks of the README, and the walk through fine-tuning, run as they stand, in order, in an empty
folder; only the amount of work is cut.

`make readme` runs this. Trainings get a few steps on small pictures, the data set a few images: what is tested is that the
words work.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
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


def test_commands_and_python_blocks(tmp_path: Path) -> None:
    listed = commands()
    assert [words[1] for words in listed] == ["data", "data", "train", "eval", "predict", "analyze"]
    for words in listed:
        done = run([sys.executable, "-m", *shortened(words)], tmp_path)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/first/test.json").is_file()
    assert any((tmp_path / "runs/first/drawn").glob("*.jpg"))
    assert (tmp_path / "runs/report/index.html").is_file()

    train_block, paq_block = blocks("python")
    settings = '"max_steps": 3, "image_size": 96, "log_every": 1'
    cut = train_block.replace("epochs=2)", f"epochs=2, settings={{{settings}}})")
    assert cut != train_block
    for script in (cut, paq_block):
        done = run([sys.executable, "-c", script], tmp_path)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


def test_walk_through_finetuning(tmp_path: Path) -> None:
    listed = commands(blocks("", FINETUNING)[:1])
    assert [words[1] for words in listed] == ["data", "data", "train", "train", "eval"]
    for words in listed:
        done = run([sys.executable, "-m", *shortened(words)], tmp_path)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        if "init=runs/base" in words:
            assert "init runs/base: 10 of 10 classes known by name" in done.stdout + done.stderr
    assert (tmp_path / "runs/tuned/best.safetensors").is_file()


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    for target in targets:
        assert (REPO / target).exists(), target


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
