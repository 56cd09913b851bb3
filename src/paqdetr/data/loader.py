"""Batches of images for training and evaluation, read by worker processes if there are any.

In training every image is seeded by (seed, epoch, index), so that workers and resumption change nothing.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import get_temp_dir
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from paqdetr.config import Config
from paqdetr.data.augment import Augment, Augmented, mosaic
from paqdetr.data.dataset import DetectionDataset
from paqdetr.errors import ConfigError, DataError, UserError, WorkerError
from paqdetr.interrupt import STOP_SIGNALS, worker_error, worker_start_method
from paqdetr.preprocessing import Preprocessing, pad_images, to_pixels
from paqdetr.structures import Targets

# Workers that deliver nothing for so long, in seconds, will not any more.
_PATIENCE = 600
_LOG = logging.getLogger(__name__)


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
        # One byte per image says whether its pixels are there; it is written after them.
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
    def capacity(self) -> int:
        """Bytes of the images that it will have in the end."""
        return int((self._sizes.prod(axis=1) * 3)[self._starts >= 0].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the images in it."""
        return int((self._sizes.prod(axis=1) * 3)[self._ready > 0].sum())

    def _place(self, index: int) -> np.ndarray:
        height, width = self._sizes[index].tolist()
        start = int(self._starts[index])
        return self._pixels[start : start + 3 * height * width].reshape(3, height, width)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a training step takes: images (B, 3, H, W), mask (B, H, W) or None, B targets."""

    images: Tensor
    padding_mask: Tensor | None
    targets: list[Targets]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        # Only out of pinned memory: from a GPU to the host nothing would wait for the transfer.
        pinned, mask = self.images.is_pinned(), self.padding_mask
        mask = None if mask is None else mask.to(device, non_blocking=pinned)
        targets = [target.to(device) for target in self.targets]
        return Batch(self.images.to(device, non_blocking=pinned), mask, targets)

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU reads by itself; torch's loader looks for this method."""
        mask = None if self.padding_mask is None else self.padding_mask.pin_memory()
        return Batch(self.images.pin_memory(), mask, [target.pin_memory() for target in self.targets])

    def share_memory(self) -> Batch:
        """This batch, moved to memory that other processes can use.

        Raises:
            RuntimeError: there is no room.
        """
        parts = (part for target in self.targets for part in (target.labels, target.boxes))
        for tensor in (self.images, self.padding_mask, *parts):
            if tensor is not None:
                tensor.share_memory_()
        return self


@dataclass(frozen=True, slots=True)
class Failure:
    """A `UserError` on its way out of a worker process: torch would turn the exception itself into a RuntimeError."""

    kind: type[UserError]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Which image, and everything its random changes depend on."""

    index: int
    seed: int
    scale: float


class Images(Dataset[Any]):
    """Images by a key, and how they are put together; a `Failure` in place of one that raises a `UserError`."""

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.sample(key)
        except UserError as error:
            return Failure(type(error), error.message, error.remedy)

    def sample(self, key: Any) -> Any:
        """The image of a key."""
        raise NotImplementedError

    def collate(self, samples: Sequence[Any]) -> Any:
        """One batch of them, which has `share_memory`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Pictures:
    """A batch of an evaluation.

    Attributes:
        indices: in the split.
        images: (3, H, W) float each, or what else `SplitImages` makes of them.
        errors: index -> why the file cannot be read.
    """

    indices: list[int]
    images: list[Any]
    errors: dict[int, str]

    def share_memory(self) -> Pictures:
        """This batch, its tensors moved as in `Batch.share_memory`."""
        for image in self.images:
            if isinstance(image, Tensor):
                image.share_memory_()
        return self


class SplitImages(Images):
    """Images of a split by their index, without augmentation. In place of one that cannot be read comes a grey one.

    Args:
        prepare: what is made of a picture; the picture itself if None.
    """

    def __init__(self, split: DetectionDataset, prepare: Callable[[Image], Any] | None) -> None:
        self.split, self.prepare = split, prepare

    def sample(self, key: int) -> tuple[int, Any, str | None]:
        """Index, image, and why it cannot be read.

        Raises:
            DataError: the image is of another size than the annotations state.
        """
        reason = None
        try:
            picture = self.split.image(key)
        except DataError as error:
            picture, reason = self.split.image_or_blank(key), error.message
        picture = self.split.of_stated_size(key, picture)
        return key, picture if self.prepare is None else self.prepare(picture), reason

    def collate(self, samples: Sequence[tuple[int, Any, str | None]]) -> Pictures:
        """One batch."""
        indices, images, reasons = (list(column) for column in zip(*samples, strict=True))
        return Pictures(indices, images, {i: reason for i, reason in zip(indices, reasons, strict=True) if reason})


