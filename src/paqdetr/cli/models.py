"""`paqdetr models` and `paqdetr config list | show`: what there is to train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from paqdetr.cli import options
from paqdetr.cli.console import errors, print_columns, print_styled, progress_bar, results
from paqdetr.errors import ConfigError

config = typer.Typer(help="List models and recipes; show their settings.", no_args_is_help=True)
# Of the image behind the costs that come with the package.
_HEIGHT, _WIDTH = 800, 1333


def models(
    pattern: Annotated[str, typer.Argument(help='Which models, such as "paq_*".')] = "*",
    *,
    height: Annotated[
        int,
        typer.Option(
            min=32,
            max=16_384,
            help="Height of the image whose FLOPs are shown, in pixels; other sizes are counted, slowly.",
        ),
    ] = _HEIGHT,
    width: Annotated[int, typer.Option(min=32, max=16_384)] = _WIDTH,
) -> None:
    """List models: parameters, FLOPs, published and measured AP."""
    from paqdetr.config import known_figures, list_configs  # without torch, so at once

    names = list_configs("model", pattern)
    if not names:
        raise ConfigError(f"no model is called {pattern!r}", "`paqdetr models` lists them all")
    known = (height, width) == (_HEIGHT, _WIDTH)
    costs = known_figures("costs") if known else _count(names, height, width)
    rows = []
    for name in names:
        *figures, measured = figures_of(name, costs[name]).values()
        rows.append((name, *figures, re.sub(r" \([^)]*\)", "*", measured)))
    headings = ("model", "params", "trained", "GFLOPs", "COCO", "measured")
    print_columns([headings, *rows], right=(1, 2, 3, 4))
    errors.print(f"GFLOPs: of one image of {height} x {width}, a multiply-add counted once.")
    errors.print("trained: parameters that a training changes; the others are frozen.")
    errors.print("COCO: published AP on val2017 after 12 epochs, not ours.")
    errors.print("measured: test AP here, one seed; *: `paqdetr info MODEL` shows the settings.")
    errors.print("`paqdetr config list` names recipes as well.")


def figures_of(name: str, cost: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a model, by heading; `cost` is an entry of the known costs."""
    from paqdetr.config import known_figures

    published = known_figures("published").get(name)
    measured = [
        f"{row['data']} {row['AP']:.3f}" + (f" ({row['settings']})" if "settings" in row else "")
        for row in known_figures("measured").get(name, [])
    ]
    return {
        "parameters": f"{cost['parameters'] / 1e6:.1f}M",
        "trainable": f"{cost['trainable'] / 1e6:.1f}M",
        "GFLOPs": f"{cost['flops'] / 1e9:.1f}",
        "published": "-" if published is None else f"{published:.1f}",
        "measured": ", ".join(measured) or "-",
    }


def _count(names: list[str], height: int, width: int) -> dict[str, dict[str, Any]]:
    """As the file of known costs, for an image of another size."""
    from dataclasses import asdict

    from paqdetr.models.cost import model_cost

    costs = {}
    with progress_bar("count") as progress:
        for done, name in enumerate(names, start=1):
            costs[name] = asdict(model_cost(name, height=height, width=width))
            progress(done, len(names))
    return costs


@config.command("list")
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


@config.command()
def show(model: options.Model, settings: options.Settings = None) -> None:
    """Print every setting of a model and its training as resolved, as YAML that `train` takes.

    Without model.num_classes, which the data decide, unless it was set.
    """
    from paqdetr.config import load_config

    results.print(load_config(model, settings or []).to_yaml(), end="")
