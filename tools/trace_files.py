"""Which files of the package a training image passes from the disk to the loss, and a key from the command line to its module.

python tools/trace_files.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import paqdetr
from paqdetr.config import Config, load_config
from paqdetr.config.files import parse_overrides
from paqdetr.data.dataset import open_split
from paqdetr.data.digits.edition import make_digits
from paqdetr.data.loader import training_loader
from paqdetr.losses import build_criterion
from paqdetr.models.zoo import build_model
from paqdetr.training.setup import with_classes

MODEL = "paq_dino_nano"
PACKAGE = Path(paqdetr.__file__).parent


@contextmanager
def entered_files() -> Iterator[list[str]]:
    """Files of the package whose functions run inside, relative to it, in the order in which they are entered first.

    Bodies of modules and classes do not count: they run when something is imported.
    """
    found: list[str] = []
    seen: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name not in seen and frame.f_code.co_flags & 2:  # CO_NEWLOCALS: a function, no module
            seen.add(name)
            path = Path(name)
            if path.is_relative_to(PACKAGE):
                found.append(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)


def disk_to_loss(config: Config, data: Path) -> list[str]:
    """From a batch of images on the disk of the split "train" to the gradient of the loss, with a model that is built already;
    of a second step, since the first compiles kernels and imports what was put off."""
    split = open_split(data, "train")
    config = with_classes(config.model_copy(update={"cache_images": 0}), split)  # each step reads from the disk
    model = build_model(config, classes=split.classes, pretrained_backbone=False).train()
    criterion = build_criterion(config.loss)
    loader, _ = training_loader(config, split, model.preprocessing)

    def step() -> None:
        batch = next(iter(loader))
        output = model(batch.images, batch.padding_mask, batch.targets)
        report = criterion(output, batch.targets, aux_losses=model.aux_losses())
        report.total.backward()

    step()
    with entered_files() as files:
        step()
    return files


def key_to_module(key: str, value: str, module: str) -> list[str]:
    """From `key=value` on the command line to the module that is built with it: the files that parse and check it, then those on
    the stack when the first function of `module`, a file of the package, is called."""
    stack: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and not stack and frame.f_code.co_filename == str(PACKAGE / module):
            above: FrameType | None = frame
            while above is not None:
                stack.append(above.f_code.co_filename)
                above = above.f_back

    with entered_files() as files:
        config = load_config(MODEL, parse_overrides([f"{key}={value}"]))
    sys.setprofile(profile)
    try:
        build_model(config, pretrained_backbone=False)
    finally:
        sys.setprofile(None)
    built = [str(Path(name).relative_to(PACKAGE)) for name in reversed(stack) if Path(name).is_relative_to(PACKAGE)]
    return list(dict.fromkeys(["cli/train.py", *files, *built]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_digits(Path(folder) / "digits", train=8, val=2)
        files = disk_to_loss(load_config(MODEL, {"workers": 0, "batch_size": 2}), Path(folder) / "digits")
    print(f"{len(files)} files between an image on disk and the loss:", *files, sep="\n  ")
    files = key_to_module("model.num_patterns", "8", "paq/patterns.py")
    print(f"{len(files)} files between model.num_patterns on the command line and its module:", *files, sep="\n  ")


if __name__ == "__main__":
    main()
