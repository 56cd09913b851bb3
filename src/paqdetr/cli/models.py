"""`paqdetr models`"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from paqdetr.cli.console import errors, print_columns, progress_bar
from paqdetr.errors import ConfigError

# Of the image behind the costs that come with the package.
_HEIGHT, _WIDTH = 800, 1333


def models(
    pattern: Annotated[str, typer.Argument(help='Which models, such as "paq_*".')] = "*",
    *,
    height: Annotated[
        int,
        typer.Option(
            min=32, max=16_384, help="Of the image whose FLOPs are shown, in pixels; another size is counted, slowly."
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
    figures = {name: figures_of(name, costs[name]) for name in names}
    headings = next(iter(figures.values()))
    print_columns([("model", *headings), *((name, *row.values()) for name, row in figures.items())], right=(1, 2, 3, 4))
    errors.print(
        f"FLOPs of one image of {height} x {width}, a multiply-add counted once. Published: AP on COCO val2017, 12 epochs, "
        "not ours. Measured: test AP here, one seed. `paqdetr config list` names recipes as well."
    )


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