class TrainingImages(Images):
    """Augmented images of a split by `SampleKey`; decoded pixels stay in memory while the budget lasts.

    Args:
        cache_gib: memory for decoded images in GiB, for all loading processes of a training process together.
    """

    def __init__(self, *, split: DetectionDataset, augment: Augment, cache_gib: float) -> None:
        self.split, self.augment = split, augment
        self.cache = PixelCache(split.sizes, int(cache_gib * 2**30))

    def __len__(self) -> int:
        return len(self.split)

    def collate(self, samples: Sequence[tuple[Tensor, Targets]]) -> Batch:
        """One padded batch."""
        return collate(samples, self.augment.preprocessing.pad_divisor)

    def sample(self, key: SampleKey) -> tuple[Tensor, Targets]:
        """The image, changed as the key says, and its boxes.

        Raises:
            DataError: the image does not decode, or is of another size than the annotations state.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key.seed)  # torch.manual_seed would also seed the GPU's, for good
            changed = self._changed(key.index, key.scale)
            share = self.augment.config.mosaic
            if share and torch.rand(()) < share:
                drawn = torch.randint(len(self.split), (3,)).tolist()
                changed = mosaic([changed, *(self._changed(index, key.scale) for index in drawn)])
        height, width = changed.pixels.shape[1:]
        targets = self.split.targets(key.index, changed.boxes, changed.labels, (height, width))
        return self.augment.preprocessing.normalization(changed.pixels), targets

    def _changed(self, index: int, scale: float) -> Augmented:
        return self.augment(self._pixels(index), self.split.boxes(index), self.split.labels(index), scale=scale)

    def _pixels(self, index: int) -> Tensor:
        """(3, H, W) uint8, not to be written to."""
        cached = self.cache.get(index)
        if cached is not None:
            return cached
        pixels = to_pixels(self.split.checked_image(index))
        self.cache.put(index, pixels)
        return pixels


class TrainingBatches(Sampler[list[SampleKey]]):
    """Shuffled batches of one orientation and one scale each, shared out over processes.

    Args:
        sizes: (N, 2) (height, width) of the images.
        scale: range from which each batch draws its scale.
        rank, world_size: this process, and how many there are.

    Attributes:
        epoch: which pass over the data comes next.
        start: batches of this process that the next pass leaves out at its beginning, because they are done.
    """

    def __init__(
        self,
        *,
        sizes: np.ndarray,
        batch_size: int,
        scale: tuple[float, float],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size, self.scale, self.seed = batch_size, scale, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        self._tall = np.asarray(sizes[:, 0] > sizes[:, 1])

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return max(len(self._tall) // (self.batch_size * self.world_size), 1)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self._tall))
        count = len(self) * self.batch_size * self.world_size
        # np.resize repeats a small data set until it fills a batch. Of a larger one, those that miss an epoch are drawn first:
        # a rare orientation must not miss them all.
        order = np.resize(order, count) if len(order) < count else order[:count]
        # Full batches of one orientation; what is left of both fills one mixed batch, or none.
        groups = [order[self._tall[order]], order[~self._tall[order]]]
        full = [group[: len(group) // self.batch_size * self.batch_size] for group in groups]
        rest = [group[len(head) :] for group, head in zip(groups, full, strict=True)]
        batches = np.concatenate([*full, *rest]).reshape(-1, self.batch_size)
        batches = batches[rng.permutation(len(batches))]
        scales = rng.uniform(*self.scale, size=len(batches))
        seeds = rng.integers(2**62, size=batches.shape)
        for number in range(self.rank + self.start * self.world_size, len(batches), self.world_size):
            yield [
                SampleKey(int(index), int(seed), float(scales[number]))
                for index, seed in zip(batches[number], seeds[number], strict=True)
            ]


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and signals to a process group reach workers too: they go on until the training, which finishes its step, ends them,
    by a SIGTERM of its own if need be."""
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS, Windows: torch's own handler takes every SIGTERM
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=wait_for_parent, daemon=True).start()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes that are started meanwhile do not die of a signal before they have come to `leave_signals_to_the_parent`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def collate(samples: Sequence[tuple[Tensor, Targets]], pad_divisor: int = 1) -> Batch:
    """Pad a list of samples into one batch."""
    images, mask = pad_images([image for image, _ in samples], pad_divisor)
    return Batch(images, mask, [targets for _, targets in samples])


def plain_batch(split: DetectionDataset, preprocessing: Preprocessing, indices: Sequence[int]) -> Batch:
    """Images of a split as `predict` sees them, without augmentation, with their targets."""
    return collate([(preprocessing(split.checked_image(index)), split.targets(index)) for index in indices])


@dataclass(frozen=True, slots=True)
class Pickled:
    """A batch on its way through a pipe, and why it could not be handed over in shared memory."""

    content: bytes
    reason: str


def collate_in_place(images: Images, samples: Sequence[Any]) -> Any:
    """One batch of samples; the first failure if there is one."""
    failure = next((sample for sample in samples if isinstance(sample, Failure)), None)
    return images.collate(samples) if failure is None else failure


def collate_for_parent(images: Images, samples: Sequence[Any]) -> Any:
    """As `collate_in_place`, in a worker process: in shared memory, or pickled where that is too small (64 MB in a container).
    Left to torch, a batch that does not fit would be lost without an error, and the training would wait for it."""
    batch = collate_in_place(images, samples)
    try:
        get_temp_dir()  # where the two processes meet to hand over shared memory
        return batch if isinstance(batch, Failure) else batch.share_memory()
    except (RuntimeError, OSError) as error:
        return Pickled(pickle.dumps(batch), str(error))


