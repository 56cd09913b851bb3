"""`paqdetr export`"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from paqdetr.cli import options
from paqdetr.cli.console import OutputFiles, note_unfinished, results, table
from paqdetr.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from paqdetr.deploy.parity import Parity


graph_option = options.under("Graph")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a .safetensors file.", metavar="RUN")],
    *,
    format: Annotated[
        str | None, options.output(help="onnx, openvino, pt2 or torchscript; by the ending of --output, else onnx.")
    ] = None,
    output: Annotated[
        Path | None, options.output(help="The file to write; beside the checkpoint if not given.")
    ] = None,
    image_size: Annotated[
        str | None, graph_option(metavar="H,W|SIDE", help="Images are stretched to it; the checkpoint's, as a square.")
    ] = None,
    batch: Annotated[str, graph_option(help="Images of a call: a number, or dynamic.")] = "dynamic",
    precision: Annotated[str, graph_option(help="f32, f16 (half the file) or int8 (with --calibrate).")] = "f32",
    calibrate: Annotated[
        Path | None, options.data(help="A data set for the check's pictures, and for int8.", metavar="DATA")
    ] = None,
    threshold: Annotated[
        float | None,
        options.detections(
            min=0, max=1, help="Score threshold in the metadata; that of the run's evaluation if not given."
        ),
    ] = None,
    nms: options.Nms = None,
    raw: Annotated[
        bool, graph_option("--raw", help="pixel_values to logits and pred_boxes, as in transformers.")
    ] = False,
    no_check: Annotated[bool, options.output("--no-check", help="Write the file without comparing it.")] = False,
    attention: Annotated[str, graph_option(help="grid_sample, or gather for TensorRT.")] = "grid_sample",
    max_drop: Annotated[float, graph_option(min=0, max=1, help="AP that int8 may lose.")] = 0.01,
    slow: Annotated[bool, graph_option("--slow", help="int8 with accuracy control; openvino alone.")] = False,
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write an ONNX, OpenVINO or torch file, compared with the run."""
    from paqdetr.checkpoint import find_described
    from paqdetr.runtime.info import require_choices

    require_choices(format=format or "onnx", precision=precision, attention=attention)
    files = OutputFiles("paqdetr export", overwrite=overwrite, json=json_file)
    file = find_described(checkpoint)[0]
    note_unfinished(checkpoint)
    from paqdetr import deploy

    try:
        done = deploy.export(
            file,
            output,
            format=cast(Any, format),
            image_size=_image_size(image_size),
            batch=_batch(batch),
            precision=cast(Any, precision),
            calibrate=calibrate,
            threshold=threshold,
            nms=options.nms_of(nms),
            raw=raw,
            check=not no_check,
            attention=cast(Any, attention),
            max_drop=max_drop,
            slow=slow,
            overwrite=overwrite,
        )
    except ExportError as error:
        if error.parity is not None:
            results.print(_table(error.parity))
        raise
    if done.parity is not None:
        results.print(_table(done.parity))
    for name, row in (done.quantization or {}).items():
        if isinstance(row, dict):
            results.print(f"{name}: AP {row['AP']:.3f}, AP50 {row['AP50']:.3f}, {row['ms']:.1f} ms", soft_wrap=True)
    size = done.info.preprocessing
    megabytes = done.to_json()["bytes"] / 1e6
    checked = "" if done.report_file is None else f"; checked: {done.report_file}"
    results.print(f"{done.file}: {size.height}x{size.width}, {megabytes:.1f} MB{checked}", soft_wrap=True)
    files.write("json", done.to_json())


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,5})\s*(?:[,x]\s*(\d{1,5})\s*)?", text)
    if found is None:
        raise ConfigError(
            f"--image-size: expected H,W or one number, in pixels, found {text!r}", "write 640,640, height first"
        )
    return int(found[1]), int(found[2] or found[1])


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not re.fullmatch(r"\d{1,4}", text):
        raise ConfigError(
            f"--batch: expected a number or dynamic, found {text!r}", "dynamic takes any number of images"
        )
    return int(text)


def _table(parity: Parity) -> Table:
    title = f"The file beside the model: IoU >= {parity.min_iou}, scores within {parity.max_score_difference}"
    headings = ("image", "detections", "without partner", "least IoU", "score off by", "raw off by")
    made = table(title, (), headings)
    for number, image in enumerate(parity.images, start=1):
        counts = (str(number), str(image.compared), str(image.missing))
        raw = "" if image.raw_difference is None else f"{image.raw_difference:.1e}"
        made.add_row(*counts, f"{image.min_iou:.5f}", f"{image.max_score_difference:.1e}", raw)
    return made
