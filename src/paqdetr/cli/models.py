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
    """List models with their parameters and FLOPs."""
    from paqdetr.models import list_models
    from paqdetr.models.cost import model_cost

    names = list_models(pattern)
    if not names:
        raise ConfigError(f"no model is called {pattern!r}", "`paqdetr models` lists them all")
    table = Table(
        title=f"FLOPs of one image of {height} x {width}, a multiply-add counted once", title_justify="left"
    )
    table.add_column("model")
    for column in ("parameters", "trainable", "GFLOPs"):
        table.add_column(column, justify="right")
    with progress_bar("count") as progress:
        for done, name in enumerate(names, start=1):
            cost = model_cost(name, height=height, width=width)
            table.add_row(
                name,
                f"{cost.parameters / 1e6:.1f} M",
                f"{cost.trainable / 1e6:.1f} M",
                f"{cost.flops / 1e9:.1f}",
            )
            progress(done, len(names))
    results.print(table)
