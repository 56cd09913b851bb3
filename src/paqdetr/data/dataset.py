"""One split of a data set of any format, as training and evaluation use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.files import REPLACE
from paqdetr.data.formats.coco import read_coco, to_coco
from paqdetr.data.layout import find_split
from paqdetr.errors import DataError
from paqdetr.images import read_image
from paqdetr.structures import ClassTable, Targets

if TYPE_CHECKING:  # a data set is read, and found wanting, before torch is imported
    from torch import Tensor


class DetectionDataset:
    """Images and boxes of one split, by position; annotations lie in flat arrays.

    Attributes:
        name: of the split.
        annotations: the split as its files have it.
        classes: contiguous class index <-> category id and name.
        annotation_file, image_dir: where it was read from.
        image_ids: the data set's own ids.
        file_names: relative to `image_dir`.
        sizes: (N, 2) int64, (height, width) of every image as the annotations say.
        skipped: number of annotations left out of training: crowds, duplicates, and boxes without area inside their image.
    """

    def __init__(self, annotations: Annotations, *, name: str) -> None:
        a = annotations
        self.name, self.annotations, self.classes = name, a, a.classes
        self.annotation_file, self.image_dir = a.source, a.image_dir
        self.image_ids, self.file_names, self.sizes = a.image_ids, a.file_names, a.sizes
        keep, corners = a.trainable()
        self._boxes, self._labels = corners[keep].astype(np.float32), a.labels[keep]
        self._starts = np.concatenate([[0], np.cumsum(keep)])[a.starts]
        self.skipped = len(a.boxes) - len(self._boxes)

    @classmethod
    def from_json(
        cls, annotation_file: str | Path, image_dir: str | Path, *, name: str | None = None
    ) -> DetectionDataset:
        """Reads and verifies a COCO json; images themselves are not opened, only looked for.

        Args:
            annotation_file: COCO json with `images`, `annotations` and `categories`.
            image_dir: the folder that `file_name` is relative to.
            name: of the split; the file's name without its ending if not given.

        Raises:
            DataError: the file or an entry of it is malformed or contradicts another, or an image is missing.
        """
        annotation_file = Path(annotation_file)
        return cls(read_coco(annotation_file, [Path(image_dir)], Issues()), name=name or annotation_file.stem)

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        """Where the image lies."""
        return self.image_dir / self.file_names[index]

    def boxes(self, index: int) -> np.ndarray:
        """(G, 4) float32, xyxy in pixels, clipped to the image; without crowds, duplicates and boxes of no area."""
        return self._boxes[self._rows(index)].copy()

    def labels(self, index: int) -> np.ndarray:
        """(G,) int64 contiguous class indices of `boxes(index)`."""
        return self._labels[self._rows(index)].copy()

    def image(self, index: int) -> Image.Image:
        """The picture as RGB with its EXIF orientation applied.

        Raises:
            DataError: it does not decode.
        """
        return read_image(self.path(index), remedy=REPLACE)

    def checked_image(self, index: int) -> Image.Image:
        """As `image`.

        Raises:
            DataError: it does not decode, or the annotations state another size: the boxes would be in wrong places.
        """
        return self.of_stated_size(index, self.image(index))

    def of_stated_size(self, index: int, picture: Image.Image) -> Image.Image:
        """The picture of an image.

        Raises:
            DataError: it is of another size than the annotations state.
        """
        height, width = self.sizes[index].tolist()
        if picture.size != (width, height):
            raise DataError(
                f"{self.path(index)}: is {picture.width}x{picture.height} pixels with its EXIF turn applied,"
                f" {self.annotation_file} says {width}x{height}",
                "correct the sizes (and boxes) there; `paqdetr data check` lists all such images",
            )
        return picture

    def targets(
        self,
        index: int,
        boxes: Tensor | None = None,
        labels: Tensor | None = None,
        frame: tuple[int, int] | None = None,
        *,
        classes: ClassTable | None = None,
    ) -> Targets:
        """Ground truth of an image as training and evaluation take it, without crowds, duplicates and boxes of no area.

        Args:
            boxes: (G, 4) float32 xyxy in pixels of `frame`; those of the file if None. An augmented image brings its own.
            labels: (G,) int64 of `boxes`.
            frame: (height, width) that `boxes` refer to; the size of the image if None.
            classes: a model's, whose contiguous indices the labels are to be, since a split may have fewer classes than the
                model, or other ids (`ClassTable.ids_in`); the split's own if None.
        """
        import torch
        from torchvision.ops import box_convert

        size: tuple[int, int] = tuple(self.sizes[index].tolist())
        if boxes is None or labels is None:
            boxes, labels = torch.from_numpy(self.boxes(index)), torch.from_numpy(self.labels(index))
        if classes is not None and classes != self.classes:
            places = classes.id_to_index
            known = {its: places[own] for own, its in classes.ids_in(self.classes).items()}
            labels = torch.tensor([known[category] for category in self.classes.ids])[labels]
        height, width = frame or size
        centred = box_convert(boxes, "xyxy", "cxcywh") / boxes.new_tensor([width, height] * 2)
        return Targets(labels, centred, self.image_ids[index], size)

    def image_or_blank(self, index: int) -> Image.Image:
        """The picture, or a grey one of the size that the annotations state where it does not decode: one bad file does not end
        what looks at many."""
        try:
            return self.image(index)
        except DataError:
            height, width = self.sizes[index].tolist()
            return Image.new("RGB", (width, height), "#808080")

    def ground_truth(self) -> dict[str, Any]:
        """What evaluation compares with, as a COCO json: every box as the files have it, crowds and what is skipped too."""
        return to_coco(self.annotations)

    def _rows(self, index: int) -> slice:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return slice(int(self._starts[index]), int(self._starts[index + 1]))


def open_split(data: str | Path, split: str) -> DetectionDataset:
    """Opens one split of a data set in any of the layouts that docs/data.md shows.

    Args:
        data: the folder, or the `data.yaml` of a YOLO data set.
        split: "train", "val" or "test", or whatever else the data set has.

    Raises:
        DataError: no such folder or split, or the split is malformed.
    """
    return DetectionDataset(find_split(data, split).read(Issues()), name=split)
