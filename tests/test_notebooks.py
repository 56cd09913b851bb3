"""The notebooks of the documentation run as they stand, in order, on sixty images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them work: the first one trains, the others find its run. Each would train by itself."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("name", ["train_your_data", "read_the_report", "deploy"])
def test_it_runs(folder: Path, name: str) -> None:
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    if name == "deploy":
        pytest.importorskip("onnxscript")
    notebook: Any = jupytext.read(NOTEBOOKS / f"{name}.py", fmt="py:percent")
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    said = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert said and not [output for output in said if output.output_type == "error"]
    assert not [output.text for output in said if output.output_type == "stream" and output.name == "stderr"]


def test_every_notebook_is_run() -> None:
    assert {file.stem for file in NOTEBOOKS.glob("*.py")} == {"train_your_data", "read_the_report", "deploy"}
