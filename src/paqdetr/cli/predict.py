"""`paqdetr predict`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paqdetr.cli.console import Device, Ended, Overwrite, errors, print_styled, progress_bar, results
from paqdetr.errors import ConfigError, DataError


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file or a run's folder.", metavar="CHECKPOINT")],
    sources: Annotated[list[Path], typer.Argument(help="Images and folders of images.", metavar="IMAGE|DIR")],
    *,
    output: Annotated[Path, typer.Option(help="Folder for drawn images and predictions.json.")],
    threshold: Annotated[float, typer.Option(help="The least score of a detection, from 0 to 1.")] = 0.3,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO json with these images, whose image ids the results take.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Draw what a detector finds, and write it as COCO results."""
    from paqdetr.environment import peak_memory, require_device
    from paqdetr.evaluation import predict_folder
    from paqdetr.models import load

    if not 0 <= threshold <= 1:  # a range of the option would call nan too large
        raise ConfigError(
            f"--threshold: expected a number from 0 to 1, found {threshold}",
            "`paqdetr predict --help` shows how it is used",
        )
    model = load(checkpoint, device=str(require_device(device)))
    try:
        with progress_bar("predict") as progress:
            done = predict_folder(
                model,
                sources,
                output=output,
                threshold=threshold,
                annotations=annotations,
                overwrite=overwrite,
                progress=progress,
            )
    except KeyboardInterrupt:
        print_styled(
            errors,
            ("interrupted:", "bold"),
            f" what is drawn is in {output}; the same command starts over there",
        )
        raise Ended(130) from None
    count = sum(map(len, done.found.values()))
    results.print(
        f"{count} objects over {threshold} in {len(done.found)} images: {done.output}, {done.results_file}",
        soft_wrap=True,
    )
    results.print(f"peak memory: {peak_memory():.2f} GiB")
    for reason in done.unreadable.values():
        print_styled(errors, ("left out:", "bold yellow"), f" {reason}")
    if done.unreadable:
        raise DataError(
            f"{len(done.unreadable)} images could not be read; the others are done", "replace or remove them"
        )
