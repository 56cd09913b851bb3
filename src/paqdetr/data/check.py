"""Reads every image and annotation of a data set once and lists what is wrong, and which images are the same or look the same."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paqdetr.data.annotations import EDGE_TOLERANCE, Annotations, Issues, MissingSplitError, Problem
from paqdetr.data.files import REPLACE
from paqdetr.data.layout import Format, find_layout
from paqdetr.data.stats import SplitSummary, describe_crowding
from paqdetr.errors import DataError
from paqdetr.images import read_image, read_traits
from paqdetr.structures import ClassTable

# Recompressed and resized duplicates differ in 0 to 4 bits of 64; one band more than that makes sure that some band is equal.
MAX_BITS = 4
_LEAST_CORRELATION = 0.97
_FLAT = 2.0  # standard deviation of grey values under which a picture has no structure to hash
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a picture looks like.

    Attributes:
        bits: the perceptual hash; None of a picture of one colour, which resembles all others of its kind.
        thumbnail: (256,) float32, 16 x 16 grey values with mean 0 and length 1.
    """

    bits: int | None
    thumbnail: np.ndarray


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an RGB picture."""
    from scipy.fft import dctn

    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    small = grey.reshape(16, 2, 16, 2).mean(axis=(1, 3)).reshape(-1)
    small = small - small.mean()
    if grey.std() < _FLAT:
        return Fingerprint(None, np.zeros(256, dtype=np.float32))
    low = np.asarray(dctn(grey, norm="ortho"))[:8, :8].reshape(-1)
    bits = int(np.packbits(low > np.median(low[1:])).view(">u8")[0])
    return Fingerprint(bits, (small / max(float(np.linalg.norm(small)), 1e-9)).astype(np.float32))


def similar(prints: list[Fingerprint | None]) -> Iterator[np.ndarray]:
    """The pairs that look the same, each once, in arrays of limited size: (P, 3) int64, first and second position, the lower one
    first, and how many bits differ."""
    known = [i for i, p in enumerate(prints) if p is not None and p.bits is not None]
    if len(known) < 2:
        return
    places = np.array(known)
    hashes = np.array([prints[i].bits for i in known], dtype=np.uint64)  # type: ignore[union-attr]
    thumbnails = np.stack([prints[i].thumbnail for i in known])  # type: ignore[union-attr]
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1  # (N, 64): the product of two rows is 64 less twice the bits that differ
    bands = _bands(hashes)
    for number, band in enumerate(bands):
        for rows, columns in _tiles_of_equals(band):
            differing = 32 - signs[rows] @ signs[columns].T / 2  # (rows, columns)
            found = (differing <= MAX_BITS) & (rows[:, None] < columns)
            for earlier in bands[:number]:  # a pair counts in the first band that it agrees in
                found &= earlier[rows][:, None] != earlier[columns]
            if found.any():
                found &= thumbnails[rows] @ thumbnails[columns].T >= _LEAST_CORRELATION
                row, column = np.nonzero(found)
                pairs = [places[rows[row]], places[columns[column]], differing[row, column]]
                yield np.stack(pairs, axis=1).astype(np.int64)


def _bands(hashes: np.ndarray) -> np.ndarray:
    """(`MAX_BITS` + 1, N) parts of the hashes: every pair that differs in `MAX_BITS` bits at most agrees in one of them."""
    edges = np.linspace(0, 64, MAX_BITS + 2).astype(int)
    parts = [hashes >> np.uint64(low) & np.uint64((1 << int(high - low)) - 1) for low, high in pairwise(edges)]
    return np.stack(parts).astype(np.uint16)


def _tiles_of_equals(band: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of arrays of positions, of limited length: every two positions of equal values meet once, the lower one in the first
    array."""
    order = np.argsort(band, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
        parts = [group[start : start + _ROWS_AT_ONCE] for start in range(0, len(group), _ROWS_AT_ONCE)]
        if len(group) > 1:
            yield from ((rows, columns) for i, rows in enumerate(parts) for columns in parts[i:])


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding an image showed.

    Attributes:
        error: why it does not decode, None if it does; nothing else is known of it then.
        size: (width, height), its EXIF turn applied.
        traits: see `read_traits`.
        digest: of the file's bytes.
        print: what it looks like.
    """

    error: str | None = None
    size: tuple[int, int] = (0, 0)
    traits: frozenset[str] = frozenset()
    digest: bytes = b""
    print: Fingerprint | None = None


def inspect(path: Path) -> ImageFacts:
    """Decode one image of a data set."""
    try:
        picture = read_image(path, remedy=REPLACE)
        traits = read_traits(path)
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except DataError as error:
        return ImageFacts(error=f"{error.message.removeprefix(f'{path}: ')}. {error.remedy}")
    except OSError as error:  # gone or locked since it was listed
        return ImageFacts(error=f"cannot be read: {error.strerror}")
    return ImageFacts(None, picture.size, traits, digest, fingerprint(picture))


# Images that wait for a thread: those of a large split would take memory.
_AT_ONCE = 1024


def inspect_all(paths: Sequence[Path], *, workers: int | None = None) -> Iterator[ImageFacts]:
    """Facts of every image, in order.

    Args:
        workers: threads; None for one per core. Decoding does not hold Python's lock, and unlike processes they start at once
            and need no `if __name__ == "__main__":` in the script that calls.
    """
    threads = (os.cpu_count() or 1) if workers is None else workers
    if threads < 2:
        yield from map(inspect, paths)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), _AT_ONCE):
            yield from pool.map(inspect, paths[start : start + _AT_ONCE])


_BROKEN_EXIF = "broken exif"  # of `read_traits`
# Kind of a warning -> what it means, the worst first.
_FIRST = {
    "leak between splits": "{count} of {images} {split} images have a near-duplicate in another split: AP on {split} is "
    "flattered",
    "missing split": "{message}",
    "no val split": "no val split: training prints no AP and keeps the last epoch; `paqdetr data split` makes one, and so does "
    "training with val_fraction=0.1",
    "class without training": "classes with boxes in {split} and none in train: {count}; their AP is 0",
    "class without boxes": "classes without boxes in any split: {count}; a model has outputs for them that learn to stay silent",
    "more boxes than are counted": "{split}: {message}",
    "duplicate box": "duplicate boxes in {split}: {count}; evaluation counts both, of which one is always missed; `paqdetr data "
    "convert` leaves them out",
    "duplicate image": "{count} of {images} {split} images are near-duplicates of others in it",
    "box without area": "boxes without area in {split}: {count}; training leaves them out, evaluation counts them as missed",
    "skipped file": "files left out of {split}: {count}",
    "file of no split": "COCO files that are not read: {count}; their names say no split",
}


@dataclass(slots=True)
class CheckReport:
    """What `check_dataset` found.

    Attributes:
        root: where the data set lies, which may be one folder below the one that was given.
        format: of the data set.
        problems: in the order found, at most 1,000 of a kind in a split.
        splits: counts by split.
        counts: how many problems there are of each (split, severity, kind).
    """

    root: Path
    format: Format
    problems: list[Problem] = field(default_factory=list)
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    @property
    def errors(self) -> list[Problem]:
        """What must be corrected before training."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """What should be looked at."""
        return [problem for problem in self.problems if problem.severity == "warning"]

    def number_of(self, severity: str) -> int:
        """How many problems there are, those that are not listed included."""
        return sum(count for (_, found, _), count in self.counts.items() if found == severity)

    def summary(self) -> list[tuple[str, str]]:
        """(severity, sentence) of what there is to know first, by importance."""
        found = []
        if self.errors:
            sentence = f"errors: {self.number_of('error')}; training would fail, or learn something wrong"
            found.append(("error", sentence))
        message = {(p.split, p.kind): p.message for p in reversed(self.problems)}
        for kind, sentence in _FIRST.items():
            for (split, severity, other), count in self.counts.items():
                if other == kind and severity == "warning":
                    images = self.splits[split].images if split else 0
                    values = {"split": split, "count": count, "images": images, "message": message[split, kind]}
                    found.append((severity, sentence.format_map(values)))
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json."""
        return {
            "format": self.format,
            "summary": [sentence for _, sentence in self.summary()],
            "errors": self.number_of("error"),
            "warnings": self.number_of("warning"),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "counts": [
                {"split": split, "severity": severity, "kind": kind, "count": count}
                for (split, severity, kind), count in self.counts.items()
            ],
            "problems": [asdict(problem) for problem in self.problems],
        }

    def _take(self, issues: Issues) -> None:
        self.problems += issues.found
        for (severity, kind), count in issues.counts.items():
            self.counts[issues.split, severity, kind] += count


def check_dataset(
    data: str | Path, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Checks all splits of a data set; a broken one becomes a problem in the report.

    Args:
        data: a folder in one of the layouts of `find_layout`, or a `data.yaml`.
        workers: threads that decode images; None: as many as there are cores.
        progress: called with (images done, images in all) after every image.

    Raises:
        DataError: the folder is missing, empty or of no known layout.
    """
    layout = find_layout(data)
    report = CheckReport(layout.root, layout.format)
    read: dict[str, Annotations] = {}
    issues: dict[str, Issues] = {}
    for split, place in layout.splits.items():
        issues[split] = Issues(collect=True, split=split)
        report.splits[split] = SplitSummary()
        try:
            read[split] = place.read(issues[split])
        except DataError as error:
            own, message = issues[split], f"{error.message}. {error.remedy}"
            if isinstance(error, MissingSplitError) and split not in ("train", "val"):  # training reads no other split
                own.warn("", message, kind="missing split")
            else:
                own.error("", message, kind="unreadable file")
    for split, content in read.items():
        _check_boxes(content, issues[split])
        report.splits[split] = SplitSummary.of(content)
    paths = [a.image_dir / name for a in read.values() for name in a.file_names]
    facts: list[ImageFacts] = []
    for fact in inspect_all(paths, workers=workers):
        facts.append(fact)
        if progress is not None:
            progress(len(facts), len(paths))
    start = 0
    for split, content in read.items():
        own = facts[start : start + len(content)]
        start += len(content)
        _check_sizes(content, own, issues[split])
        report.splits[split].traits = dict(
            Counter(trait for fact in own for trait in sorted(fact.traits - {_BROKEN_EXIF}))
        )
    _find_duplicates([(split, name) for split, a in read.items() for name in a.file_names], facts, issues)
    _compare_classes({split: a.classes for split, a in read.items()}, report, issues)
    whole = Issues(collect=True)
    if "train" not in layout.splits:
        whole.error(str(data), f"has no split 'train', found {', '.join(layout.splits)}", kind="no train split")
    elif "val" not in layout.splits:
        whole.warn(str(data), f"has no split 'val', found {', '.join(layout.splits)}", kind="no val split")
    for file in layout.unread_annotations():
        whole.warn(file, "is not read: its name says no split that the others leave", kind="file of no split")
    for found in (whole, *issues.values()):
        report._take(found)
    return report


def _check_boxes(annotations: Annotations, issues: Issues) -> None:
    """Boxes that training leaves out or clips, duplicates, and more of them than can be found."""
    a = annotations
    rows = np.flatnonzero(~a.crowd)
    owners, boxes = a.owners[rows], a.boxes[rows]
    height, width = a.sizes[owners].T if len(rows) else (np.zeros(0), np.zeros(0))
    x, y, w, h = boxes.T
    empty = (w <= 0) | (h <= 0)
    outside = ~empty & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = np.max([-x, -y, x + w - width, y + h - height], axis=0) if len(rows) else np.zeros(0)

    def warn(where: np.ndarray, kind: str, message: Callable[[int], str]) -> None:
        for i in np.flatnonzero(where).tolist():
            name, label = a.file_names[owners[i]], a.classes.names[a.labels[rows[i]]]
            shown = ", ".join(f"{value:g}" for value in boxes[i])
            issues.warn(name, f"box [{shown}] of class {label!r} {message(i)}", kind=kind)

    def image(i: int) -> str:
        return f"the image of {int(width[i])}x{int(height[i])}"

    warn(empty, "box without area", lambda i: "has no area; training leaves it out")
    beyond = outside | (~empty & (over > EDGE_TOLERANCE))
    if form := a.other_form():
        issues.doubt(a.source.name, form, kind="form of boxes")
    else:
        warn(outside, "box outside the image", lambda i: f"is outside {image(i)}; training leaves it out")
        over_edge = beyond & ~outside
        warn(over_edge, "box over the edge", lambda i: f"is {over[i]:g} pixels over the edge of {image(i)}")
    repeated = "is there twice; training leaves one out, evaluation counts both"
    warn(a.duplicates()[rows], "duplicate box", lambda i: repeated)
    for sentence in describe_crowding(a):
        issues.warn(a.source.name, sentence, kind="more boxes than are counted")
    if issues.split == "train" and len(a) and not (~empty & ~outside).any():
        issues.error(a.source.name, "no image has boxes to train on", kind="no boxes")
    bare = len(a) - len(np.unique(owners))
    if bare and len(a) and not issues.has_errors:  # of which boxes may be the ones that are missing
        issues.warn(
            a.source.name, f"{bare} of {len(a)} images have no boxes; right if nothing is in them",
            kind="images without boxes",
        )  # fmt: skip


def _check_sizes(annotations: Annotations, facts: list[ImageFacts], issues: Issues) -> None:
    """Images that do not decode, or are of another size than the annotations state."""
    for name, stated, fact in zip(annotations.file_names, annotations.sizes.tolist(), facts, strict=True):
        size = (stated[1], stated[0])
        if fact.error is not None:
            issues.error(name, fact.error, kind="unreadable image")
        elif fact.size != size:
            turned = " (turned by its EXIF orientation?)" if fact.size == size[::-1] else ""
            issues.error(
                name,
                f"is {fact.size[0]}x{fact.size[1]} pixels, the annotations say {size[0]}x{size[1]}{turned}",
                kind="image size",
            )
        if _BROKEN_EXIF in fact.traits:
            issues.warn(name, "its EXIF block is broken: it is read as stored, not turned", kind=_BROKEN_EXIF)


def _find_duplicates(images: list[tuple[str, str]], facts: list[ImageFacts], issues: dict[str, Issues]) -> None:
    """Images that are the same, or look the same, within a split and across splits; at most one finding per image.

    Args:
        images: (split, file name) of each of `facts`.
    """
    numbers = {split: number for number, split in enumerate(issues)}
    splits = np.array([numbers[split] for split, _ in images], dtype=np.int64)
    first_with: dict[bytes, int] = {}
    original = np.arange(len(images))
    for position, fact in enumerate(facts):
        if fact.error is None:
            original[position] = first_with.setdefault(fact.digest, position)
    # What is said of an image, as one number: a leak is worse than a duplicate in the split; then by differing bits, -1 of the
    # same file; then by the other image.
    nothing, ranks = np.iinfo(np.int64).max, MAX_BITS + 2
    said = np.full(len(images), nothing)

    def note(first: np.ndarray, second: np.ndarray, bits: np.ndarray | int) -> None:
        rank = (splits[first] == splits[second]) * ranks + bits + 1
        np.minimum.at(said, second, rank * len(images) + first)

    copies = np.flatnonzero(original != np.arange(len(images)))
    note(original[copies], copies, -1)
    for pairs in similar([fact.print for fact in facts]):
        note(*pairs[original[pairs[:, 0]] != original[pairs[:, 1]]].T)
    for position in np.flatnonzero(said != nothing).tolist():
        rank, other = divmod(int(said[position]), len(images))
        same_split, bits = rank >= ranks, rank % ranks - 1
        (split, name), (other_split, other_name) = images[position], images[other]
        where = other_name if same_split else f"{other_split}/{other_name}"
        how = "the same file as" if bits < 0 else f"looks like ({bits} of 64 bits differ)"
        issues[split].warn(name, f"{how} {where}", kind="duplicate image" if same_split else "leak between splits")


def _compare_classes(tables: dict[str, ClassTable], report: CheckReport, issues: dict[str, Issues]) -> None:
    """The other splits' classes against those of train."""
    train = tables.get("train")
    if train is None or not len(train):
        return
    of_train = train.id_to_name
    used = report.splits["train"].boxes_per_class
    for split, table in tables.items():
        if split == "train":
            continue
        for category, name in table.id_to_name.items():
            if of_train.get(category, name) != name:
                issues[split].error(
                    f"class {name}", f"has id {category}, which is {of_train[category]!r} in train", kind="class"
                )
            elif category not in of_train:
                issues[split].error(f"class {name}", f"has id {category}, which train does not list", kind="class")
            elif (
                report.splits[split].boxes_per_class.get(name) and not used.get(name) and not issues["train"].has_errors
            ):
                issues[split].warn(f"class {name}", "has boxes here and none in train", kind="class without training")
    if any(own.has_errors for own in issues.values()):
        return
    for name in train.names:
        if not any(summary.boxes_per_class.get(name) for summary in report.splits.values()):
            message = "has boxes in no split, crowds aside, and training makes an output for it"
            issues["train"].warn(f"class {name}", message, kind="class without boxes")
