"""How processes that train together ended is known to who started them: torchrun itself always says 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")]

# Two processes that end with 143 when they are asked to stop, as trainings do.
WORKER = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
(folder / f"{rank}.part").write_text(str(os.getpid()))
(folder / f"{rank}.part").rename(folder / f"{rank}.pid")
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("whom", "number", "code"),
    [
        pytest.param("launcher", signal.SIGTERM, 143, id="the launcher is stopped"),
        pytest.param("1", signal.SIGTERM, 143, id="a process is stopped"),
        pytest.param("0", signal.SIGKILL, 137, id="a process is killed"),
    ],
)
def test_a_stop_is_told_from_a_failure(tmp_path: Path, whom: str, number: int, code: int) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "paqdetr.study.launch", "--nproc_per_node=2", "--monitor-interval=0.1"]
    files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
    with subprocess.Popen([*command, str(tmp_path / "worker.py"), str(tmp_path)]) as launcher:
        deadline = time.monotonic() + 180
        while not all(file.is_file() for file in files):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(launcher.pid if whom == "launcher" else int((tmp_path / f"{whom}.pid").read_text()), number)
        assert launcher.wait(120) == code
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
