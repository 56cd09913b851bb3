"""Trains while things break, for an hour or so, and counts what is lost. To be run before a release, as root on Linux.

python tools/fault_campaign.py --json docs/results/fault_campaign.json           # prints the table of docs/reliability.md
python tools/fault_campaign.py --share 0.1 --only "random kills" "two starts"    # a tenth of the rounds, two faults

Every training is that of tests/training/test_faults.py: four epochs of four steps of a tiny paq_dino_nano, two workers. A round
ends in one of three ways. "same end": it, or its resumption, ended with the same weights, average, optimiser, generators, best
figure and records as a training to which nothing happened, bit for bit. "refused": one line that names the file, exit code 2,
nothing changed. Everything else is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paqdetr.data.digits import make_digits
from paqdetr.runs import Run

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "training"))

from same_end import require_same_end  # noqa: E402

from conftest import Group  # noqa: E402

SETTINGS = {
    "image_size": 96,
    "model.dim": 32,
    "model.ffn_dim": 64,
    "model.num_queries": 20,
    "model.denoising_queries": 10,
    "batch_size": 2,
    "epochs": 4,
    "save_every_steps": 2,
    "log_every": 1,
    "workers": 2,
}
SAME, REFUSED = "same end", "refused"
Round = Callable[["Campaign", random.Random, int], str]


class Lost(Exception):
    """A round that ended as none should."""


class Campaign:
    """Runs trainings in processes that fork from a server which has imported everything: half a second to start each."""

    def __init__(self, folder: Path) -> None:
        self.group, self.run_of, self.folder = Group, Run, folder
        self.data = make_digits(folder / "digits", size=96, train=8, val=4, test=4, max_objects=5)
        self.calls = 0
        pairs = [f"{key}={value}" for key, value in SETTINGS.items()]
        self.arguments = ["train", "paq_dino_nano", *pairs, "--data", str(self.data), "--device", "cpu"]
        self.straight = self.new_run()
        self.require_end(self.begin(self.straight), 0)

    def new_run(self, at: Path | None = None) -> Any:
        """The folder of the next round's run, not made yet."""
        self.calls += 1
        return self.run_of((at or self.folder) / f"run{self.calls}")

    def begin(self, run: Any, *more: str, work: tuple[Any, ...] = ("own_group",)) -> Any:
        """Start a training, in a process group of its own."""
        self.calls += 1
        said = self.folder / "said" / str(self.calls)
        return self.group(1, work[0], (*work[1:], *self.arguments, "--output", run.output, *more), said)

    def begun(self, run: Any, *more: str) -> tuple[Any, Any]:
        """The same, once it has come to its steps."""
        starts = len(run.records("start"))
        group = self.begin(run, *more)
        (process,) = group.processes
        while process.is_alive() and len(run.records("start")) == starts:
            time.sleep(0.01)
        return group, process

    def end(self, group: Any) -> Any:
        """How it ended, and what it said."""
        (ended,) = group.end(timeout=600)
        if ended.code is None:
            raise Lost("hangs")
        if "Traceback" in ended.err or "internal error" in ended.err:
            raise Lost(ended.err[-2000:])
        return ended

    def require_end(self, group: Any, code: int) -> Any:
        ended = self.end(group)
        if ended.code != code:
            raise Lost(f"exit code {ended.code} instead of {code}: {ended.err[-2000:]}")
        return ended

    def require_same(self, run: Any, *, records: bool = True) -> str:
        """Raise Lost unless a run has ended as the one to which nothing happened."""
        try:
            require_same_end(self.straight, run, records=records)
        except AssertionError as error:
            raise Lost(f"another end: {error}") from None
        return SAME

    def resumed(self, run: Any, *, records: bool = True) -> str:
        """Go on with a run to its end."""
        self.require_end(self.begin(run, "--resume"), 0)
        return self.require_same(run, records=records)


def random_kills(campaign: Campaign, moments: random.Random, number: int) -> str:
    """SIGKILL at any moment, of the trainer or of all its group, the first resumption killed too."""
    run = campaign.new_run()
    for _ in range(2):
        group, process = campaign.begun(run, "--resume")
        process.join(moments.uniform(0, 3))
        if process.exitcode is None:
            (os.kill if number % 2 else os.killpg)(process.pid, signal.SIGKILL)
        group.end()
    return campaign.resumed(run)