class ImageLoader:
    """Iterates over batches, those of one epoch in training; an error of a sample stops it.

    Args:
        batches: lists of keys of `images`; a sampler whose `epoch` is to be set before each pass, in training.
        workers: processes that load; 0 loads in this one, as where there can be no others. It changes no batch.
        start_method: of the workers, such as "spawn"; see `worker_start_method` if None.
    """

    def __init__(
        self, images: Images, batches: Iterable[Sequence[Any]], *, workers: int, start_method: str | None = None
    ) -> None:
        if workers and (reason := _no_workers(workers)) is not None:
            _LOG.warning("%s: workers=0", reason)
            workers = 0
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=batches,  # type: ignore[arg-type]
            multiprocessing_context=(start_method or worker_start_method()) if workers else None,
            num_workers=workers,
            collate_fn=partial(collate_for_parent if workers else collate_in_place, images),
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
            timeout=_PATIENCE if workers else 0,
            # Of its own: each start of workers draws a number, which must not change the training's noise.
            generator=torch.Generator(),
        )
        self.images = images
        self._warned = False

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Raises UserError where a sample does, WorkerError where a worker dies, hangs, or cannot be started."""
        try:
            with self._told_of_deaths(), _signals_held_back():
                batches = iter(self._loader)
        except OSError as error:
            raise WorkerError(
                f"the processes that load images cannot be started: {error}", "set workers=0, or fewer of them"
            ) from None
        while True:
            with self._told_of_deaths():
                batch = next(batches, None)
            if batch is None:
                return
            opened = self._unpickled(batch) if isinstance(batch, Pickled) else batch
            if isinstance(opened, Failure):
                raise opened.kind(opened.message, opened.remedy)
            yield opened

    @contextmanager
    def _told_of_deaths(self) -> Iterator[None]:
        """Raises WorkerError if a worker has died or dies meanwhile. For those on its list torch interrupts this process
        wherever it is, in an optimiser's step too: they are on the list here alone."""
        try:
            try:
                self._list_workers()
                yield
            finally:
                self._unlist_workers()
        except (RuntimeError, ConnectionError, EOFError) as error:
            if (known := worker_error(error)) is None:
                raise
            raise known from error

    def _list_workers(self) -> None:
        """Raises RuntimeError, in torch's words, if one has died before."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is None:  # there are none, or not yet: torch lists those that it starts
            return
        torch._C._set_worker_pids(id(iterator), tuple(worker.pid for worker in iterator._workers))
        iterator._worker_pids_set = True
        for worker in iterator._workers:
            if (code := worker.exitcode) is not None:
                how = f"is killed by signal: {signal.strsignal(-code)}" if code < 0 else "exited unexpectedly"
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}")

    def _unlist_workers(self) -> None:
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None and iterator._worker_pids_set:
            iterator._worker_pids_set = False
            torch._C._remove_worker_pids(id(iterator))

    def _unpickled(self, pickled: Pickled) -> Any:
        if not self._warned:
            self._warned = True
            _LOG.warning(
                "batches of %.0f MB come through pipes, which takes longer than shared memory: %s; "
                "`docker run --shm-size=8g` gives a container more of it",
                len(pickled.content) / 1e6,
                pickled.reason,
            )
        batch = pickle.loads(pickled.content)
        return batch.pin_memory() if isinstance(batch, Batch) and torch.cuda.is_available() else batch

    def close(self) -> None:
        """End the worker processes."""
        # Dropping the loader would do it too, but only when nothing refers to it any more, a traceback for example.
        end = getattr(self._loader._iterator, "_shutdown_workers", None)
        if end is not None:
            end()
        self._loader._iterator = None


def _no_workers(workers: int) -> str | None:
    """Why there can be no worker processes here; None if there can."""
    if multiprocessing.current_process().daemon:
        return "a daemonic process, such as one of multiprocessing.Pool, can start no worker processes"
    try:  # the locks of torch's loader: three for each queue and five for an event
        _ = [multiprocessing.get_context().Lock() for _ in range(3 * (workers + 1) + 5)]
    except OSError as error:
        return f"/dev/shm, which worker processes need, cannot be used ({error.strerror or error})"
    return None


def training_loader(
    config: Config, split: DetectionDataset, preprocessing: Preprocessing, *, rank: int = 0, world_size: int = 1
) -> tuple[ImageLoader, TrainingBatches]:
    """The loader of a training, and its sampler, whose `epoch` is to be set before each pass."""
    sampler = TrainingBatches(
        sizes=split.sizes,
        batch_size=config.batch_size,
        scale=config.augment.scale,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )
    images = TrainingImages(split=split, augment=Augment(config.augment, preprocessing), cache_gib=config.cache_images)
    return ImageLoader(images, sampler, workers=config.workers), sampler
