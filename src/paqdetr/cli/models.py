"""`paqdetr models`"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from paqdetr.cli.console import progress_bar, results
from paqdetr.errors import ConfigError


def models(
    pattern: Annotated[str, typer.Argument(help='Which models, such as "paq_*".')] = "*",
    *,
    height: Annotated[
        int, typer.Option(min=32, help="Of the image whose FLOPs are counted, in pixels.")
    ] = 800,
    width: Annotated[int, typer.Option(min=32)] = 1333,
) -> None:
    """List models: parameters, FLOPs, the AP published for them, and what we measured."""
    from paqdetr.config import known_figures
    from paqdetr.models import list_models
    from paqdetr.models.cost import model_cost

    names = list_models(pattern)
    if not names:
        raise ConfigError(f"no model is called {pattern!r}", "`paqdetr models` lists them all")
    table = Table(
        title=f"FLOPs of one image of {height} x {width}, a multiply-add counted once. Published: AP on COCO val2017, 12 epochs, "
        "not ours. Measured: test AP here, one seed.",
        title_justify="left",
    )
    table.add_column("model")
    for column in ("parameters", "trainable", "GFLOPs", "published"):
        table.add_column(column, justify="right")
    table.add_column("measured")
    published, measured = known_figures("published"), known_figures("measured")
    with progress_bar("count") as progress:
        for done, name in enumerate(names, start=1):
            cost = model_cost(name, height=height, width=width)
            table.add_row(
                name,
                f"{cost.parameters / 1e6:.1f} M",
                f"{cost.trainable / 1e6:.1f} M",
                f"{cost.flops / 1e9:.1f}",
                f"{published[name]:.1f}" if name in published else "",
                "\n".join(f"{row['data']} {row['AP']:.3f}" for row in measured.get(name, [])),
            )
            progress(done, len(names))
    results.print(table)
