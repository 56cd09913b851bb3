"""The names this module had when COCO was the only format."""

from __future__ import annotations

from paqdetr.data.dataset import DetectionDataset as CocoDataset
from paqdetr.data.dataset import open_split
from paqdetr.data.layout import available_splits

__all__ = ["CocoDataset", "available_splits", "open_split"]
