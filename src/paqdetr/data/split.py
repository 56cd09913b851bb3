"""Divides images into parts, so that no part has near-duplicates of another one's images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.check import ImageFacts, inspect_all, similar
from paqdetr.data.convert import Conversion, write_splits
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.layout import find_layout
from paqdetr.errors import ConfigError, DataError

Progress = Callable[[int, int], None]

_PAIRS_AT_ONCE = 2**18  # of near-duplicates that are kept: every two frames of a still scene are a pair


def hold_out(split: DetectionDataset, fraction: float, *, seed: int) -> tuple[DetectionDataset, DetectionDataset]:
    """A split without some of its images, and these as `val`.

    Args:
        fraction: of the images, in (0, 1).
        seed: of the choice. Near-duplicates stay together, and the last images of a class stay where they are.

    Raises:
        DataError: an image does not decode, or the images cannot be divided.
    """
    parts = divide(split.annotations, {"val": fraction}, seed=seed)
    return tuple(  # type: ignore[return-value]
        DetectionDataset(split.annotations.with_images(parts[name]), name=name) for name in ("train", "val")
    )


def split_dataset(
    source: str | Path,
    target: str | Path,
    *,
    val: float = 0.1,
    test: float = 0.0,
    seed: int = 0,
    link: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes a data set as COCO whose `val` and `test` are cut out of the source's `train`; see `divide`.

    Args:
        source: a folder in one of the layouts of `find_layout`, or a `data.yaml`. Its other splits are written as they are.
        target: a folder that does not exist or is empty.
        val, test: shares of the images of train; 0 cuts none.
        link: hard links to the images instead of copies.

    Raises:
        ConfigError: the shares are below 0, or 1 or more together.
        DataError: the source is malformed, has no `train`, or has already what is to be cut out; nothing is to be cut out; or
            the target is in use.
    """
    shares = {name: share for name, share in (("val", val), ("test", test)) if share}
    if min(val, test) < 0 or not 0 <= val + test < 1:
        raise ConfigError(
            f"val={val:g}, test={test:g}: expected shares that add up to less than 1", "Choose smaller ones."
        )
    layout = find_layout(source)
    splits = {split: place.read(Issues()) for split, place in layout.splits.items()}
    if "train" not in splits:
        raise DataError(f"{source}: has no split 'train', found {', '.join(splits)}", "Rename what is to be divided.")
    _require_new(shares, splits, source)
    train = splits.pop("train")
    parts = divide(train, shares, seed=seed, progress=progress)
    divided = {name: train.with_images(positions) for name, positions in parts.items()}
    divided["train"].masks, divided["train"].poses = train.masks, train.poses
    written, losses = write_splits(divided | splits, Path(target), to="coco", link=link)
    return Conversion.of(layout.format, written, losses)


def _require_new(shares: Mapping[str, float], splits: Collection[str], source: str | Path) -> None:
    """Raise DataError if nothing is to be cut out, or something that is there."""
    there = [name for name in shares if name in splits]
    if shares and not there:
        return
    new = {name: shares.get(name, 0.1) for name in ("val", "test") if name not in splits}
    options = " ".join(f"--{name} {new.get(name, 0):g}" for name in ("val", "test"))
    raise DataError(
        f"{source}: has a split {there[0]!r} already" if there else f"{source}: val=0, test=0: nothing is to be cut",
        f"Pass {options} to cut {' and '.join(new)}."
        if new
        else "It has train, val and test: nothing needs to be cut.",
    )


def divide(
    annotations: Annotations, shares: Mapping[str, float], *, seed: int, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Positions of the images of "train" and of every part, at random; every image is in one of them.

    Near-duplicates (see `data.check.fingerprint`) are in the same part. An image stays in train if a class would have no box
    to train on without it. So a part may be a little smaller than its share.

    Raises:
        DataError: an image does not decode, or a part would be empty.
    """
    paths = [annotations.image_dir / name for name in annotations.file_names]
    facts = []
    for fact in inspect_all(paths):
        if fact.error is not None:
            raise DataError(
                f"{paths[len(facts)]}: {fact.error}", "Correct it; `paqdetr data check` lists all problems."
            )
        facts.append(fact)
        if progress is not None:
            progress(len(facts), len(paths))
    groups = duplicate_groups(facts)
    has_class = np.zeros((len(facts), len(annotations.classes)), dtype=bool)  # (N, C)
    trainable, _ = annotations.trainable()
    has_class[annotations.owners[trainable], annotations.labels[trainable]] = True
    left = has_class.sum(axis=0)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    rest = np.random.default_rng(seed).permutation(len(members)).tolist()
    chosen: dict[str, np.ndarray] = {}
    for part, share in shares.items():
        wanted, taken, others = max(round(share * len(facts)), 1), [order[:0]], []
        for number in rest:
            own = members[number]
            seen = has_class[own].sum(axis=0)
            if len(own) <= wanted and ((left > seen) | (seen == 0)).all():
                taken.append(own)
                wanted -= len(own)
                left -= seen
            else:
                others.append(number)
        rest, chosen[part] = others, np.sort(np.concatenate(taken))
        if not len(chosen[part]) or not rest:
            raise DataError(
                f"{annotations.source}: {len(facts)} images in {len(members)} groups of near-duplicates cannot be divided into "
                f"train and {share:.0%} for {part}",
                "Divide them yourself, or take another share.",
            )
    train = np.setdiff1d(np.arange(len(facts)), np.concatenate(list(chosen.values())))
    return {"train": train, **chosen}


def duplicate_groups(facts: Sequence[ImageFacts]) -> np.ndarray:
    """(N,) int: images that are the same or look the same, directly or through others, have the same number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def groups() -> np.ndarray:
        rows, columns = np.concatenate(pairs).T
        graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(facts),) * 2)
        return connected_components(graph, directed=False)[1]

    first_with: dict[bytes, int] = {}
    same = [
        (first_with.setdefault(fact.digest, index), index) for index, fact in enumerate(facts) if fact.error is None
    ]
    pairs, waiting = [np.array(same, dtype=np.int64).reshape(-1, 2)], 0
    for found in similar([fact.print for fact in facts]):
        pairs.append(found[:, :2])
        waiting += len(found)
        if waiting > _PAIRS_AT_ONCE:  # each with the first of its group says as much
            _, first, group = np.unique(groups(), return_index=True, return_inverse=True)
            pairs, waiting = [np.stack([first[group], np.arange(len(facts))], axis=1)], 0
    return groups()
