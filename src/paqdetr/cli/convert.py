"""`paqdetr convert`"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from paqdetr.cli import options
from paqdetr.cli.console import OutputFiles, note, results, table
from paqdetr.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from paqdetr.convert import ConversionReport

# The keys of `paqdetr.convert.LAYOUTS`, for which torch is needed, and our own.
_ORIGINS = (
    *("dino", "detrex", "dn_detr", "deformable_detr", "relation_detr", "mmdet_dino", "co_detr", "ddq", "transformers"),
    "paqdetr",
)


def convert(
    source: Annotated[
        Path, typer.Argument(help="A .pth, a .safetensors, or a folder of transformers' save_pretrained.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="What the file does not contain, such as num_heads=8 num_queries=300 classes=coco.",
            metavar="FACT=VALUE",
        ),
    ] = None,
    *,
    origin: Annotated[str, typer.Option("--from", help=f"{', '.join(_ORIGINS[:-1])} or {_ORIGINS[-1]}.")],
    output: Annotated[Path, typer.Option(help="The checkpoint to write, .safetensors.")],
    model: Annotated[
        str | None,
        typer.Option("--as", help="A model of the same host to become, such as paq_dino_r50.", metavar="MODEL"),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out unknown tensors, start missing ones anew.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what became of every tensor to this file.")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Turn weights of another program into a checkpoint."""
    from paqdetr.checkpoint import command_to_train_from
    from paqdetr.config import parse_overrides
    from paqdetr.files import open_regular

    if origin not in _ORIGINS:
        raise ConfigError(f"--from {origin}: no such program", f"choose among {', '.join(_ORIGINS)}")
    overrides = parse_overrides(settings or [])
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: checkpoints are .safetensors", "change the ending")
    if output.exists() and not overwrite:  # an earlier conversion too: somebody may be training from it
        raise ConfigError(
            f"--output {output}: the file exists, and nothing is overwritten",
            "choose another, or replace it with --overwrite",
        )
    if output.exists() and output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--output {output}: the file belongs to what is converted", "choose another place")
    files = OutputFiles("paqdetr convert", overwrite=overwrite, output=output, json=json_file)
    if not source.is_dir():
        open_regular(source, error=CheckpointError).close()
    from paqdetr.convert import convert_checkpoint  # takes seconds: after what a typo can be in

    detector, report = convert_checkpoint(source, origin=origin, model=model, partial=partial, settings=overrides)
    detector.save(output, converted={"origin": report.origin, "source": report.source, **report.counts()})
    results.print(f"{report.source} ({report.origin}) as {report.model}")
    results.print(_tensors(report))
    results.print(_settings(report))
    for kind, reasons in (("dropped", report.dropped), ("starts anew", report.fresh)):
        for reason, count in Counter(_general(reasons.values())).most_common():
            results.print(f"{kind}: {count} x {reason}")
    for line in report.notes:
        note(line)
    results.print(f"checkpoint: {output}")
    files.write("json", report.to_dict())
    command = command_to_train_from(output, report.model, detector.config, detector.preprocessing)
    if command is not None:
        results.print(f"to train it: {command}")


def _tensors(report: ConversionReport) -> Table:
    """Tensors of the model by part: as they were, under another name, anew."""
    made = table("tensors of the model", ("part",), ("same name", "renamed", "starts anew"))
    kinds: tuple[Iterable[str], ...] = (report.kept, report.renamed, report.fresh)
    columns = [Counter(key.split(".")[0] for key in keys) for keys in kinds]
    for part in dict.fromkeys(key for column in columns for key in column):
        made.add_row(part, *(str(column[part] or "-") for column in columns))
    made.add_section()
    made.add_row("all", *(str(column.total() or "-") for column in columns))
    return made


def _settings(report: ConversionReport) -> Table:
    made = table("settings, and how they are known", ("setting", "value", "from"))
    for key, setting in report.settings.items():
        made.add_row(key, json.dumps(setting.value), setting.known_from)
    return made


def _general(reasons: Iterable[str]) -> Iterable[str]:
    """Reasons without the tensor that each of them names."""
    for reason in reasons:
        if reason.startswith("the same tensor as"):
            yield "a second name of another tensor, verified equal"
        else:
            yield reason.split(" (")[0]
