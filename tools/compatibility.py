"""Are checkpoints and run folders of an older commit still good? Every nano model, with and without PaQ.

    git worktree add ../before COMMIT
    PYTHONPATH=../before/src python tools/compatibility.py make FOLDER      with the old code
    python tools/compatibility.py check FOLDER --json FILE                  with the new

`make` trains each model for a few steps, once in one go and once stopped in the middle, and keeps the outputs of the first on
one image. `check` loads the checkpoints, compares the outputs bit for bit, resumes the stopped runs, and says how far
the weights at their ends are from those of the old code: 0 where no arithmetic has changed since.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import paqdetr

SETTINGS = {
    "image_size": 96,
    "batch_size": 2,
    "epochs": 2,
    "log_every": 1,
    "model.dim": 32,
    "model.ffn_dim": 64,
    "model.num_queries": 20,
}
LIMIT = (
    1e-5  # of a weight after the rest of two epochs: sums in another order give 1e-6, a lost piece of state far more
)
STOP = 6  # in the second epoch: eight images make four steps


class Stopped(Exception):
    pass


class StopAt(paqdetr.Callback):
    """Ends the training as a crash would."""

    def on_step(self, step: int, loss: float) -> None:
        if step == STOP:
            raise Stopped


def run(folder: Path, name: str, output: Path, **more: Any) -> paqdetr.Run:
    return paqdetr.train(name, data=folder / "digits", output=output, device="cpu", settings=SETTINGS, **more)


def outputs(path: Path) -> dict[str, torch.Tensor]:
    model = paqdetr.load(path).eval()
    image = torch.linspace(-2, 2, 3 * 96 * 96).reshape(1, 3, 96, 96)
    with torch.no_grad():
        found = model(image)
    return {"pred_logits": found.pred_logits, "pred_boxes": found.pred_boxes}


def make(folder: Path) -> None:
    command = [sys.executable, "-m", "paqdetr", "data", "make", "digits", "--output", str(folder / "digits")]
    subprocess.run([*command, "--train", "8", "--val", "4", "--test", "4"], check=True)
    for name in paqdetr.list_models("*_nano"):
        whole = run(folder, name, folder / name / "whole")
        try:
            run(folder, name, folder / name / "stopped", callbacks=[StopAt()])
        except Stopped:
            torch.save(outputs(whole.last), folder / name / "outputs.pt")
        else:
            raise RuntimeError(f"{name}: was not stopped")
        print(name, "made", flush=True)


def check(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*_nano")):
        known = torch.load(path / "outputs.pt")
        now = outputs(path / "whole" / "last.safetensors")
        same = all(torch.equal(known[key], now[key]) for key in known)
        settings = path / "stopped" / "config.yaml"  # its own: a recipe may have changed
        resumed = run(folder, str(settings), path / "stopped", resume=True)
        ends = [paqdetr.load(each).state_dict() for each in (path / "whole" / "last.safetensors", resumed.last)]
        if ends[0].keys() != ends[1].keys():
            sys.exit(f"{path.name}: the resumed run has other weights: {sorted(ends[0].keys() ^ ends[1].keys())[:3]}")
        apart = max(float((ends[0][key].double() - ends[1][key].double()).abs().max()) for key in ends[0])
        found[path.name] = {"outputs_equal": same, "resumed_apart": apart}
        print(path.name, found[path.name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "make":
        make(given.folder)
        return
    found = check(given.folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not found or not all(row["outputs_equal"] and row["resumed_apart"] <= LIMIT for row in found.values()):
        sys.exit("an older checkpoint gives other outputs, or an older run goes on differently")


if __name__ == "__main__":
    main()
