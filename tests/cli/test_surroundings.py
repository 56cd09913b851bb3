"""What the program finds around it: variables that another program has set, no folder for temporary files, output that cannot be
written."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

PROGRAM = shlex.join([sys.executable, "-m", "paqdetr"])
# Nothing can be written but in /dev and the like.
READ_ONLY = (
    "mount -o bind,ro /tmp /tmp; mount -o remount,bind,ro /; cd /; unset TMPDIR TEMP TMP TORCHINDUCTOR_CACHE_DIR; "
)


def shell(command: str, *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*before, "bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "qtagg"])
def test_a_plot_backend_that_is_not_there(tmp_path: Path, tiny_digits: Path, backend: str) -> None:
    plot = tmp_path / "stats.png"
    done = shell(f"MPLBACKEND={backend} {PROGRAM} data stats {tiny_digits} --output {plot}")
    assert done.returncode == 0 and plot.is_file(), done.stderr


def test_no_folder_for_temporary_files(tiny_digits: Path, own_mounts: list[str]) -> None:
    command = f"{READ_ONLY} {PROGRAM} train paq_dino_nano --data {tiny_digits} --output /dev/shm/run"
    done = shell(command, *own_mounts)
    error, remedy = done.stderr.splitlines()
    assert done.returncode == 2 and "TMPDIR" in remedy
    assert error.startswith("error: there is no writable folder for temporary files: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [(">/dev/full", 2, "error: standard output: No space left on device"), ("| head -1", 0, ""), (">&-", 0, "")],
)
def test_results_that_cannot_be_printed(redirection: str, code: int, words: str) -> None:
    done = shell(f"{PROGRAM} config list {redirection}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr.split("\n")[0]) == (code, words)
