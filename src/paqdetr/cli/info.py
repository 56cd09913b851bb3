"""`paqdetr info`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from paqdetr.cli import options
from paqdetr.cli.console import print_columns, results
from paqdetr.errors import ConfigError
from paqdetr.text import figure, some

_UNITS = {
    "GFLOPs": " for one image of 800 x 1333",
    "published": " AP on COCO val2017 after 12 epochs, by others",
    "measured": " test AP",
}


def info(
    what: Annotated[
        str,
        typer.Argument(
            help="A model or recipe, a run's folder, or a model file.",
            metavar="MODEL|RUN|FILE",
            autocompletion=options.complete_model,
        ),
    ],
) -> None:
    """Show what a model, a run or a model file is."""
    from paqdetr.checkpoint import find_checkpoint
    from paqdetr.loading import is_exported

    path = find_checkpoint(what) if what.startswith("hf:") else Path(what)
    if (path / "model.safetensors").is_file():  # of `save_pretrained`
        path /= "model.safetensors"
    if path.is_dir():
        title, facts = _of_run(path)
    elif is_exported(path):
        title, facts = _of_exported(path)
    elif path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"):
        title, facts = _of_checkpoint(path)
    elif "/" in what and not path.exists():
        raise ConfigError(f"{what}: no such file or folder", "name a run's folder, a model file, or a model")
    else:
        title, facts = _of_model(what)
    results.print(title)
    print_columns([row for row in facts.items() if row[1]])


def _of_model(name: str) -> tuple[str, dict[str, str]]:
    from paqdetr.cli.models import figures_of
    from paqdetr.config import describe_config, known_figures, list_configs, load_config

    config, known = load_config(name), list_configs()
    costs = known_figures("costs").get(name)
    facts = {} if costs is None else figures_of(name, costs)
    for key, unit in _UNITS.items():
        if facts.get(key, "-") != "-":
            facts[key] += unit
    return f"{name}: {describe_config(name) if name in known else f'settings of {config.name}'}", facts | {
        "queries": f"{config.model.num_queries}, {config.model.decoder_layers} decoder layers",
        "image size": _size(config.image_size),
        "training": f"epochs={config.epochs} batch_size={config.batch_size} lr={config.lr:g}",
        "recipes": ", ".join(recipe for recipe in list_configs("recipe", f"{name}_*")),
        "settings": f"paqdetr config show {name}",
        "what it takes": f"paqdetr plan {name} --data DIR",
        "train it": f"paqdetr train {name} --data DIR --output DIR",
    }


def _of_run(folder: Path) -> tuple[str, dict[str, str]]:
    from paqdetr.config import command_to_resume, load_config
    from paqdetr.files import read_json
    from paqdetr.runs import Run, best_evaluation, describe_status

    run = Run(folder)
    if not run.config_file.is_file():
        raise ConfigError(
            f"{folder}: no run: it has no config.yaml", "`paqdetr data check` looks at data sets; name a run's folder"
        )
    config, records = load_config(run.config_file), run.records()
    of_kind = {record.get("kind"): record for record in records}  # the last of each
    best, start, finished = best_evaluation(records), of_kind.get("start"), of_kind.get("finished")
    began = read_json(run.environment_file)[-1] if run.environment_file.is_file() else {}
    title, place = f"{folder}: {describe_status(records, config)}", shlex.quote(str(folder))
    facts = {
        "model": f"{config.name}, image size {_size(config.image_size)}",
        "begun": f"{began.get('started', '?')}, on {start['device']}" if start else "",
        "best": f"epoch {best['epoch']}: {_figures(best)}" if best else "not evaluated yet",
        "took": f"{finished['seconds'] / 60:.1f} min, {finished['peak_memory_gib']:.2f} GiB" if finished else "",
        "checkpoints": ", ".join(path.name for path in (run.best, run.last) if path.is_file()) or "none yet",
    }
    if not finished:
        command = str(began.get("command", ""))
        if "data" in began and began.get("processes", 1) == 1:
            return title, facts | {"go on with": command_to_resume(folder)}
        again = "" if "--resume" in command or not command.startswith(("paqdetr", "torchrun")) else " --resume"
        command = command or "the call that began it, with resume=True"
        return title, facts | {"in the folder": str(began.get("directory", "")), "go on with": f"{command}{again}"}
    return title, facts | {
        "measure it": f"paqdetr eval {place} --data DIR --split test",
        "look inside": f"paqdetr analyze {place} --data DIR --output DIR",
        "use it": f"paqdetr predict {place} SOURCE",
        "export it": f"paqdetr export {place}",
    }


def _of_checkpoint(path: Path) -> tuple[str, dict[str, str]]:
    from paqdetr.checkpoint import command_to_train_from, describe_checkpoint, read_header

    header = read_header(path)
    if "name" not in header:
        raise ConfigError(f"{path}: the state of a training, not a model", "name the run's folder")
    config, classes, preprocessing = describe_checkpoint(header, str(path))
    return f"{path}: checkpoint of {header['name']}, {path.stat().st_size / 1e6:.1f} MB", {
        "classes": _classes(list(classes.names)),
        "queries": str(config.model.num_queries),
        "image size": _size(config.image_size),
        "trained": f"{header['step']} steps, {header['epoch']} epochs" if header.get("epoch") else "",
        "validation": _figures(header["metrics"]) if header.get("metrics") else "",
        "written by": f"paqdetr {header.get('version', '?')}",
        "use it": f"paqdetr predict {shlex.quote(str(path))} SOURCE",
        "train from it": command_to_train_from(path, config.name, config.model, preprocessing) or "",
    }


def _of_exported(path: Path) -> tuple[str, dict[str, str]]:
    from paqdetr.loading import open_any_exported

    model = open_any_exported(path)
    about, size = model.info, model.info.preprocessing
    point = {"threshold": about.threshold, "nms": about.nms}
    return f"{path}: {about.name} for {model.engine.name}, {path.stat().st_size / 1e6:.1f} MB", {
        "classes": _classes(list(about.classes.names)),
        "image size": f"{size.height} x {size.width}, stretched",
        "precision": about.precision + (", raw graph" if about.raw else ""),
        "detections": f"at most {about.max_detections} of an image"
        + "".join(f", {key} {value:g}" for key, value in point.items() if value is not None),
        "made with": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
        "use it": f"paqdetr predict {shlex.quote(str(path))} SOURCE",
    }


def _figures(metrics: dict[str, Any]) -> str:
    labels = {"AP": "AP", "AP50": "AP50", "AP_nms": "AP after NMS"}
    return ", ".join(f"{label} {figure(metrics[key])}" for key, label in labels.items() if key in metrics)


def _classes(names: list[str]) -> str:
    return f"{len(names)}: {some(names, 12)}"


def _size(size: Any) -> str:
    return f"long side {size}" if isinstance(size, int) else f"short side {size[0]}, long side at most {size[1]}"
