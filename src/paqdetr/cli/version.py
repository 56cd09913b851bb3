"""`paqdetr --version`"""

from __future__ import annotations

from typing import Annotated

import typer

from paqdetr.cli.console import results


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    import platform

    import torch

    from paqdetr._version import __version__
    from paqdetr.environment import package_version, require_device

    device = require_device(None)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    rows = [("paqdetr", __version__), ("Python", platform.python_version()), ("torch", torch.__version__)]
    rows += [(package, package_version(package) or "not installed") for package in ("torchvision", "numba")]
    rows.append(("device", f"{device}{name}"))
    for row in rows:
        results.print(" ".join(row))
    raise typer.Exit


def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions that matter, and the device that is used.",
        ),
    ] = False,
) -> None:
    """Options before the verb; each does its work in its own callback."""
