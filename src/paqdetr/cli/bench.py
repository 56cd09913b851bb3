"""`paqdetr bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paqdetr.cli import options
from paqdetr.cli.console import OutputFiles, progress_bar, results, table
from paqdetr.errors import ConfigError
from paqdetr.values import MAX_BATCH

_TIMES = ("median", "fastest", "slowest", "times faster")


def bench(
    model: options.Model,
    settings: options.Settings = None,
    *,
    against: Annotated[str | None, typer.Option(help="Another model to compare with.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=64, max=8192, help="Side of the images, in pixels; 640, or a file's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images per forward pass.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Timed calls per median.")] = 5,
    device: options.Device = None,
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Time a model: attention, inference and a training step.

    In turns with what it is compared with. Of a run's folder, a .safetensors file or an exported model: inference alone.
    """
    from paqdetr.config import load_config, parse_overrides
    from paqdetr.loading import require_model

    files = OutputFiles("paqdetr bench", overwrite=overwrite, json=json_file)
    names = [model] if against is None else [model, against]
    if any(map(_is_file, names)):
        if settings:
            raise ConfigError(f"{settings[0]}: a trained model has its own settings", "leave it out")
        for name in filter(_is_file, names):
            require_model(name)
        from paqdetr.training.bench import bench_files

        with progress_bar("bench") as progress:
            timed = bench_files(
                names, image_size=image_size, batch_size=batch_size, rounds=rounds, device=device, progress=progress
            )
        threads = timed["machine"]["threads"]
        title = f"Inference, batches of {batch_size}, {threads} threads. Milliseconds: median, fastest and slowest of {rounds}."
        made = table(title, ("model", "run by", "size"), _TIMES)
        for name, row in timed["inference"].items():
            size = "x".join(map(str, timed["image_size"][name]))
            made.add_row(name, timed["engine"][name], size, *_columns(row, is_base=name == names[-1]))
        results.print(made)
        files.write("json", timed)
        return
    image_size, overrides = image_size or 640, parse_overrides(settings or [])
    for name in names:
        load_config(name, overrides)
    from paqdetr.training.bench import bench as measure

    with progress_bar("bench") as progress:
        found = measure(
            model,
            against=against,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            rounds=rounds,
            progress=progress,
            settings=overrides,
        )
    images = f"{batch_size} image{'s' * (batch_size > 1)} of {image_size}x{image_size}"
    count = found.machine["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if found.device == "cpu" else ""
    title = f"{model}, {images}, {found.device}{threads}. Milliseconds: median, fastest and slowest of {rounds}."
    made = table(title, ("part", "of"), _TIMES)
    parts = {
        "attention": (found.attention, "reference"),  # forward and backward
        "inference": (found.inference, against or model),
        "training step": (found.training_step, against or model),
    }
    for part, (figures, base) in parts.items():
        for name, row in figures.items():
            made.add_row(part, name, *_columns(row, is_base=name == base))
        made.add_section()
    results.print(made)
    speed = found.images_per_second
    kept = ", ".join(f"{name} {value:.0f} MiB" for name, value in found.saved_mib.items())
    for line in (
        f"images per second: {speed['inference']:.1f} in use, {speed['training_step']:.1f} in training",
        f"kept for backward in a step: {kept}",
        f"peak memory: {found.peak_memory_gib:.2f} GiB",
    ):
        results.print(line)
    files.write("json", found.to_json())


def _is_file(model: str) -> bool:
    """Whether it is a trained or exported model rather than the name of an architecture."""
    from paqdetr.loading import is_exported

    return is_exported(model) or model.endswith(".safetensors") or Path(model).is_dir()


def _columns(row: dict[str, Any], *, is_base: bool) -> list[str]:
    times = [f"{row[key]:.1f}" for key in ("median_ms", "min_ms", "max_ms")]
    return [*times, "" if is_base else f"{row['ratio']:.2f}x"]
