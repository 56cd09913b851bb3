"""`paqdetr hub`"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from paqdetr.cli import options
from paqdetr.cli.console import note, results
from paqdetr.errors import ConfigError, import_extra

app = typer.Typer(no_args_is_help=True, help="Share detectors on the Hugging Face Hub.", rich_markup_mode=None)
_License = Annotated[str | None, typer.Option(help="Of the weights: apache-2.0, cc-by-4.0, ...")]
_Evaluation = Annotated[Path | None, typer.Option(help="What `paqdetr eval --json` wrote: its figures and intervals.")]
_Repo = Annotated[str, typer.Argument(help="On the Hub.", metavar="USER/NAME")]


@app.command()
def push(
    checkpoint: options.Checkpoint,
    repo: _Repo,
    *,
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    exported: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE", help="Exported models that go along, under their names."),
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="A picture that is shown with detections drawn on it.")] = None,
    license: _License = None,
    evaluation: _Evaluation = None,
) -> None:
    """Upload a detector with its model card."""
    from paqdetr.checkpoint import find_described

    find_described(checkpoint)
    hub = import_extra("paqdetr.models.hub", "hub")
    name, revision = hub.split_address(repo)
    if revision is not None:
        raise ConfigError(f"{repo}: a revision cannot be written", "leave the @ and what follows out")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        header = _weights(checkpoint, folder)
        hub.write_folder(folder, header, license=license, evaluation=_figures(evaluation), repo=name)
        if preview is not None:
            from paqdetr.models import load

            picture = load(folder / hub.WEIGHTS).predict(preview)[0].draw()
            picture.thumbnail((1280, 1280))
            picture.save(folder / "preview.jpg", quality=90)
        for file in exported or []:
            for part in (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,):
                if (folder / part.name).exists():
                    raise ConfigError(
                        f"--with {part}: the upload has another file called {part.name}",
                        "rename the file, or leave it out",
                    )
                _copy(part, folder / part.name)
        results.print(hub.push(folder, name, private=private), soft_wrap=True)


@app.command()
def pull(
    repo: _Repo,
    *,
    output: Annotated[Path, typer.Option(help="A .safetensors file.")],
    overwrite: options.Overwrite = False,
) -> None:
    """Download a detector, of a revision if given: USER/NAME@REVISION."""
    from paqdetr.checkpoint import read_checkpoint
    from paqdetr.outputs import write_output

    file = import_extra("paqdetr.models.hub", "hub").fetch(repo)
    read_checkpoint(file)  # whole, and ours
    write_output(output, lambda path: shutil.copyfile(file, path), maker="paqdetr hub", overwrite=overwrite)
    results.print(str(output), soft_wrap=True)


@app.command()
def card(checkpoint: options.Checkpoint, *, license: _License = None, evaluation: _Evaluation = None) -> None:
    """Print the model card that `push` would upload."""
    from paqdetr.checkpoint import find_checkpoint, read_header

    header, figures = read_header(find_checkpoint(checkpoint)), _figures(evaluation)
    text = import_extra("paqdetr.models.hub", "hub").model_card(header, license=license, evaluation=figures)
    results.print(text.rstrip(), soft_wrap=True)


@app.command()
def space(checkpoint: options.Checkpoint, *, output: Annotated[Path, typer.Option(help="A new folder.")]) -> None:
    """Write the folder of a Gradio Space, which shows the detector to visitors."""
    from paqdetr.outputs import require_free, whole_folder

    require_free(output)
    with whole_folder(output) as folder:
        header = _weights(checkpoint, folder)
        (folder / "app.py").write_text(_APP, encoding="utf-8")
        (folder / "requirements.txt").write_text(_REQUIREMENTS, encoding="utf-8")
        title = header["name"].replace("'", "")
        (folder / "README.md").write_text(_SPACE.format(title=title), encoding="utf-8")
    note(f"{output / 'requirements.txt'} has to say where pip gets paqdetr, which no package index has")
    results.print(f"{output}: upload it with `hf upload USER/NAME {output} --repo-type space`", soft_wrap=True)


_SPACE = """---
title: '{title}'
sdk: gradio
sdk_version: 6.0.0
app_file: app.py
---

A detector of paqdetr.
"""

_REQUIREMENTS = """# No package index has paqdetr. Say where it lies: paqdetr @ git+https://..., or @ https://... of a wheel.
paqdetr
"""

_APP = """import gradio as gr
import paqdetr

model = paqdetr.load("model.safetensors")


def detect(image, threshold):
    if image is None:
        return None, []
    [found] = model.predict(image, threshold=threshold)
    rows = [[found.names[int(label)], round(float(score), 3)] for label, score in zip(found.labels, found.scores)]
    return found.draw(image), rows


gr.Interface(
    detect,
    [gr.Image(type="pil", label="image"), gr.Slider(0.05, 1.0, 0.3, label="least score")],
    [gr.Image(type="pil", label="detections"), gr.Dataframe(headers=["class", "score"])],
    title=model.name,
).launch()
"""


def _weights(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Copy the weights into a folder; their header."""
    from paqdetr.checkpoint import find_checkpoint, read_checkpoint

    file = find_checkpoint(checkpoint)
    _copy(file, folder / "model.safetensors")
    return read_checkpoint(file)[1]


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ConfigError(f"{source}: no such file", "check the path")
    shutil.copyfile(source, target)


def _figures(file: Path | None) -> dict[str, Any] | None:
    from paqdetr.files import MAX_SIDE_BYTES, read_json

    if file is None:
        return None
    content = read_json(file, limit=MAX_SIDE_BYTES)
    figures = isinstance(content, dict) and isinstance(content.get("AP"), float)
    if not figures or not isinstance(content.get("source", {}), dict):
        raise ConfigError(f"{file}: holds no figures", "give what `paqdetr eval --json` wrote")
    return content
