"""`paqdetr predict`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paqdetr.cli.console import errors, print_styled, progress_bar, results
from paqdetr.cli.options import Device
from paqdetr.errors import DataError


def predict(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .safetensors file or a run's folder.", metavar="CHECKPOINT")
    ],
    sources: Annotated[list[Path], typer.Argument(help="Images and folders of images.", metavar="IMAGE|DIR")],
    *,
    output: Annotated[Path, typer.Option(help="Folder for drawn images and predictions.json.")],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="The least score of a detection.")] = 0.3,
    device: Device = None,
) -> None:
    """Draw what a detector finds, and write it as COCO results."""
    from paqdetr.engine import predict_folder
    from paqdetr.engine.device import require_device
    from paqdetr.engine.memory import peak_memory
    from paqdetr.models import load

    model = load(checkpoint, device=str(require_device(device)))
    with progress_bar("predict") as progress:
        done = predict_folder(model, sources, output=output, threshold=threshold, progress=progress)
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
