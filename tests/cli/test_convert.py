"""`paqdetr convert` as people use it. What it does to tensors: tests/convert."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paqdetr.checkpoint import read_header
from paqdetr.cli import run
from paqdetr.models import create_model, load


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = create_model("dn_detr_nano", num_classes=3, dim=32, ffn_dim=16, num_queries=6)
    model.save(tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.integration
def test_a_conversion_as_a_process(checkpoint: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "paq.safetensors", tmp_path / "log" / "tensors.json"
    command = [sys.executable, "-m", "paqdetr", "convert", str(checkpoint), "num_patterns=4"]
    command += ["--from", "paqdetr", "--as", "paq_dn_detr_nano", "--output", str(output), "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for text in (
        "as paq_dn_detr_nano",
        "dropped: 1 x content queries become patterns",
        "x patterns instead of the file's static queries",
        f"checkpoint: {output}",
        f"to train it: paqdetr train paq_dn_detr_nano --data DIR --output RUN init={output} model.dim=32",
    ):
        assert text in done.stdout
    model, old = load(output), load(checkpoint)
    assert (model.config.queries, model.config.num_patterns) == ("patterns", 4)
    assert torch.equal(model.state_dict()["start.boxes"], old.state_dict()["start.boxes"])
    tensors = json.loads(log.read_text())
    assert set(tensors["kept"]) | set(tensors["fresh"]) == set(model.state_dict())
    assert tensors["settings"]["num_patterns"] == {"value": 4, "known_from": "given"}
    made_of = read_header(output)["converted"]
    assert made_of["source"] == str(checkpoint) and made_of["fresh"] == len(tensors["fresh"])


def test_nothing_is_overwritten(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoint.read_bytes()
    assert run(["convert", str(checkpoint), "--from", "paqdetr", "--output", str(checkpoint)]) == 2
    assert "the file exists, and nothing is overwritten" in capsys.readouterr().err
    for source in (checkpoint, checkpoint.parent):
        assert run(["convert", str(source), "--from", "paqdetr", "--output", str(checkpoint), "--overwrite"]) == 2
        assert "the file belongs to what is converted" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_only_safetensors_are_written(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(checkpoint), "--from", "paqdetr", "--output", "x.pth"]) == 2
    assert "checkpoints are .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("partial", [[], ["--partial"]])
def test_a_checkpoint_of_ours_is_known_as_such(
    partial: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(checkpoint, tmp_path / "run" / "best.safetensors")
    for source in (checkpoint, tmp_path / "run"):
        output = tmp_path / "out.safetensors"
        assert run(["convert", str(source), "--from", "dino", "--output", str(output), *partial]) == 2
        said = capsys.readouterr().err
        assert f"error: {source}: a checkpoint of paqdetr, not of IDEA-Research/DINO" in said
        assert f"init={source}" in said and "--from paqdetr" in said and not output.exists()


@pytest.mark.parametrize("partial", [[], ["--partial"]])
def test_nothing_is_made_of_a_file_without_a_known_tensor(
    partial: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"a.b": torch.zeros(1), "c": torch.zeros(2)}}, tmp_path / "x.pth")
    output = tmp_path / "out.safetensors"
    assert run(["convert", str(tmp_path / "x.pth"), "--from", "dino", "--output", str(output), *partial]) == 2
    said = capsys.readouterr().err
    assert "2 of 2 tensors are not of IDEA-Research/DINO: a.b, c" in said
    assert "none of the programs that --from knows has such names" in said
    assert "--partial" not in said and not output.exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_file_is_refused_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "x": _Evil(tmp_path / "trap")}, tmp_path / "evil.pth")
    output = tmp_path / "out.safetensors"
    assert run(["convert", str(tmp_path / "evil.pth"), "--from", "dino", "--output", str(output)]) == 2
    text = capsys.readouterr().err
    assert "could run code, so it is not opened" in text and "help:" in text
    assert not (tmp_path / "trap").exists() and not output.exists()
