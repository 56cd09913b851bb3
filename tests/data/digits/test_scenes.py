from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paqdetr.data.digits.glyphs import SPLITS, glyphs_of
from paqdetr.data.digits.scenes import Scene, SceneSpec, compose_scene
from paqdetr.errors import ConfigError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose_scene(SceneSpec(), seed=3, split=split, index=i) for split in SPLITS for i in range(20)]


def test_shapes_and_counts(scenes: list[Scene]) -> None:
    counts = [len(scene.digits) for scene in scenes]
    assert min(counts) >= 3 and max(counts) <= 12 and len(set(counts)) > 5
    for scene in scenes:
        assert scene.image.shape == (320, 320, 3) and scene.image.dtype == np.uint8
        assert scene.boxes.shape == (len(scene.digits), 4) and scene.boxes.dtype == np.int64
        assert (scene.boxes >= 0).all() and (scene.boxes <= 320).all()


def test_the_hidden_share_keeps_its_limit_and_is_that_of_the_owner_map(scenes: list[Scene]) -> None:
    visible = np.concatenate([scene.visible for scene in scenes])
    assert visible.min() >= 0.4 and visible.max() == 1.0
    assert 0.1 < (visible < 0.9).mean() < 0.5  # hiding is common, not the rule
    for scene in scenes:
        for digit in range(len(scene.digits)):
            assert (scene.owner == digit).any()


def test_boxes_are_tight_around_visible_ink(scenes: list[Scene]) -> None:
    for scene in scenes:
        for digit, (x0, y0, x1, y1) in enumerate(scene.boxes):
            ink = scene.owner == digit
            inside = ink[y0:y1, x0:x1]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            # What lies outside are specks, and only hidden digits have them.
            outside = ink.sum() - inside.sum()
            assert outside == 0 or (scene.visible[digit] < 1 and outside < 0.2 * ink.sum())


def test_whole_digits_have_the_sizes_asked_for(scenes: list[Scene]) -> None:
    sides = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2])[s.visible == 1].max(axis=1) for s in scenes]) / 320
    assert sides.min() >= 0.06 - 2 / 320 and sides.max() <= 0.45 + 2 / 320
    assert (sides < 0.1).mean() > 0.1 and (sides > 0.25).mean() > 0.1


def test_ink_can_be_seen(scenes: list[Scene]) -> None:
    # Brightness of a digit's ink against the pixels of its box that are nobody's ink.
    contrasts = []
    for scene in scenes:
        luma = scene.image.astype(float) @ (0.299, 0.587, 0.114)
        for digit, (x0, y0, x1, y1) in enumerate(scene.boxes):
            owner, values = scene.owner[y0:y1, x0:x1], luma[y0:y1, x0:x1]
            if (owner == -1).sum() > 10:
                contrasts.append(abs(values[owner == digit].mean() - values[owner == -1].mean()))
    assert np.quantile(contrasts, 0.05) > 10
    assert np.quantile(contrasts, 0.1) < 60  # and is not always obvious


def test_glyphs_come_from_their_own_split(scenes: list[Scene]) -> None:
    for position, split in enumerate(SPLITS):
        for scene in scenes[20 * position : 20 * (position + 1)]:
            for digit, glyph in zip(scene.digits, scene.glyphs, strict=True):
                assert glyph in glyphs_of(split)[digit]


def test_scenes_differ_by_seed_split_and_index() -> None:
    spec = SceneSpec(size=64)
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1), (0, "train", 0)]
    digests = [compose_scene(spec, seed=s, split=p, index=i).image.tobytes() for s, p, i in keys]
    assert len(set(digests[:4])) == 4 and digests[4] == digests[0]


def test_a_scene_is_what_it_was_before() -> None:
    """Pixels before encoding, a box, the digits. If a change of ours fails this, raise the edition format.

    A new Pillow or numpy may change pixels too; then renew the digests.
    """
    scene = compose_scene(SceneSpec(size=96), seed=0, split="train", index=5)
    assert scene.digits.tolist() == [0, 4, 5, 7, 8, 6, 1, 7, 1]
    assert scene.boxes[0].tolist() == [54, 38, 85, 77]
    assert hashlib.sha256(scene.image.tobytes()).hexdigest()[:16] == "fafca71a7309cac9"


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(64, 200),
    low=st.integers(1, 4),
    more=st.integers(0, 4),
    hidden=st.sampled_from([0.0, 0.05, 0.3, 0.8]),
    seed=st.integers(0, 2**40),
)
def test_any_spec_is_kept(size: int, low: int, more: int, hidden: float, seed: int) -> None:
    spec = SceneSpec(size=size, min_objects=low, max_objects=low + more, max_hidden=hidden, max_scale=0.3)
    scene = compose_scene(spec, seed=seed, split="val", index=0)
    assert scene.image.shape == (size, size, 3)
    assert low <= len(scene.digits) <= low + more
    assert (scene.visible >= 1 - hidden - 1e-9).all()
    assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 63},
        {"min_objects": 0},
        {"min_objects": 5, "max_objects": 4},
        {"min_scale": 0.5},
        {"max_scale": 0.95},
        {"max_rotation": -1.0},
        {"max_hidden": 1.0},
    ],
)
def test_specs_out_of_range(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).removeprefix("min_").removeprefix("max_")):
        SceneSpec(**wrong)


def test_too_many_objects_for_one_image() -> None:
    spec = SceneSpec(size=64, min_objects=15, max_objects=15, min_scale=0.6, max_scale=0.6)
    with pytest.raises(ConfigError, match=r"15 objects of 0\.6"):
        compose_scene(spec, seed=0, split="train", index=0)
