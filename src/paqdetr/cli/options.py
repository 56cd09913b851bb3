"""Options that verbs share, and what their texts mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paqdetr.environment import require_known_device
from paqdetr.errors import ConfigError
from paqdetr.values import MAX_BATCH, MAX_RESAMPLES, MAX_SEED, parse_nms

if TYPE_CHECKING:
    from paqdetr.runtime.tiles import Tiles


def complete_model(incomplete: str) -> list[str]:
    """Names that a shell completes; none for a path, which the shell completes itself."""
    from paqdetr.config import list_configs

    return list_configs(pattern=f"{incomplete}*")


def complete_setting(incomplete: str) -> list[str]:
    """Keys that a shell completes."""
    from paqdetr.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


def under(heading: str) -> Callable[..., Any]:
    """`typer.Option` for options that stand under a heading in the help of a verb with many of them."""
    return partial(typer.Option, rich_help_panel=heading)


data, detections, figures, output, machine = map(under, ("Data", "Detections", "Figures", "Output", "Machine"))

Model = Annotated[
    str,
    typer.Argument(
        help="A model or recipe (`paqdetr config list`), or a YAML file.",
        metavar="MODEL|CONFIG",
        autocompletion=complete_model,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings, such as epochs=12 model.num_patterns=32.", metavar="KEY=VALUE", autocompletion=complete_setting
    ),
]
Device = Annotated[
    str | None, machine(help="cpu, cuda, ...; a GPU, if there is one, if not given.", callback=require_known_device)
]
Overwrite = Annotated[bool, output("--overwrite", help="Replace files that exist, whoever wrote them.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]
BatchSize = Annotated[int, machine(min=1, max=MAX_BATCH, help="Images per forward pass; it changes no figure.")]
Checkpoint = Annotated[Path, typer.Argument(help="A .safetensors file or a run's folder.", metavar="CHECKPOINT")]
Data = Annotated[Path, data(help="Folder of the data set, or its data.yaml.")]
Split = Annotated[str | None, data(help="train, val or test; if not given val, or else the split there is.")]
AutoBatch = Annotated[
    bool,
    typer.Option("--auto-batch", help="Take the largest batch that fits into memory and leaves an epoch 30 steps."),
]
Resamples = Annotated[int, figures(min=100, max=MAX_RESAMPLES, help="Bootstrap resamples of the images.")]
TRAINED = "A run's folder, a .safetensors file, an exported model, or hf:USER/NAME."
Nms = Annotated[
    str | None,
    detections(metavar="IOU|none", help="Drop boxes that overlap a better one of their class by more than this."),
]
TileSize = Annotated[
    int | None, detections("--tiles", metavar="PIXELS", help="Cut large images into tiles of this side.")
]
Overlap = Annotated[float | None, detections(help="Overlap of tiles, as a share of their side; 0.2 if not given.")]
WithWhole = Annotated[
    bool, detections("--with-whole", help="With --tiles: detect in the whole image as well, for large objects.")
]
JsonFile = Annotated[Path | None, output("--json", help="Write the figures to this file.")]


def nms_of(text: str | None) -> float | None:
    """What `--nms` says, None if it was not given: see `parse_nms`."""
    return None if text is None else parse_nms(text, "--nms")


def tiles_of(size: int | None, overlap: float | None, with_whole: bool) -> Tiles | None:
    """What `--tiles`, `--overlap` and `--with-whole` say.

    Raises:
        ConfigError: one is out of its range, or is given without `--tiles`.
    """
    from paqdetr.runtime.tiles import Tiles

    if size is not None:
        return Tiles(size, 0.2 if overlap is None else overlap, with_whole)
    if overlap is not None or with_whole:
        raise ConfigError("--overlap and --with-whole are about tiles", "give --tiles 640 as well")
    return None
