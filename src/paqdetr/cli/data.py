"""`paqdetr data make|check|stats|preview|convert|split`"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paqdetr._threads import quick_imports
from paqdetr.cli import options
from paqdetr.cli.console import OutputFiles, errors, note, print_styled, progress_bar, results, table
from paqdetr.errors import ConfigError, DataError
from paqdetr.values import MAX_WORKERS

if TYPE_CHECKING:
    from paqdetr.data.check import CheckReport
    from paqdetr.data.convert import Conversion

app = typer.Typer(help="Make, check, look at and convert data sets.", no_args_is_help=True)

_Data = Annotated[Path, typer.Argument(help="Folder of the data set, or its data.yaml.", metavar="DIR")]
_Source = Annotated[Path, typer.Argument(help="Folder of the data set, or its data.yaml.", metavar="SRC")]
_Target = Annotated[Path, typer.Argument(help="Folder to make; nothing is overwritten.", metavar="DST")]
_Link = Annotated[bool, typer.Option("--link", help="Hard links to the images instead of copies.")]
_COLOURS = {"error": "red", "warning": "yellow"}
_Json = Annotated[Path | None, typer.Option("--json", help="Write everything to this json file too.")]


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="digits", metavar="NAME")],
    *,
    output: Annotated[Path, options.output(help="Folder to make.")],
    seed: options.Seed = 0,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 320,
    train: Annotated[int, typer.Option(min=1, max=10**7, help="Training images.")] = 1600,
    val: Annotated[int, typer.Option(min=1, max=10**7, help="Validation images.")] = 300,
    test: Annotated[int, typer.Option(min=1, max=10**7, help="Test images.")] = 1000,
    min_objects: Annotated[int, typer.Option(help="Fewest objects per image.")] = 3,
    max_objects: Annotated[int, typer.Option(help="Most objects per image.")] = 12,
    workers: Annotated[int, options.machine(min=1, max=MAX_WORKERS, help="Processes.")] = 1,
) -> None:
    """Make the data set of handwritten digits, without a download."""
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
    results.print(f"{folder}: {train} train, {val} val, {test} test images, seed {seed}")


@app.command()
def check(
    folder: _Data,
    *,
    json_file: _Json = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MAX_WORKERS, help="Threads that decode; the number of cores if not given.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Findings per kind that are printed; --json has all.")] = 10,
    overwrite: options.Overwrite = False,
) -> None:
    """Read every image and annotation, and report what is wrong.

    Exit code 2 if training would fail.
    """
    from paqdetr.data.check import check_dataset

    files = OutputFiles("paqdetr data check", overwrite=overwrite, json=json_file)
    with progress_bar("check") as progress:
        report = check_dataset(folder, workers=workers or os.cpu_count(), progress=progress)
    _print_report(report, title=f"{report.root} ({report.format})", show=show)
    files.write("json", {"data": str(folder), **report.to_json()})
    if report.errors:
        raise DataError(f"{folder}: {report.number_of('error')} errors", "correct them before training")
    errors.print(f"no errors, {report.number_of('warning')} warnings")


@app.command()
def stats(
    folder: _Data,
    *,
    output: Annotated[Path, typer.Option(help="PNG file to draw.")] = Path("stats.png"),
    json_file: _Json = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw number, size, place and shape of boxes, from annotations."""
    from paqdetr.data.stats import dataset_stats, draw_stats

    _require_png(output)
    files = OutputFiles("paqdetr data stats", overwrite=overwrite, output=output, json=json_file)
    found = dataset_stats(folder)
    figures = {split: one.to_json() for split, one in found.items()}
    results.print(str(folder))
    made = table(None, ("split",), ("images", "without boxes", "boxes", "crowds", "small", "medium", "large"))
    for split, one in figures.items():
        counts = (one[key] for key in ("images", "images_without_boxes", "boxes", "crowds"))
        made.add_row(split, *map(str, counts), *map(str, one["box_sizes"].values()))
    results.print(made)
    drawn = draw_stats(found, output, title=str(folder), overwrite=overwrite)
    results.print(f"drawn: {drawn}")
    files.write("json", {"data": str(folder), "splits": figures})


