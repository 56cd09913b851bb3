from __future__ import annotations

import io
import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from paqdetr.data import check as check_module
from paqdetr.data import split as split_module
from paqdetr.data.annotations import Issues
from paqdetr.data.check import MAX_BITS, Fingerprint, ImageFacts, fingerprint, similar
from paqdetr.data.split import duplicate_groups

LEAST_CORRELATION = 0.97
PHOTOGRAPHS = [Image.fromarray(image) for image in load_sample_images().images]


def pairs(prints: Sequence[Fingerprint | None]) -> list[tuple[int, ...]]:
    return [tuple(pair) for found in similar(list(prints)) for pair in found.tolist()]


def again(image: Image.Image, quality: int) -> Image.Image:
    """The picture after a trip through a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("photograph", range(2))
@pytest.mark.parametrize(
    "change",
    [
        lambda image: again(image, 20),
        lambda image: image.resize((200, 133), Image.Resampling.BILINEAR),
        lambda image: image.resize((900, 601), Image.Resampling.NEAREST),
        lambda image: image.point(lambda value: int(value * 0.8)),
        lambda image: again(image.resize((320, 213)), 50),
    ],
)
def test_a_copy_is_found_whatever_was_done_to_it(photograph: int, change) -> None:
    image = PHOTOGRAPHS[photograph]
    prints = [fingerprint(PHOTOGRAPHS[1 - photograph]), fingerprint(image), fingerprint(change(image))]
    ((first, second, bits),) = pairs(prints)
    assert (first, second) == (1, 2) and bits <= MAX_BITS


def test_parts_of_one_photograph_are_no_copies() -> None:
    width, height = PHOTOGRAPHS[0].size
    parts = [
        PHOTOGRAPHS[0].crop((x, y, x + width // 3, y + height // 3))
        for x in range(0, width * 2 // 3, width // 4)
        for y in range(0, height * 2 // 3, height // 4)
    ]
    assert pairs([fingerprint(part) for part in parts]) == []


def test_pictures_of_one_colour_resemble_nothing() -> None:
    flat = [fingerprint(Image.new("RGB", (50, 50), colour)) for colour in ("red", "red", "white")]
    assert [one.bits for one in flat] == [None] * 3
    assert pairs([*flat, None, fingerprint(PHOTOGRAPHS[0])]) == []


def by_definition(prints: list[Fingerprint | None]) -> list[tuple[int, int, int]]:
    """What comparing every two pictures would find."""
    found = []
    for (i, one), (j, other) in combinations(enumerate(prints), 2):
        if one is not None and other is not None and one.bits is not None and other.bits is not None:
            bits = (one.bits ^ other.bits).bit_count()
            if bits <= MAX_BITS and one.thumbnail @ other.thumbnail >= LEAST_CORRELATION:
                found.append((i, j, bits))
    return found


@st.composite
def many_prints(draw: st.DrawFn) -> list[Fingerprint | None]:
    """Some hashes, and others that differ from them in up to 6 bits; of three thumbnails two correlate by 0.98."""
    hashes = draw(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=20))
    for place, flipped in draw(
        st.lists(st.tuples(st.integers(0, 19), st.sets(st.integers(0, 63), max_size=6)), max_size=30)
    ):
        hashes.append(hashes[place % len(hashes)] ^ sum(1 << bit for bit in flipped))
    thumbnails = np.zeros((3, 256), dtype=np.float32)
    thumbnails[0, 0], thumbnails[1, :2], thumbnails[2, 2] = 1, (0.98, 0.199), 1
    return [
        draw(st.sampled_from([None, *(Fingerprint(bits, thumbnail) for thumbnail in thumbnails)])) for bits in hashes
    ]


@settings(deadline=None)
@given(prints=many_prints(), rows=st.sampled_from([1, 3, 512]))
def test_the_pairs_are_those_that_comparing_all_would_find(prints: list[Fingerprint | None], rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "_ROWS_AT_ONCE", rows)
        assert sorted(pairs(prints)) == by_definition(prints)


@settings(deadline=None)
@given(prints=many_prints(), digests=st.lists(st.integers(0, 30), min_size=50, max_size=50), data=st.data())
def test_groups_and_findings_are_those_of_the_pairs(
    prints: list[Fingerprint | None], digests: list[int], data: st.DataObject
) -> None:
    facts = [
        ImageFacts(None if one is not None else "damaged", digest=bytes([digest]), print=one)
        for digest, one in zip(digests, prints, strict=False)
    ]
    sound = [number for number, fact in enumerate(facts) if fact.error is None]
    splits = data.draw(st.lists(st.sampled_from(["train", "val"]), min_size=len(facts), max_size=len(facts)))
    equal = [(i, j, -1) for i, j in combinations(sound, 2) if digests[i] == digests[j]]
    alike = [(i, j, bits) for i, j, bits in by_definition(prints) if digests[i] != digests[j]]

    groups = list(range(len(facts)))
    for i, j, _ in [*equal, *alike]:
        groups = [groups[i] if group == groups[j] else group for group in groups]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_module, "_PAIRS_AT_ONCE", data.draw(st.sampled_from([0, 2, 1000])))
        assert duplicate_groups(facts).tolist() == [numbers[group] for group in groups]

    expected: dict[int, tuple[bool, int, int]] = {}
    first = {digests[i]: i for i in reversed(sound)}
    for i, j, bits in [*((first[digests[j]], j, -1) for _, j, _ in equal), *alike]:
        finding = (splits[i] == splits[j], bits, i)
        expected[j] = min(finding, expected.get(j, finding))
    issues = {split: Issues(collect=True, split=split) for split in ("train", "val")}
    check_module._find_duplicates([(split, Path(f"{i}.png")) for i, split in enumerate(splits)], facts, issues)
    said = {
        int(Path(problem.subject).stem): (problem.kind, problem.message.replace("/", " ").split()[-1], problem.message)
        for own in issues.values()
        for problem in own.found
    }
    assert said.keys() == expected.keys()
    for j, (same_split, bits, i) in expected.items():
        kind, name, message = said[j]
        assert (kind == "duplicate image", name) == (same_split, f"{i}.png")
        assert message.startswith("the same file as" if bits < 0 else f"looks like ({bits} of 64 bits differ)")


def test_frames_of_a_still_scene_take_little_memory() -> None:
    """Every two of them are a pair: two million in all."""
    rng = np.random.default_rng(0)
    thumbnail = fingerprint(PHOTOGRAPHS[0]).thumbnail
    facts = [
        ImageFacts(digest=number.to_bytes(4, "big"), print=Fingerprint(1 << int(rng.integers(64)), thumbnail))
        for number in range(2000)
    ]
    tracemalloc.start()
    try:
        assert set(duplicate_groups(facts).tolist()) == {0}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
