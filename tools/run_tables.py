"""The tables of kept results, in the README and in docs/results, the README's badges, and the list that `paqdetr models` shows.

A run is taken in with a test.json beside its checkpoint (`paqdetr eval RUN --split test --json RUN/test.json`). Kept are
settings, figures and the log, not weights; every number of the tables is read from there.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import yaml
from study_tables import kept_report

from paqdetr import __version__
from paqdetr.config import Config, idle_settings, load_config
from paqdetr.models import list_models
from paqdetr.runs import flat_settings

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "docs" / "results"
MEASURED = REPO / "src" / "paqdetr" / "configs" / "measured.yaml"


def take_in(name: str, run: Path, commands: str) -> None:
    """Copy what is worth keeping of a run to docs/results/NAME."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.yaml", "metrics.jsonl", "test.json"):
        shutil.copyfile(run / file, folder / file)
    (folder / "commands.txt").write_text(commands.strip() + "\n", encoding="utf-8")


def table() -> str:
    """Markdown rows of every run in docs/results; for the page there."""
    lines = [
        "| data | model | input | test AP | AP50 | AP after NMS | training | peak memory | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(folder) for folder in sorted(RESULTS.iterdir()) if (folder / "test.json").is_file()]
    return "\n".join(lines)


_GAINS = (  # the host that PaQ is put into, at nano size; the study that asks, and its claim
    ("`dino_nano`", "confirm", "PaQ raises AP."),
    ("two-stage Deformable DETR", "two_stage", "PaQ raises the AP of two-stage Deformable DETR."),
    ("the same with learned content", "two_stage", "And that of the host with learned content."),
    ("one-stage Deformable DETR", "one_stage", "PaQ raises the AP of one-stage Deformable DETR."),
)


def _gain(host: str, study: str, claim: str) -> str:
    (row,) = (
        row for row in kept_report(study).tables["verdicts"].rows if (row["claim"], row["data"]) == (claim, "digits")
    )
    return (
        f"over {host} **{row['effect']:+.3f}** AP ({row['low']:+.3f} to {row['high']:+.3f}, {row['seeds']} seeds, "
        f"{row['verdict']})"
    )


def headline() -> str:
    """The first numbers of the README."""
    depth = {name: table.rows for name, table in kept_report("pilot_depth").tables.items()}
    nano = "layers6_distinct"
    (host,) = (row for row in depth["figures_digits"] if row["variant"] == nano)
    minutes = sorted(row["cpu_minutes"] for row in depth["cost"] if (row["data"], row["variant"]) == ("digits", nano))
    span = " to ".join(dict.fromkeys((f"{minutes[0]:.0f}", f"{minutes[-1]:.0f}")))  # by machine
    speed = json.loads((RESULTS / "performance" / "whole_model.json").read_text(encoding="utf-8"))
    rows = [
        (
            "`dino_nano` trained on one CPU core",
            f"**{host['AP']:.3f}** AP ± {host['spread']:.3f} over {host['seeds']} seeds after {span} CPU minutes "
            "on images of small digits in clutter that it had not seen",
            "[study](docs/study.md)",
        ),
        (
            "Deformable DETR, ResNet-50, beside transformers' on a CPU",
            f"**{speed['inference']['paqdetr']['ratio']:.1f}** times as fast in inference, "
            f"{speed['training_step']['paqdetr']['ratio']:.1f} times in training; the same outputs to "
            f"{speed['largest_difference_of_outputs']:.0e}",
            "[performance](docs/performance.md#whole-model)",
        ),
        (
            "what PaQ adds on digits at equal steps, with 95 % intervals and the verdict of each study",
            "; ".join(_gain(*gain) for gain in _GAINS),
            "[study](docs/study.md)",
        ),
    ]
    lines = ["| what | measured here | more |", "|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


BADGES = REPO / "docs" / "assets" / "badges.svg"


def badges() -> str:
    """SVG: what the project's own files say of it."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    facts = [
        ("version", __version__),
        ("Python", project["requires-python"].removeprefix(">=") + "+"),
        ("models", str(len(list_models()))),
        ("licence", project["license"]),
    ]
    parts, left = [], 0
    for name, value in facts:
        first, second = 7 * len(name) + 12, 7 * len(value) + 12
        for x, width, colour, text in ((left, first, "#444", name), (left + first, second, "#0a6aa8", value)):
            parts.append(f'<rect x="{x}" width="{width}" height="20" fill="{colour}"/>')
            parts.append(f'<text x="{x + 6}" y="14" textLength="{width - 12}">{text}</text>')
        left += first + second + 6
    words = ", ".join(f"{name} {value}" for name, value in facts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="20" role="img" aria-label="{words}"'
    return (
        f'{head} font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def measured() -> str:
    """YAML: model -> what it reached on the test split of which data."""
    rows: dict[str, list[dict[str, object]]] = {}
    for folder in sorted(RESULTS.iterdir()):
        if not (folder / "test.json").is_file():
            continue
        figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
        row: dict[str, object] = {"data": folder.name, "AP": round(figures["AP"], 3), "AP50": round(figures["AP50"], 3)}
        model, then = _model_of(load_config(folder / "config.yaml"))
        rows.setdefault(model, []).append(row | ({"settings": then} if then else {}))
    head = "# Written by tools/docs.py from docs/results: one seed each, on the test split.\n"
    return head + yaml.safe_dump(rows, sort_keys=True)


def _model_of(config: Config) -> tuple[str, str]:
    """The model of a kept run, by name or else the one with the nearest settings, and which of the run's differ from today's:
    "decoder_layers=3"."""
    kept = flat_settings(config)
    keys = [key for key in kept if key.startswith(("model.", "loss."))]
    keys.remove("model.num_classes")  # the data's
    idle, changed = idle_settings(config, keys), {}
    for name in list_models():
        known = flat_settings(load_config(name))
        changed[name] = [key for key in keys if known[key] != kept[key] and key not in idle]
    nearest = config.name if config.name in changed else min(changed, key=lambda name: len(changed[name]))
    return nearest, ", ".join(f"{key.partition('.')[2]}={kept[key]}" for key in changed[nearest])


def _row(folder: Path) -> str:
    figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    config = load_config(folder / "config.yaml")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(record for record in records if record["kind"] == "start")
    finished = next(record for record in records if record["kind"] == "finished")
    cells = [
        f"[{folder.name}]({folder.name}/commands.txt)",
        ", ".join(filter(None, _model_of(config))),
        str(config.image_size),
        f"{figures['AP']:.3f}",
        f"{figures['AP50']:.3f}",
        f"{figures['AP_nms']:.3f}",
        f"{finished['seconds'] / 60:.1f} min",
        f"{finished['peak_memory_gib']:.1f} GiB",
        f"{start['cores']} CPU cores, torch {start['torch'].split('+')[0]}",
    ]
    return "| " + " | ".join(cells) + " |"
