"""`paqdetr config list | show`"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from paqdetr.cli.console import Model, Settings, print_columns, print_styled, results
from paqdetr.errors import ConfigError

app = typer.Typer(help="List models and recipes; show their settings.", no_args_is_help=True)


@app.command("list")
def list_names(pattern: Annotated[str, typer.Argument(help='Which ones, such as "*_finetune".')] = "*") -> None:
    """List what `train` takes: models, and recipes that train one for a certain purpose."""
    from paqdetr.config import list_configs
    from paqdetr.config.files import describe_training, hosts_of

    models, recipes = list_configs("model", pattern), list_configs("recipe", pattern)
    if not models and not recipes:
        raise ConfigError(f"no model or recipe is called {pattern!r}", "`paqdetr config list` lists them all")
    for title, names in sorted(hosts_of(models + recipes).items()):
        print_styled(results, (title, "bold"))
        kinds = {name: "recipe" if name in recipes else "model" for name in names}
        # One line each: without what the title says already, and without details in brackets.
        texts = [re.sub(r" \([^)]*\)", "", describe_training(name)).removeprefix(f"{title}, ") for name in names]
        print_columns([(f"  {name}", kind, text) for (name, kind), text in zip(kinds.items(), texts, strict=True)])


@app.command()
def show(model: Model, settings: Settings = None) -> None:
    """Print every setting of a model and its training as resolved, as YAML that `train` takes."""
    from paqdetr.config import load_config

    results.print(load_config(model, settings or []).to_yaml(), end="")
