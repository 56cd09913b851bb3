"""`paqdetr data make|check`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from paqdetr.cli.console import errors, print_styled, progress_bar, results
from paqdetr.errors import ConfigError, DataError

app = typer.Typer(help="Make and check data sets.", no_args_is_help=True)


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="digits", metavar="NAME")],
    *,
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 320,
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 1600,
    val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 300,
    test: Annotated[int, typer.Option(min=1, help="Test images.")] = 1000,
    min_objects: Annotated[int, typer.Option(help="Fewest objects an image.")] = 3,
    max_objects: Annotated[int, typer.Option(help="Most objects an image.")] = 12,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Make a data set from what ships with the installed libraries; no download."""
    from paqdetr.data.digits import make_digits

    if name != "digits":
        raise ConfigError(f"there is no recipe for a data set {name!r}", "the only one is 'digits'")
    with progress_bar("make digits") as progress:
        folder = make_digits(
            output,
            seed=seed,
            size=size,
            train=train,
            val=val,
            test=test,
            min_objects=min_objects,
            max_objects=max_objects,
            workers=workers,
            progress=progress,
        )
    results.print(f"{folder}: {train} train, {val} val, {test} test images, seed {seed}", soft_wrap=True)


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="Folder of the data set.", metavar="DIR")]) -> None:
    """Read every image and annotation once and report what is wrong; exit 2 if training would fail."""
    from paqdetr.data.check import check_dataset

    with progress_bar("check") as progress:
        report = check_dataset(folder, progress=progress)
    table = Table(title=str(folder), title_justify="left")
    for column in ("split", "images", "without boxes", "boxes", "classes"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in report.splits.items():
        used = sum(count > 0 for count in split.boxes_per_class.values())
        table.add_row(name, str(split.images), str(split.images_without_boxes), str(split.boxes), str(used))
    results.print(table)
    for problem in report.problems:
        colour = "red" if problem.severity == "error" else "yellow"
        print_styled(
            results, (problem.severity, colour), f" {problem.split} {problem.subject}: {problem.message}"
        )
    if report.errors:
        raise DataError(f"{folder}: {len(report.errors)} errors", "correct them before training")
    errors.print(f"no errors, {len(report.warnings)} warnings")
