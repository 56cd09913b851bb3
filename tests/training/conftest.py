"""Several real processes on this machine, which talk through gloo.

They fork from a server that has imported everything once; starting the interpreter anew would take most of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

sys.path.insert(0, str(Path(__file__).parent))  # where processes find together.py, and tests same_end.py


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int | None
    out: str
    err: str


class Group:
    """Processes that know each other, as torchrun starts them; `work` names a function of together.py."""

    def __init__(self, count: int, work: str, arguments: tuple[Any, ...], folder: Path) -> None:
        import together

        # Where they meet is open from the start, at a port that the system chose: torchrun does it so, too.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["together"])
        with pytest.MonkeyPatch.context() as patch:  # before Python 3.13 the server does not know where to look
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        folder.mkdir(parents=True)
        self.files = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(count)]
        self.processes = []
        for rank, files in enumerate(self.files):
            place = (rank, count, self.store.port, *map(str, files))
            process = context.Process(target=together.run, args=(place, work, *map(str, arguments)))
            process.start()
            self.processes.append(process)

    def end(self, timeout: float = 180) -> list[Ended]:
        """Wait for all; None is the code of one that hangs."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return [
            Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, self.files, strict=True)
        ]


Start = Callable[..., Group]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(count, work, *arguments)` sets processes to work; `.end()` waits for them."""
    if not hasattr(multiprocessing, "forkserver") and sys.platform == "win32":
        pytest.skip("needs fork, which Windows has not")
    return lambda count, work, *arguments: Group(count, work, arguments, tmp_path_factory.mktemp("processes") / "said")
