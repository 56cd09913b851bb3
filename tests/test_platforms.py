"""Other systems than the one at hand: what Windows lacks stands behind a branch, and its newlines and paths are read."""

from __future__ import annotations

import ast
import importlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

import paqdetr
from paqdetr import environment, files, interrupt
from paqdetr.study import datasets

SOURCES = sorted(Path(paqdetr.__file__).parent.rglob("*.py"))
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
NAMES = {
    "os": {
        *("fork", "forkpty", "killpg", "setsid", "getpgid", "getpgrp", "getuid", "geteuid", "getgid", "nice", "mkfifo"),
        *("mknod", "sched_getaffinity", "sched_setaffinity", "uname", "chown", "wait3", "wait4", "register_at_fork"),
        *("posix_fadvise", "statvfs", "sync", "getloadavg", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW", "pread"),
    },
    "signal": {
        *("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD", "SIGQUIT", "alarm", "setitimer"),
        *("pthread_kill", "sigwait", "siginterrupt"),
    },
}  # fmt: skip


def unguarded(code: str) -> list[str]:
    """What of the above `code` uses outside of a branch that asks for it, or a `try` that does without."""
    found: list[str] = []

    def guards(node: ast.AST) -> bool:
        if isinstance(node, ast.If | ast.IfExp):
            return any(word in ast.unparse(node.test) for word in ("hasattr", "platform", "os.name", "is not None"))
        caught = {word for part in node.handlers for word in ("ImportError", "AttributeError", "OSError")
                  if word in ast.unparse(part)} if isinstance(node, ast.Try) else ()  # fmt: skip
        return bool(caught)

    def visit(node: ast.AST) -> None:
        if guards(node):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            found.extend(alias.name for alias in node.names if alias.name in NAMES.get(node.module or "", ()))
            found.extend({node.module or ""} & MODULES)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.extend({node.attr} & NAMES.get(node.value.id, set()))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(code))
    return found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import fcntl", ["fcntl"]),
        ("from resource import getrusage", ["resource"]),
        ("from os import killpg", ["killpg"]),
        ("def stop(): os.killpg(1, signal.SIGKILL)", ["killpg", "SIGKILL"]),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
        ("if hasattr(os, 'fork'):\n    os.fork()", []),
        ("if wanted:\n    os.fork()", ["fork"]),
        ("try:\n    os.fork()\nfinally:\n    pass", ["fork"]),
    ],
)
def test_the_rule(code: str, found: list[str]) -> None:
    assert unguarded(code) == found


def test_what_windows_lacks_stands_behind_a_branch() -> None:
    found = {str(path): unguarded(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert found and {path: names for path, names in found.items() if names} == {}


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the modules below use and Windows lacks."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    monkeypatch.delattr(signal, "SIGHUP", raising=False)


def anew(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a new interpreter would have it; the one in use stays."""
    monkeypatch.delitem(sys.modules, module.__name__)
    try:
        return importlib.import_module(module.__name__)
    finally:
        setattr(paqdetr, module.__name__.rpartition(".")[2], module)


def test_locks_keep_nobody_out_on_windows(windows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = anew(files, monkeypatch)
    with module.held(tmp_path / "lock") as first, module.held(tmp_path / "lock") as second:
        assert first is None and second is None


def test_signals_of_windows(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert anew(interrupt, monkeypatch).STOP_SIGNALS == (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("status", [None, "", "Name:\tpython\nVmRSS:\t100 kB\n"])
def test_memory_where_proc_does_not_say(status: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, **how: object) -> str:
        if status is None:
            raise FileNotFoundError(path)
        return status

    monkeypatch.setattr(Path, "read_text", read)
    assert environment.peak_resident() > 2**20


def test_a_study_copies_pictures_where_links_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **how: object) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"picture")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    datasets._link(tmp_path / "out", tmp_path / "in")
    assert (tmp_path / "out" / "a.jpg").read_bytes() == b"picture"
