"""What several verbs are given, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
