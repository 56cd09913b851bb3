"""`paqdetr serve`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from paqdetr.cli import options
from paqdetr.cli.console import finish_streams, note, open_model, results
from paqdetr.errors import BackendError, ConfigError

limit_option = options.under("Limits")


def serve(
    checkpoint: Annotated[Path, typer.Argument(help=options.TRAINED, metavar="MODEL")],
    *,
    host: Annotated[
        str, options.machine(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, options.machine(min=0, max=65535, help="0 takes one that is free.")] = 8080,
    max_batch: Annotated[int, limit_option(help="Images per batch at most.")] = 8,
    max_wait_ms: Annotated[float, limit_option(help="Longest wait for a batch to fill.")] = 5.0,
    queue: Annotated[int, limit_option(help="Images that may queue; further ones are refused.")] = 64,
    max_mb: Annotated[float, limit_option(help="Size of a request.")] = 20.0,
    max_megapixels: Annotated[float, limit_option(help="Size of an image, read from its header.")] = 50.0,
    timeout: Annotated[float, limit_option(help="Seconds for a request to arrive, and for its answer.")] = 60.0,
    api_key_env: Annotated[
        str | None,
        options.machine(
            help="Environment variable with the key that requests need, or several with commas between them."
        ),
    ] = None,
    device: options.Device = None,
) -> None:
    """Answer HTTP requests with detections; its page tries the model.

    Ctrl-C or SIGTERM stops: requests that have begun are answered first, within 5 seconds.
    """
    try:
        from paqdetr.serving.server import DetectionServer, Limits, listen
        from paqdetr.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed", "pip install 'paqdetr[serve]'") from None

    limits = Limits(max_batch, max_wait_ms, queue, max_mb, max_megapixels, timeout)
    keys = _keys(api_key_env)
    with listen(host, port) as listener:
        server = DetectionServer(open_model(checkpoint, device), limits=limits, keys=keys)

        def announce() -> None:
            shown = f"[{host}]" if ":" in host else host
            results.print(f"serving {server.name} on http://{shown}:{listener.getsockname()[1]}", soft_wrap=True)
            if not keys and host not in ("127.0.0.1", "localhost", "::1"):
                note("anybody who reaches this address can use it; see --api-key-env")

        try:
            idle = run(server, listener, on_start=announce)
        except KeyboardInterrupt:  # in the first call, or once more while the last one is waited for
            idle = False
    results.print("stopped")
    if not idle:
        finish_streams()
        os._exit(0)  # Python's own end would be an abort inside the model's engine


def _keys(variable: str | None) -> list[str]:
    if variable is None:
        return []
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(
            f"--api-key-env: the environment variable {variable} is not set, or empty",
            f"set it: {variable}=$(openssl rand -hex 16)",
        )
    return keys