def group_signals(campaign: Campaign, moments: random.Random, number: int) -> str:
    """SIGTERM, SIGHUP, SIGINT to the process group, workers included, once, twice or five times."""
    sent = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[number % 3]
    run = campaign.new_run()
    group, process = campaign.begun(run)
    process.join(moments.uniform(0.2, 2))
    for _ in range((1, 2, 5)[number // 3 % 3]):
        if process.is_alive():
            os.killpg(process.pid, sent)
    ended = campaign.end(group)
    if ended.code not in (0, 128 + sent):  # 0: it was through already
        raise Lost(f"exit code {ended.code} after {sent.name}: {ended.err[-2000:]}")
    return campaign.resumed(run)


def full_disk(campaign: Campaign, moments: random.Random, number: int) -> str:
    """The run's disk has room for less and less of what is written, then for all."""
    needed = sum(file.stat().st_size for file in campaign.straight.output.iterdir()) // 1024
    place = campaign.folder / "disk"
    with mounted(place, f"size={max(needed * (number % 10 + 1) // 8, 64)}k"):
        run = campaign.new_run(place)
        ended = campaign.end(campaign.begin(run))
        if ended.code != 0:
            if ended.code != 2 or "No space left on device" not in ended.err:
                raise Lost(f"exit code {ended.code}: {ended.err[-2000:]}")
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            campaign.resumed(run)
        return campaign.require_same(run)


def small_shared_memory(campaign: Campaign, moments: random.Random, number: int) -> str:
    """/dev/shm with 64 KB, with 4 KB, read-only."""
    with mounted(Path("/dev/shm"), ("size=64k", "size=4k", "size=1m,ro")[number % 3]):
        run = campaign.new_run()
        campaign.require_end(campaign.begin(run), 0)
        return campaign.require_same(run)


def damaged_files(campaign: Campaign, moments: random.Random, number: int) -> str:
    """A byte of a file of an interrupted run flipped, or the file cut there; every file of the run in turn."""
    source = campaign.folder / "interrupted"
    if not source.exists():
        campaign.end(campaign.begin(campaign.run_of(source), work=("killed_after_step", 11)))
    run = campaign.new_run()
    shutil.copytree(source, run.output)
    files = sorted(file for file in run.output.iterdir() if not file.name.startswith("."))
    file = files[number % len(files)]
    content = bytearray(file.read_bytes())
    offset = moments.randrange(len(content))
    if number // len(files) % 2:
        content[offset] ^= 1 << moments.randrange(8)
    else:
        del content[offset:]
    file.write_bytes(content)
    before = {path.name: path.read_bytes() for path in files}
    ended = campaign.end(campaign.begin(run, "--resume"))
    if ended.code == 2 and str(run.output) in ended.err:
        if any((run.output / name).read_bytes() != content for name, content in before.items()):
            raise Lost(f"refused, and has changed a file: {ended.err[-500:]}")
        return REFUSED
    if ended.code != 0:
        raise Lost(f"exit code {ended.code}: {ended.err[-2000:]}")
    # Records of damaged lines are gone, and only they.
    return campaign.require_same(run, records=file.name != "metrics.jsonl")


def two_starts(campaign: Campaign, moments: random.Random, number: int) -> str:
    """Two trainings started at once into one folder: one holds it."""
    run = campaign.new_run()
    groups = [campaign.begin(run, "max_steps=1", "workers=0", *["--resume"] * (number % 2)) for _ in range(2)]
    codes = sorted(campaign.end(group).code for group in groups)
    one_after_the_other = codes == [0, 0] and number % 2 and len(run.records("start")) == 1
    if codes != [0, 2] and not one_after_the_other:
        raise Lost(f"exit codes {codes}")
    if not run.finished or len(run.records("train")) != 1:
        raise Lost("the run is not what one training writes")
    return SAME


FAULTS: dict[str, tuple[int, Round, bool]] = {  # rounds, what is done in each, whether it mounts
    "random kills": (30, random_kills, False),
    "signals to the process group": (18, group_signals, False),
    "full disk": (10, full_disk, True),
    "small /dev/shm": (6, small_shared_memory, True),
    "damaged files": (60, damaged_files, False),
    "two starts": (200, two_starts, False),
}


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A file system in memory, which only this program and its children see."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def play(campaign: Campaign, name: str, share: float, seed: int) -> dict[str, Any]:
    """All rounds of a fault."""
    rounds, act, mounts = FAULTS[name]
    what = " ".join((act.__doc__ or "").split())
    row: dict[str, Any] = {"fault": name, "what": what, "rounds": 0, SAME: 0, REFUSED: 0, "lost": 0}
    if mounts and os.getuid() != 0:
        return row | {"skipped": "mounts file systems, which needs root"}
    results, moments = Counter[str](), random.Random(f"{seed} {name}")
    for number in range(max(round(rounds * share), 1)):
        try:
            result = act(campaign, moments, number)
        except Lost as lost:
            result = "lost"
            print(f"LOST: {name}, round {number}: {lost}", flush=True)
        results[result] += 1
        print(f"{name}: round {number + 1}: {result}", flush=True)
    return row | {"rounds": results.total()} | results


def table(report: dict[str, Any]) -> str:
    """The report as docs/reliability.md shows it."""
    lines = ["| fault | rounds | same end | refused | lost |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        cells = [f"**{row['fault']}**: {row['what']}", row["rounds"], row[SAME], row[REFUSED], row["lost"]]
        if "skipped" in row:
            cells[1] = f"skipped: {row['skipped']}"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The number of rounds in which something was lost, as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and offsets")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    given = parser.parse_args(arguments)
    import torch

    from paqdetr import __version__

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        campaign = Campaign(Path(folder))
        rows = [play(campaign, name, given.share, given.seed) for name in given.only]
    versions = {"paqdetr": __version__, "torch": torch.__version__, "python": platform.python_version()}
    report = {
        "command": "python tools/fault_campaign.py " + " ".join(sys.argv[1:]),
        "versions": versions | {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "rows": rows,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    return min(sum(row["lost"] for row in rows), 1)


if __name__ == "__main__":
    if sys.platform == "linux" and os.getuid() == 0 and "PAQDETR_OWN_MOUNTS" not in os.environ:
        os.environ["PAQDETR_OWN_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    sys.exit(main())
