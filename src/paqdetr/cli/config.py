"""`paqdetr config show`"""

from __future__ import annotations

from typing import Annotated

import typer

from paqdetr.cli.console import results

app = typer.Typer(help="Look at settings.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `show` a verb of its own."""


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A model or recipe, or a YAML file.", metavar="MODEL|CONFIG")],
    settings: Annotated[list[str] | None, typer.Argument(help="Overrides.", metavar="KEY=VALUE")] = None,
) -> None:
    """Print every setting of a model and its training as resolved, as YAML that `train` takes."""
    from paqdetr.config import load_config

    results.print(load_config(model, settings or []).to_yaml(), end="", soft_wrap=True)
