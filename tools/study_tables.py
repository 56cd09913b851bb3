"""The tables of docs/study.md and docs/pilots.md, from the results of studies that are kept.

Kept in docs/results/studies are the study's file and one json per run, not weights. `study NAME TABLE` is a table of the study's
report by its name there, or `facts`, how the study was made; `study plan runs|gpu` are about all studies.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from paqdetr.config import load_config
from paqdetr.report.page import to_table
from paqdetr.report.section import Column, make_table
from paqdetr.study.costs import Forecast, forecast, gflops
from paqdetr.study.report import StudyReport, study_report
from paqdetr.study.results import read_results
from paqdetr.study.runs import Places, plan_runs
from paqdetr.study.spec import Study, load_study

REPO = Path(__file__).resolve().parents[1]
KEPT = REPO / "docs" / "results" / "studies"
PLAN = KEPT / "plan.json"
MOST_BYTES = 20 * 2**20

# Full scale: COCO train2017, the recipes' epochs, and what a GPU sustains in such a training, as an assumption.
COCO_IMAGES = 118_287
FULL_SCALE = (
    *("deformable_detr_r50", "dn_detr_r50", "dino_r50"),
    *("paq_deformable_detr_r50", "paq_dn_detr_r50", "paq_dino_r50"),
    *("dino_swin_l", "paq_dino_swin_l"),
)
SUSTAINED = (10.0, 40.0)


def take_in(folder: Path) -> None:
    """Copy the study's file and its results to docs/results/studies/NAME."""
    places = Places(folder)
    if not places.study_file.is_file() or not places.results.is_dir():
        raise SystemExit(f"{folder} holds no study with results")
    study = load_study(places.study_file)
    target = KEPT / study.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copyfile(places.study_file, target / "study.yaml")
    for file in sorted(places.results.glob("*/*/seed*.json")):
        copy = target / "results" / file.relative_to(places.results)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    size = sum(file.stat().st_size for file in KEPT.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{KEPT.relative_to(REPO)} has {size / 2**20:.1f} MiB, more than {MOST_BYTES / 2**20:.0f}")


def make_plan(root: Path) -> None:
    """Write plan.json: runs and hours of every study, and the arithmetic of full scale."""
    measured = read_results(KEPT)
    rows: list[dict[str, Any]] = []
    for file in sorted((REPO / "studies").glob("*.yaml")):
        study = load_study(file)
        places = Places(KEPT / study.name)
        runs = plan_runs(study, file=file, places=places, root=root)
        rows += [_plan_row(study, row) for row in forecast(runs, places, measured)]
    scale = []
    for name in FULL_SCALE:
        config = load_config(name)
        scale.append({"model": name, "epochs": config.epochs, "gflops": round(gflops(config), 2)})
    KEPT.mkdir(parents=True, exist_ok=True)
    PLAN.write_text(json.dumps({"runs": rows, "full_scale": scale}, indent=1) + "\n", encoding="utf-8")


def _plan_row(study: Study, row: Forecast) -> dict[str, Any]:
    return {
        "study": study.name,
        "about": study.about,
        "data": row.data,
        "variant": row.variant,
        "seeds": len(row.seeds),
        "steps": row.steps,
        "done": row.done,
        "hours": None if row.seconds is None else round(row.seconds * len(row.seeds) / 3600, 3),
        "source": row.source,
    }


def table(name: str, what: str) -> str:
    """Markdown of one table of a study that is kept."""
    if name == "plan":
        return {"runs": plan_table, "gpu": gpu_table}[what]()
    if not (KEPT / name / "study.yaml").is_file():
        return f"No run of `studies/{name}.yaml` is kept yet."
    report = kept_report(name)
    if what == "facts":
        return "\n".join(f"- {key}: {value}" for key, value in report.facts)
    try:
        return to_table(report.tables[what])
    except KeyError:
        data = what.partition("_")[2]
        if data in report.runs.study.data:
            return f"No run on `{data}` is kept yet."
        raise SystemExit(f"the study {name} has no table {what!r}") from None


@cache
def kept_report(name: str) -> StudyReport:
    """What the results of a study that is kept say."""
    command = f"paqdetr study studies/{name}.yaml --output runs/{name} --data-root DATA"
    return study_report(kept_study(name), read_results(KEPT / name / "results"), command=command)


@cache
def kept_study(name: str) -> Study:
    """The study's file as it was when its results were taken in."""
    return load_study(KEPT / name / "study.yaml")


def plan_table() -> str:
    """Runs, steps and hours of each study and data set."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _plan()["runs"]:
        groups.setdefault((row["study"], row["data"]), []).append(row)
    rows = []
    for (study, data), group in groups.items():
        hours = [row["hours"] for row in group]
        rows.append(
            {
                "study": study,
                "data": data,
                "variants": len(group),
                "runs": sum(row["seeds"] for row in group),
                "steps": group[0]["steps"],
                "done": sum(row["done"] for row in group),
                "hours": None if None in hours else sum(hours),
                "source": ", ".join(sorted({row["source"] for row in group} - {""})),
            }
        )
    columns = (
        Column("study", "study", "text"),
        Column("data", "data", "text"),
        Column("variants", "variants", "integer"),
        Column("runs", "runs", "integer"),
        Column("steps", "steps per run", "integer"),
        Column("done", "done", "integer"),
        Column("hours", "machine hours"),
        Column("source", "from", "text"),
    )
    return to_table(make_table("plan", "", columns, rows, empty=False))


def gpu_hours(*, gflops: float, images: int, epochs: int, tflops: float) -> float:
    """GPU hours of a training by arithmetic alone.

    A multiply-add is counted once in `gflops` and is two operations; a backward pass takes twice a forward pass.

    Args:
        gflops: of one image, as `paqdetr models` shows them.
        images: of an epoch.
        tflops: 10^12 operations a second that the GPU sustains in such a training: a fraction of what it is sold with.
    """
    return 2 * 3 * gflops * 1e9 * images * epochs / (tflops * 1e12) / 3600


def gpu_table() -> str:
    """GPU hours of COCO trainings by arithmetic."""
    rows = []
    for row in _plan()["full_scale"]:
        hours = [
            gpu_hours(gflops=row["gflops"], images=COCO_IMAGES, epochs=row["epochs"], tflops=tflops)
            for tflops in SUSTAINED
        ]
        rows.append({**row, "slow": round(hours[0]), "fast": round(hours[1])})
    slow, fast = SUSTAINED
    columns = (
        Column("model", "model", "text"),
        Column("epochs", "epochs of COCO", "integer"),
        Column("gflops", "GFLOPs per image"),
        Column("slow", f"GPU hours at {slow:.0f} TFLOP/s", "integer"),
        Column("fast", f"at {fast:.0f} TFLOP/s", "integer"),
    )
    return to_table(make_table("gpu", "", columns, rows))


def _plan() -> dict[str, Any]:
    if not PLAN.is_file():
        raise SystemExit(f"{PLAN.relative_to(REPO)} is missing: python tools/docs.py plan-studies DATA_ROOT")
    return json.loads(PLAN.read_text(encoding="utf-8"))
