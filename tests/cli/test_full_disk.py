"""Every verb that writes, on a disk that is full or may not be written: a small file system in a private namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paqdetr.runs import Run

pytestmark = pytest.mark.integration

# One process for all verbs: importing takes longer than most of them.
DRIVER = """
import contextlib, io, json, os, shutil, subprocess, sys
from pathlib import Path

from paqdetr.cli import console, run

disk, cases = Path(sys.argv[1]), json.load(sys.stdin)
found = []
for case in cases:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    for name, content in case["files"].items():
        (disk / name).write_text(content)
    if case["room"] is None:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    else:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - case["room"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(case["command"])
    files = {str(p.relative_to(disk)): p.stat().st_size for p in disk.rglob("*") if p.is_file()}
    del files["filler"]
    again = None
    if case["room"] is not None:
        (disk / "filler").unlink()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            again = run(case["command"]) if case["again"] else None
    found.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "files": files, "again": again})
    subprocess.run(["umount", disk], check=True)
json.dump(found, sys.stdout)
"""


Verbs = dict[str, tuple[list[str], str]]


@pytest.fixture(scope="module")
def verbs(tiny_run: Run, tiny_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Verbs:
    """Name -> command, and what of the disk it writes: `DISK` is where that is."""
    folder = tmp_path_factory.mktemp("inputs")
    truth, model, data = str(tiny_digits / "val.json"), str(tiny_run.best), str(tiny_digits)
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for row in json.loads(Path(truth).read_text(encoding="utf-8"))["annotations"]
    ]
    (folder / "results.json").write_text(json.dumps(rows))
    study = {
        "base": "paq_dino_nano",
        "variants": {"baseline": {}},
        "data": {"d": {"folder": data, "steps": 1}},
        "seeds": [0],
    }
    (folder / "study.yaml").write_text(json.dumps({"name": "s", **study}))
    quick = ["image_size=64", "batch_size=1", "--steps", "1", "--device", "cpu"]
    small = ["--size", "64", "--train", "4", "--val", "1", "--test", "1"]
    results = ["eval", "--results", str(folder / "results.json"), "--annotations", truth]
    return {
        "eval --json": ([*results, "--json", "DISK/a.json"], "a.json"),
        "eval --results-out": (["eval", model, "--data", data, "--results-out", "DISK/r.json"], "r.json"),
        "data check": (["data", "check", data, "--workers", "1", "--json", "DISK/c.json"], "c.json"),
        "data stats": (["data", "stats", data, "--output", "DISK/s.png"], "s.png"),
        "data stats --json": (
            ["data", "stats", data, "--output", str(folder / "s.png"), "--json", "DISK/s.json"],
            "s.json",
        ),
        "data preview": (["data", "preview", data, "image_size=96", "--output", "DISK/p.png"], "p.png"),
        "data make": (["data", "make", "digits", *small, "--output", "DISK/digits"], "digits"),
        "data convert": (["data", "convert", data, "DISK/yolo", "--to", "yolo"], "yolo"),
        "predict": (["predict", model, f"{data}/test", "--output", "DISK/drawn"], "drawn/000000.jpg"),
        "analyze": (
            ["analyze", model, "--data", data, "--output", "DISK/report", "--images", "1", "--resamples", "10"],
            "report",
        ),
        "convert": (["convert", model, "--from", "paqdetr", "--output", "DISK/m.safetensors"], "m.safetensors"),
        "export": (
            ["export", model, "--format", "torchscript", "--no-check", "--output", "DISK/m.torchscript"],
            "m.torchscript",
        ),
        "plan": (["plan", "paq_dino_nano", "--data", data, *quick, "--json", "DISK/plan.json"], "plan.json"),
        "study": (["study", str(folder / "study.yaml"), "--output", "DISK/study"], "study/study.yaml"),
    }


def on_disk(disk: Path, cases: list[dict[str, Any]], own_mounts: list[str]) -> list[dict[str, Any]]:
    disk.mkdir()
    for case in cases:
        case["command"] = [word.replace("DISK", str(disk)) for word in case["command"]]
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", DRIVER, str(disk)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def case(command: list[str], *, room: int | None, again: bool = False, **files: str) -> dict[str, Any]:
    return {"command": command, "room": room, "again": again, "files": files or {}}


def test_a_full_disk(verbs: Verbs, tmp_path: Path, own_mounts: list[str]) -> None:
    disk = tmp_path / "disk"
    cases = [case(command, room=0) for command, _ in verbs.values()]
    for (name, (_, written)), found in zip(verbs.items(), on_disk(disk, cases, own_mounts), strict=True):
        error = f"error: {disk / written}: cannot be written (No space left on device)"
        assert (found["code"], error in found["err"]) == (2, True), (name, found["err"])
        assert found["files"] == {}, name


def test_a_disk_that_gets_full(verbs: Verbs, tmp_path: Path, own_mounts: list[str]) -> None:
    """What was there stays, half of a new file does not; afterwards the same command does it."""
    disk = tmp_path / "disk"
    old = '{"made_by": "paqdetr eval 0.1", "AP": 0.5}'
    cases = [
        case(verbs["eval --json"][0], room=0, again=True, **{"a.json": old}),
        case(verbs["data stats"][0], room=20480, again=True),
        case(verbs["data make"][0], room=12288, again=True),
        case(verbs["data convert"][0], room=20480, again=True),
        case(verbs["predict"][0], room=12288, again=True),
    ]
    found = on_disk(disk, cases, own_mounts)
    assert all(one["code"] == 2 and "No space left on device" in one["err"] for one in found), found
    assert all(one["again"] == 0 for one in found)
    kept, stats, make, convert, predict = (one["files"] for one in found)
    assert kept == {"a.json": len(old)} and stats == make == convert == {}
    assert 0 < len(predict) < 4 and all(name.endswith(".jpg") and size > 1000 for name, size in predict.items())


def test_a_disk_that_may_not_be_written(verbs: Verbs, tmp_path: Path, own_mounts: list[str]) -> None:
    """Found before the work."""
    disk = tmp_path / "disk"
    cases = [case(command, room=None, filler="") for command, _ in verbs.values()]
    for name, found in zip(verbs, on_disk(disk, cases, own_mounts), strict=True):
        assert found["code"] == 2 and found["out"] == "", (name, found["err"])
        expected = "Read-only file system" if name == "data make" else f"{disk} may not be written"
        assert expected in found["err"], (name, found["err"])