@app.command()
def preview(
    folder: _Data,
    settings: options.Settings = None,
    *,
    model: Annotated[str, typer.Option(help="The model, recipe or YAML file whose settings count.")] = "paq_dino_nano",
    output: Annotated[Path, typer.Option(help="PNG file to draw.")] = Path("preview.png"),
    split: Annotated[str, typer.Option(help="Split to show.")] = "train",
    batches: Annotated[int, typer.Option(min=1, max=100, help="Batches, one per row.")] = 3,
    epoch: Annotated[int, typer.Option(min=0, max=1_000_000, help="Epoch whose first batches are shown.")] = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw training batches as a model gets them.

    Augmented, padded (purple), with their boxes.
    """
    from paqdetr.config import load_config, parse_overrides
    from paqdetr.data.dataset import open_split

    _require_png(output)
    OutputFiles("paqdetr data preview", overwrite=overwrite, output=output)
    config = load_config(model, {"workers": 0, **parse_overrides(settings or [])})
    opened = open_split(folder, split)
    with quick_imports():
        from paqdetr.data.preview import preview_batches
        from paqdetr.preprocessing import Normalization, Preprocessing

    # Pixels are drawn as they were: how a backbone wants them is not asked of timm, which takes seconds to import.
    preprocessing = Preprocessing.of(config, Normalization((0, 0, 0), (1, 1, 1)))
    drawn = preview_batches(config, opened, preprocessing, output, batches=batches, epoch=epoch, overwrite=overwrite)
    results.print(f"drawn: {drawn}")


@app.command()
def convert(
    source: _Source, target: _Target, *, to: Annotated[str, typer.Option(help="coco, voc or yolo")], link: _Link = False
) -> None:
    """Write a data set as COCO, Pascal VOC or YOLO.

    What that format cannot hold is reported.
    """
    from paqdetr.data.convert import convert_dataset

    with progress_bar("convert") as progress:
        done = convert_dataset(source, target, to=to, link=link, progress=progress)
    _print_conversion(done, f"{target}: {to}")


@app.command()
def split(
    source: _Source,
    target: _Target,
    *,
    val: Annotated[float, typer.Option(help="Share of the training images that becomes val.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the training images that becomes test.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    link: _Link = False,
) -> None:
    """Write a data set as COCO with a val or test split cut from train.

    Near-duplicates stay together.
    """
    from paqdetr.data.split import split_dataset

    with progress_bar("split") as progress:
        done = split_dataset(source, target, val=val, test=test, seed=seed, link=link, progress=progress)
    _print_conversion(done, f"{target}: coco")


def _print_conversion(done: Conversion, what: str) -> None:
    counts = (f"{split} {count} images {done.boxes[split]} boxes" for split, count in done.images.items())
    results.print(f"{what} from {done.format}: {', '.join(counts)}")
    for lost, count in done.losses.items():
        note(f"{lost}: {count}")


def _print_report(report: CheckReport, *, title: str, show: int) -> None:
    results.print(title)
    for severity, sentence in report.summary():
        print_styled(results, (severity, _COLOURS[severity]), f": {sentence}")
    made = table(
        None, ("split",), ("images", "without boxes", "boxes", "crowds", "classes", "small", "medium", "large")
    )
    for name, split in report.splits.items():
        used = sum(count > 0 for count in split.boxes_per_class.values())
        sizes = split.box_sizes
        numbers = (split.images, split.images_without_boxes, split.boxes, split.crowds, used)
        made.add_row(name, *map(str, (*numbers, sizes.small, sizes.medium, sizes.large)))
    results.print(made)
    _print_classes(report)
    _print_sizes(report)
    unusual = [
        f"{name}: " + ", ".join(f"{count} {trait}" for trait, count in split.traits.items())
        for name, split in report.splits.items()
        if split.traits
    ]
    if unusual:
        results.print(f"images out of the ordinary, which are converted: {'; '.join(unusual)}")
    printed: dict[tuple[str, str, str], int] = defaultdict(int)
    for problem in sorted(report.problems, key=lambda problem: problem.severity):  # errors first
        key = (problem.split, problem.severity, problem.kind)
        printed[key] += 1
        colour = _COLOURS[problem.severity]
        if printed[key] <= show:
            place = " ".join(part for part in (problem.split, problem.subject) if part)
            line = f" [{problem.kind}] {place}: {problem.message}"
            print_styled(results, (problem.severity, colour), line)
        elif printed[key] == show + 1:
            more = report.counts[key] - show
            print_styled(
                results, (problem.severity, colour), f" [{problem.kind}] {problem.split}: {more} more of this kind"
            )


def _print_classes(report: CheckReport) -> None:
    """Boxes of every class by split, up to a length that can be read."""
    splits = list(report.splits.values())
    names = list(dict.fromkeys(name for split in splits for name in split.boxes_per_class))
    made = table(None, ("boxes of class",), tuple(report.splits))
    order = sorted(names, key=lambda name: -sum(split.boxes_per_class.get(name, 0) for split in splits))
    shown = order if len(order) <= 30 else [*order[:10], *order[-10:]]
    for name in shown:
        made.add_row(name, *(str(split.boxes_per_class.get(name, 0)) for split in splits))
    if names:
        results.print(made)
    if len(shown) < len(order):
        results.print(f"(the 10 most and the 10 least frequent of {len(order)} classes)")


def _print_sizes(report: CheckReport) -> None:
    """How many boxes are how large, in bins that double."""
    splits = report.splits.values()
    made = table(None, ("boxes with a side of",), tuple(report.splits))
    edges = max((list(split.box_sizes.histogram) for split in splits), key=len)
    used = [n for n, edge in enumerate(edges) if any(split.box_sizes.histogram.get(edge) for split in splits)]
    for n in used and range(used[0], used[-1] + 1):
        upper = f" to {edges[n + 1]}" if n + 1 < len(edges) else " and more"
        made.add_row(f"{edges[n]}{upper} px", *(str(split.box_sizes.histogram.get(edges[n], 0)) for split in splits))
    if used:
        results.print(made)


def _require_png(output: Path) -> None:
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output}: the picture is a PNG", "name a file that ends in .png")
