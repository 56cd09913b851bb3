"""tools/gpu_check.py, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from paqdetr import ops

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
name: two
base: dino_nano
baseline: dino
seeds: [0]
threads: 1
evaluations: 1
data:
  digits:
    make: {train: 8, val: 4, test: 4, size: 64}
    steps: 2
    settings: {model.num_queries: 12, image_size: 64, batch_size: 2}
variants: {dino: {about: the host}, paq_dino: {about: PaQ, base: paq_dino_nano}}
claims: {paq: {text: PaQ raises the AP of DINO., variant: paq_dino}}
"""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, which finds what it imports from benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--small", "--json", str(file), *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    return module.main()


@pytest.mark.parametrize("scale, passes", [(1.0, True), (1.001, False)])
def test_a_wrong_kernel_fails(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, passes: bool
) -> None:
    right = ops.ms_deform_attn

    def attention(value, shapes, locations, weights, backend):
        return right(value, shapes, locations, weights, backend) * (scale if backend != "reference" else 1.0)

    monkeypatch.setattr(ops, "ms_deform_attn", attention)
    code = _run(gpu_check, monkeypatch, tmp_path / "check.json", "--sections", "kernels")
    cases = json.loads((tmp_path / "check.json").read_text())["kernels"]["cases"]
    whole = [case for case in cases if case["dtype"] == "float32" and case["case"] != "no queries"]
    assert code == (0 if passes else 1)
    assert len(whole) == 4 and all(case["passed"] is passes for case in whole)


def test_a_section_that_fails_loses_no_other(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_):
        yield {"case": 1}
        raise MemoryError("no memory")

    monkeypatch.setattr(gpu_check, "SECTIONS", {"speed": broken, "training": lambda _: iter([{"case": 2}])})
    assert _run(gpu_check, monkeypatch, tmp_path / "check.json") == 1
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["speed"]["cases"] == [{"case": 1}] and "no memory" in report["speed"]["error"]
    assert report["training"]["cases"] == [{"case": 2}]


def test_a_section_ends_in_time(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SECTIONS", {"speed": lambda _: iter([{"case": n} for n in range(9)])})
    monkeypatch.setattr(gpu_check, "SECONDS", {"speed": -1})
    assert _run(gpu_check, monkeypatch, tmp_path / "check.json") == 0
    speed = json.loads((tmp_path / "check.json").read_text())["speed"]
    assert len(speed["cases"]) == 1 and speed["stopped_by_time"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_check.main()


@pytest.mark.slow
def test_training_and_study_in_small(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(STUDY)
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--device", "cpu", "--small", "--json", "check.json"]
    command += ["--study", "two.yaml", "--sections", "training", "study"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert {case["amp"] for case in report["training"]["cases"]} == {"no", "bf16"}
    (study,) = report["study"]["cases"]
    assert study["finished"] == 2 and not study["stopped_by_time"]
    assert "PaQ raises the AP of DINO." in study["report"]
