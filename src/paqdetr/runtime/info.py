"""What an exported file says about itself, as one json text in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from PIL.Image import Image, Resampling

from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.files import parse_json
from paqdetr.structures import ClassTable
from paqdetr.text import shorten
from paqdetr.values import is_coordinate

KEY = "paqdetr"
"""The entry of `metadata_props` (ONNX) or of `rt_info["model_info"]` (OpenVINO) that holds the json text."""
FILE_ENTRY = "paqdetr.json"
"""The extra file of .pt2 and TorchScript archives that holds it."""
OUTPUTS = {False: ("boxes", "scores", "labels"), True: ("logits", "pred_boxes")}
"""Names of the graph's outputs; True: of one that was exported raw, as in transformers."""
FORMAT = 1
Format = Literal["onnx", "openvino", "pt2", "torchscript"]
Precision = Literal["f32", "f16", "int8"]
Attention = Literal["grid_sample", "gather"]
"""How deformable attention reads its samples: GridSample, the faster in onnxruntime and OpenVINO; or Gather alone, for TensorRT,
which miscompiles GridSample (TensorRT issue 4813)."""


_CHOICES = {"format": get_args(Format), "precision": get_args(Precision), "attention": get_args(Attention)}


def require_choices(**given: str) -> None:
    """Raise ConfigError unless these are a `format`, a `precision` and an `attention` that an export can have."""
    for name, found in given.items():
        if found not in (known := _CHOICES[name]):
            expected = f"expected one of {', '.join(known)}, found {found!r}"
            raise ConfigError(f"{name}: {expected}", f"{known[0]} is the usual one")


@dataclass(frozen=True, slots=True)
class FixedSize:
    """The preprocessing of an exported model: every image is stretched to one size.

    Attributes:
        height, width: in pixels.
        mean, std: of RGB pixels in [0, 255], which the graph takes off itself unless it was exported raw.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize, whatever the image's own."""
        return self.height, self.width

    def __call__(self, image: Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """RGB image -> (H, W, 3) uint8, bilinear with antialiasing."""
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8)

    def normalized(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, as a raw graph takes them."""
        scaled = (images.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What is needed to use an exported model.

    Attributes:
        name: of the model.
        classes: index -> the data set's category id and name.
        preprocessing: of images.
        raw: the graph takes normalised pixels and gives logits and boxes of all queries.
        precision: of the weights, "f32", "f16" or "int8".
        max_detections: of an image.
        clamp_boxes: boxes end at the image's border.
        threshold: the score from which the model's evaluation would keep detections; None if it said nothing.
        nms: the IoU over which duplicates are to be dropped; None if there are none to drop.
        source: SHA-256 of the checkpoint, or "" if the model came from none.
        versions: of the programs that made the file.
    """

    name: str
    classes: ClassTable
    preprocessing: FixedSize
    raw: bool
    precision: str
    max_detections: int
    clamp_boxes: bool
    threshold: float | None = None
    nms: float | None = None
    source: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text for the file's metadata."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "classes": [{"id": i, "name": name} for i, name in zip(self.classes.ids, self.classes.names, strict=True)],
            "preprocessing": {**_PICTURES, **{key: getattr(self.preprocessing, key) for key in _SIZE}},
            **{key: getattr(self, key) for key in _PLAIN},
            "source_sha256": self.source,
            "versions": dict(self.versions),
        }
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> ExportInfo:
        """The inverse of `to_json`; `where` names the file in errors.

        Raises:
            CheckpointError: the text is malformed, or of a later format.
        """
        content = parse_json(text, f"{where}: its metadata", error=CheckpointError)
        if isinstance(content, dict) and _whole(FORMAT + 1)(content.get("format")):
            raise CheckpointError(
                f"{where}: written in format {content['format']}, and this version reads up to {FORMAT}",
                "use the version of paqdetr that exported it, or a later one",
            )
        take = _Reader(content, where)
        size = _Reader(take("preprocessing", _is(dict)), where)
        rows = [_Reader(row, where) for row in take("classes", lambda value: isinstance(value, list) and value != [])]
        ids = tuple(row("id", _whole(-(2**63), 2**63 - 1)) for row in rows)
        if len(set(ids)) < len(ids):
            raise CheckpointError(f"{where}: its metadata gives two classes one id", "export the model again")
        height, width, mean, std = (size(key, fits) for key, fits in _SIZE.items())
        return cls(
            name=take("name", _is(str)),
            classes=ClassTable(ids, tuple(row("name", _is(str)) for row in rows)),
            preprocessing=FixedSize(height, width, tuple(mean), tuple(std)),
            source=take("source_sha256", _is(str)),
            versions=take("versions", lambda value: _is(dict)(value) and all(map(_is(str), value.values()))),
            **{key: take(key, fits) for key, fits in _PLAIN.items()},
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Values of an object, each checked as it is taken."""

    content: Any
    where: str

    def __call__(self, key: str, fits: Callable[[Any], bool]) -> Any:
        found = self.content.get(key, ...) if isinstance(self.content, dict) else ...
        if found is ... or not fits(found):
            what = "nothing" if found is ... else shorten(found)
            raise CheckpointError(f"{self.where}: its metadata has {what} for {key!r}", "export the model again")
        return found


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_share_or_none(value: Any) -> bool:
    return value is None or (is_coordinate(value) and 0 <= value <= 1)


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_coordinate, value))


# Values that stand in the text as they are, and what each has to be.
_PLAIN: dict[str, Callable[[Any], bool]] = {
    "raw": _is(bool),
    "precision": lambda value: value in get_args(Precision),
    "max_detections": _whole(1),
    "clamp_boxes": _is(bool),
    "threshold": _is_share_or_none,
    "nms": _is_share_or_none,
}
_SIZE: dict[str, Callable[[Any], bool]] = {
    "height": _whole(1, 2**14),
    "width": _whole(1, 2**14),
    "mean": _is_triple,
    "std": lambda value: _is_triple(value) and min(value) > 0,
}
# How a program that reads the file has to prepare pictures.
_PICTURES = {"resize": "stretch", "filter": "bilinear, antialiased", "color": "RGB"}
