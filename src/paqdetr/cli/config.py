"""`paqdetr config list | show`"""

from __future__ import annotations

from typing import Annotated

import typer

from paqdetr.cli.console import Model, Settings, print_columns, results
from paqdetr.errors import ConfigError

app = typer.Typer(help="List models and recipes; show their settings.", no_args_is_help=True)


@app.command("list")
def list_names(pattern: Annotated[str, typer.Argument(help='Which ones, such as "*_finetune".')] = "*") -> None:
    """List what `train` takes: models, and recipes that train one for a certain purpose."""
    from paqdetr.config import describe_config, list_configs

    names = [(name, "recipe") for name in list_configs("recipe", pattern)]
    names += [(name, "model") for name in list_configs("model", pattern)]
    rows = [(name, kind, describe_config(name)) for name, kind in names]
    if not rows:
        raise ConfigError(f"no model or recipe is called {pattern!r}", "`paqdetr config list` lists them all")
    print_columns(rows)


@app.command()
def show(model: Model, settings: Settings = None) -> None:
    """Print every setting of a model and its training as resolved, as YAML that `train` takes."""
    from paqdetr.config import load_config

    results.print(load_config(model, settings or []).to_yaml(), end="")
