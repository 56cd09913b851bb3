"""The images of docker/, without a daemon: what they install, and what is served by what the smallest has."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
from test_ray_predict import pictures
from tiny_onnx import write_tiny_onnx

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "docker"


def run_lines(name: str) -> list[str]:
    return re.findall(r"^RUN (.+)$", (DOCKER / f"{name}.Dockerfile").read_text(), flags=re.M)


def test_requirements_of_the_runtime_are_those_of_the_project() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {line.split(";")[0].strip() for line in [*project["dependencies"], *extras["serve"], *extras["onnx"]]}
    listed = [
        line for line in (DOCKER / "runtime-requirements.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert set(listed) <= known
    assert {*extras["serve"], *extras["onnx"]} <= set(listed)


@pytest.mark.parametrize("name", ["runtime", "cpu", "gpu"])
def test_images_run_as_nobody_special_and_take_what_is_there(name: str) -> None:
    text = (DOCKER / f"{name}.Dockerfile").read_text()
    assert "USER 1000" in text and "HEALTHCHECK" in text and 'ENTRYPOINT ["python", "-m", "paqdetr"]' in text
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(group.split(",")) <= set(extras)
    for word in re.findall(r"-r (\S+)", text):
        assert (REPO / word).is_file()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_images_with_torch_export_serve_push_and_read_videos(name: str) -> None:
    installed = re.findall(r"^pip install .*'\.\[([\w,]+)\]'$", "\n".join(run_lines(name)), flags=re.M)
    assert [set(extras.split(",")) for extras in installed] == [{"export", "serve", "hub", "video"}]


def test_the_image_for_gpus_has_the_compiler_that_triton_calls() -> None:
    [line] = [line for line in run_lines("gpu") if "apt-get install" in line]
    assert {"gcc", "libc6-dev"} <= set(line.split()) and line.startswith("apt-get update && ")


@pytest.mark.integration
def test_the_runtime_serves_without_torch(tmp_path: Path) -> None:
    """The RUN lines that install, into a folder that an interpreter with nothing else then uses."""
    if not os.environ.get("PAQDETR_TEST_INSTALL"):
        pytest.skip("installs from the package index: PAQDETR_TEST_INSTALL=1 runs it")
    for line in run_lines("runtime"):
        if line.startswith("pip install"):
            words = [str(tmp_path / "site") if word == "/site" else word for word in shlex.split(line)]
            subprocess.run([sys.executable, "-m", *words], cwd=REPO, check=True, timeout=300)
    size = sum(file.stat().st_size for file in (tmp_path / "site").rglob("*") if file.is_file())
    assert size < 200 * 2**20, f"{size / 2**20:.0f} MiB"  # beside 150 MB of python:3.13-slim
    model = write_tiny_onnx(tmp_path / "m.onnx")
    [picture] = pictures(tmp_path / "images", 1)
    alone = {"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]}
    code = "import sys, paqdetr.runtime; assert 'torch' not in sys.modules and '/site/' in paqdetr.runtime.__file__"
    subprocess.run([sys.executable, "-S", "-c", code], env=alone, check=True, cwd=tmp_path)
    command = [sys.executable, "-S", "-m", "paqdetr", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        command, env=alone | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        request = urllib.request.Request(f"{address}/v1/detect?threshold=0.01", picture.read_bytes())
        answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
        assert len(answer["detections"]) == 2 and answer["model"] == "tiny"
    finally:
        process.terminate()
    assert process.wait(20) == 0
