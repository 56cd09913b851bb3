"""The device a user names, and what a run was made with: versions, code, machine. No host name, user name or variable."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paqdetr._version import __version__
from paqdetr.errors import ConfigError
from paqdetr.values import environment_integer

if TYPE_CHECKING:
    import torch


_KINDS = ("cpu", "cuda", "mps", "xpu")


def require_known_device(name: str | None) -> str | None:
    """The full name of a device that there is somewhere, or None; torch, which knows those that are here, is not asked.

    Raises:
        ConfigError: there is none.
    """
    full = None if name is None else _full_name(name)
    if full is not None and full.partition(":")[0] not in _KINDS:
        raise ConfigError(
            f"device {name!r}: there is no such kind; expected {', '.join(_KINDS)}, or such as cuda:0",
            "leave --device out for the best there is, or use --device cpu",
        )
    return full


def _full_name(name: object) -> str:
    """cuda:0 for 0, as GPUs are called elsewhere."""
    return f"cuda:{name}" if str(name).isdecimal() else str(name)


def require_device(name: str | None) -> torch.device:
    """The device called `name`, such as "cpu", "cuda" or "cuda:1" ("1" for short); for None a CUDA device, if there is one,
    else the CPU.

    Raises:
        ConfigError: torch knows no such device, or it does not work on this machine; the message names those that do.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = usable_devices()
    try:
        device = torch.device(_full_name(name))
        # Of other kinds, such as meta or lazy, torch makes tensors that hold nothing, or fails later.
        if device.type in there and torch.ones(1, device=device).item() == 1:
            return device
        reason = ""
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f" ({str(error).strip().splitlines()[0]})"
    raise ConfigError(
        f"device {name!r}: it does not work here{reason}; those that do are {', '.join(there)}",
        f"use --device {there[-1]}, in Python device={there[-1]!r}",
    )


def usable_devices() -> list[str]:
    """Kinds of devices that work on this machine."""
    import torch

    modules = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    return [kind for kind in _KINDS if kind == "cpu" or modules[kind].is_available()]


_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "safetensors", "hotcoco", "pillow")


def describe_environment() -> dict[str, Any]:
    """Command, versions, git commit of the working directory (None outside a repository) and machine, ready for json."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "directory": str(Path.cwd()),
        "git": _git(),
        "paqdetr": __version__,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "machine": machine(),
    }


def describe_start(device: torch.device, processes: int) -> dict[str, Any]:
    """What the "start" record of metrics.jsonl says: enough to judge its times by."""
    import torch

    from paqdetr.ops import choose_backend

    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": processes,
        "attention": choose_backend(device),
    }


def machine() -> dict[str, Any]:
    """Processor, memory and devices."""
    import psutil
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def this_is_main() -> bool:
    """Whether this process may print, before and after processes know each other."""
    return environment_integer("RANK", 0, low=0) == 0


def command_line() -> str:
    """The command that started this process, or all processes of this machine, ready to be pasted into a shell."""
    program = Path(sys.argv[0])
    is_own = program.name == "paqdetr" or (program.name == "__main__.py" and program.parent.name == "paqdetr")
    words = ["paqdetr", *sys.argv[1:]] if is_own else [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    processes = environment_integer("LOCAL_WORLD_SIZE", 1, low=1)
    if is_own and processes > 1:
        words = ["torchrun", f"--nproc_per_node={processes}", "-m", *words]
    return shlex.join(words)


def _git() -> dict[str, Any] | None:
    commit = _ask("rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "changed": bool(_ask("status", "--porcelain", "--untracked-files=no"))}


def _ask(*arguments: str) -> str | None:
    """What git says; None if it is not installed, slow, or not in a repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def package_version(package: str) -> str | None:
    """Of an installed package; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> float:
    """Peak memory of the process in GiB; on a GPU, what it has reserved there."""
    import torch

    return (torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident()) / 2**30


def peak_resident() -> int:
    """The most bytes of the machine's memory that this process has had."""
    import psutil

    try:
        # Not ru_maxrss, which a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # no Linux, or one that does not say
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)  # Windows alone knows a peak


def available_memory(device: torch.device) -> int:
    """Bytes that are free: of the GPU, or of the machine within the limit of the container."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:  # version 2 of control groups, which containers have
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        # Files that were read are kept while there is room, and given up for programs.
        kept = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="utf-8").split("inactive_file ")[1].split()[0]
    except (OSError, ValueError, IndexError):
        return free
    return min(free, max(limit - used + int(kept), 0))
