"""Decoded images in memory, up to a budget that all loading processes share."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from paqdetr.errors import ConfigError


class PixelCache:
    """Keeps the pixels of as many images as the budget holds, each in a place of its own that is fixed beforehand.

    The memory is an anonymous mapping: forked workers share it, so that an image is decoded once by whichever needs it
    first, and it does not count against the small /dev/shm of containers. Pages are taken when they are written. Workers
    that are spawned cannot inherit it; each has its own share of the budget then.

    Args:
        sizes: (N, 2) (height, width) of the images.
        budget: bytes.

    Raises:
        ConfigError: the system does not give so much memory.
    """

    def __init__(self, sizes: np.ndarray, budget: int) -> None:
        self._sizes, self._budget = sizes, budget
        self._allocate(budget)

    def _allocate(self, budget: int) -> None:
        needed = self._sizes.prod(axis=1) * 3
        self._starts = np.full(len(needed), -1, dtype=np.int64)
        used = 0
        for index, size in enumerate(needed.tolist()):
            if used + size <= budget:
                self._starts[index] = used
                used += size
        # One byte an image says whether its pixels are there; it is written after them.
        try:
            mapping = mmap.mmap(-1, len(needed) + used + 1)
        except OSError as error:
            raise ConfigError(
                f"cache_images: {used / 2**30:.1f} GiB for decoded images cannot be had: {error.strerror}",
                "lower cache_images; 0 keeps none",
            ) from None
        memory = np.frombuffer(mapping, dtype=np.uint8)
        self._ready, self._pixels = memory[: len(needed)], memory[len(needed) :]
        self._shared = True

    def __getstate__(self) -> dict[str, Any]:
        return {"_sizes": self._sizes, "_budget": self._budget, "_shared": False}

    def get(self, index: int) -> Tensor | None:
        """(3, H, W) uint8 that nobody may write to, or None if the image is not there (yet)."""
        if not self._shared:  # this process was spawned: it takes its own part
            workers = get_worker_info()
            self._allocate(self._budget // (workers.num_workers if workers else 1))
        if self._starts[index] < 0 or not self._ready[index]:
            return None
        return torch.from_numpy(self._place(index))

    def put(self, index: int, pixels: Tensor) -> None:
        """Keep an image, (3, H, W) uint8, if it has a place and the size it was said to have."""
        if self._starts[index] < 0 or tuple(pixels.shape[1:]) != tuple(self._sizes[index]):
            return
        self._place(index)[...] = pixels.numpy()
        self._ready[index] = 1

    def __len__(self) -> int:
        """How many images are in it."""
        return int(self._ready.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the images in it."""
        return int((self._sizes.prod(axis=1) * 3)[self._ready > 0].sum())

    def _place(self, index: int) -> np.ndarray:
        height, width = self._sizes[index].tolist()
        start = int(self._starts[index])
        return self._pixels[start : start + 3 * height * width].reshape(3, height, width)
