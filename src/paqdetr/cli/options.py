"""What several verbs are given, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paqdetr.values import MAX_BATCH, MAX_RESAMPLES, MAX_SEED

Model = Annotated[
    str,
    typer.Argument(help="A model or recipe (`paqdetr config list`), or a YAML file.", metavar="MODEL|CONFIG"),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, such as epochs=12 model.num_patterns=32.", metavar="KEY=VALUE"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...: the best there is if not given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist, whoever wrote them.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of all random draws.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="It changes the speed, never a figure.")]
Resamples = Annotated[
    int, typer.Option(min=100, max=MAX_RESAMPLES, help="Resamples of the images behind an interval.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
