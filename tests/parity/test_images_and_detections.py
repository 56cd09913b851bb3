"""What published detectors do to an image before the network, and to its outputs after it.

Sources, where a test names no other: `get_size_with_aspect_ratio` of fundamentalvision/Deformable-DETR, datasets/transforms.py
48092c5, which DINO and DN-DETR share; `PostProcess` of its models/deformable_detr.py 48092c5 and of IDEA-Research/DN-DETR,
models/dn_dab_deformable_detr/dab_deformable_detr.py 3e196c4 (100 detections); that of IDEA-Research/DINO, models/dino/dino.py
66d7173, with `num_select = 300` of config/DINO/DINO_4scale.py 67bbcd9. None of the three cuts boxes off at the border.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from paqdetr.config import ModelConfig, ResizeRule, load_config
from paqdetr.models import create_model, list_models
from paqdetr.models.inference import postprocess
from paqdetr.models.zoo import preprocessing_of
from paqdetr.preprocessing import Normalization, Preprocessing
from paqdetr.structures import ClassTable

SHORT, LONGEST = 800, 1333
PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SIDES = st.integers(30, 4000)

HOSTS = [
    "deformable_detr_one_stage_r50",
    "deformable_detr_refine_r50",
    "deformable_detr_r50",
    "deformable_detr_plus_r50",
    "hybrid_deformable_detr_r50",
    "dab_deformable_detr_r50",
    "dn_detr_r50",
    "dino_r50",
    "dino_5scale_r50",
    "paq_dino_r50",
]
TINY: dict[str, Any] = dict(
    num_classes=2, backbone="test_resnet", dim=32, num_heads=4, ffn_dim=32, encoder_layers=1, decoder_layers=1
)


def sized(rule: ResizeRule, height: int, width: int, short: int = SHORT) -> tuple[int, int]:
    return Preprocessing((SHORT, LONGEST), 1, PLAIN, resize=rule).target_size(height, width, short / SHORT)


# --- target sizes


@given(SIDES, SIDES, st.sampled_from([480, 608, 800]))
def test_detr_truncates_the_long_side(height: int, width: int, short: int) -> None:
    """In integers. Training draws the short side from 480..800; the long side's limit stays 1333."""
    low, high = min(height, width), max(height, width)
    size = min(short, round(Fraction(LONGEST * low, high)))
    long = high if low == size else size * high // low
    assert sized("detr", height, width, short) == ((long, size) if height > width else (size, long))


def test_detectron2_rounds_up_from_a_half() -> None:
    """`ResizeShortestEdge.get_output_shape` of detectron2, data/transforms/augmentation_impl.py: `int(x + 0.5)`."""
    assert sized("detectron2", 480, 640) == (800, 1067)
    assert sized("detectron2", 640, 474) == (1080, 800)
    assert sized("detectron2", 320, 321) == (800, 803)  # 802.5, which Python rounds to 802
    assert sized("nearest", 320, 321) == (800, 802)
    assert sized("detectron2", 375, 500) == (800, 1067)
    assert sized("detectron2", 500, 1000) == (667, 1333)  # 666.5


@given(SIDES, SIDES)
def test_transformers_own_function(height: int, width: int) -> None:
    function = pytest.importorskip("transformers.image_transforms").get_size_with_aspect_ratio
    assert sized("transformers", height, width) == function((height, width), SHORT, LONGEST)


@given(SIDES, SIDES)
def test_relation_detr_truncates_both_sides_in_float32(height: int, width: int) -> None:
    """`EvalResize` of xiuqhou/Relation-DETR, models/detectors/base_detector.py 7047657. torch divides a number by a tensor as
    the number times the reciprocal."""
    one = np.float32
    low, high = one(1) / one(min(height, width)), one(1) / one(max(height, width))
    zoom = min(one(SHORT) * low, one(LONGEST) * high)
    assert sized("relation_detr", height, width) == (int(one(height) * zoom), int(one(width) * zoom))


@pytest.mark.parametrize(
    ("image", "detr", "detectron2", "transformers", "relation_detr"),
    [
        ((480, 640), (800, 1066), (800, 1067), (800, 1066), (800, 1066)),
        ((427, 640), (800, 1199), (800, 1199), (800, 1199), (800, 1199)),
        ((640, 428), (1196, 800), (1196, 800), (1196, 800), (1196, 800)),
        ((333, 500), (800, 1201), (800, 1201), (800, 1201), (800, 1201)),
        ((500, 1000), (666, 1332), (667, 1333), (666, 1333), (666, 1333)),
        ((800, 1200), (800, 1200), (800, 1200), (800, 1200), (800, 1200)),
    ],
)
def test_sizes_by_hand(
    image: tuple[int, int],
    detr: tuple[int, int],
    detectron2: tuple[int, int],
    transformers: tuple[int, int],
    relation_detr: tuple[int, int],
) -> None:
    assert sized("detr", *image) == detr
    assert sized("detectron2", *image) == detectron2
    assert sized("transformers", *image) == transformers
    assert sized("relation_detr", *image) == relation_detr


@pytest.mark.parametrize("name", [*list_models("*_r50"), *list_models("*_swin_l")])
def test_every_host_of_a_published_size_truncates_and_pads_nothing(name: str) -> None:
    preprocessing = preprocessing_of(load_config(name))
    assert preprocessing.target_size(480, 640) == (800, 1066)
    assert (preprocessing.rule, preprocessing.pad_divisor) == ("detr", 1)


def test_nano_hosts_round_to_multiples_of_their_coarsest_stride() -> None:
    for name in list_models("*_nano"):
        assert preprocessing_of(load_config(name)).target_size(480, 640) == (256, 320)


@pytest.mark.parametrize(("rule", "pillow"), [("detr", True), ("detectron2", True), ("nearest", False)])
def test_pixels_are_resized_with_pillow_where_the_program_does(rule: ResizeRule, pillow: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found = Preprocessing((80, 133), 1, PLAIN, resize=rule)(Image.fromarray(noise))
    resized = Image.fromarray(noise).resize((found.shape[2], found.shape[1]), Image.Resampling.BILINEAR)
    difference = (found - torch.from_numpy(np.array(resized)).permute(2, 0, 1)).abs()
    assert difference.max() == (0 if pillow else 1)


# --- padding


@pytest.mark.parametrize("host", HOSTS)
def test_prediction_pads_nothing(host: str) -> None:
    """`nested_tensor_from_tensor_list` (util/misc.py 48092c5) pads to the largest image of a batch, which is one image here."""
    model = create_model(host, **TINY, num_queries=5, image_size=(64, 107)).eval()
    seen: list[tuple[torch.Size, Tensor | None]] = []
    model.register_forward_pre_hook(lambda _, given: seen.append((given[0].shape, given[1])))
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    model.predict([picture, picture], batch_size=2)
    assert seen == [((2, 3, 64, 85), None)]


# --- detections


@pytest.mark.parametrize(("most", "clamp"), [(300, False), (100, False), (100, True)])
def test_detections_are_the_best_pairs_of_query_and_class(most: int, clamp: bool) -> None:
    """All pairs compete, so a query may give several detections; there is no background and no suppression."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 7, generator=generator)
    boxes = torch.rand(90, 4, generator=generator)
    config = ModelConfig(max_detections=most, clamp_boxes=clamp)
    found = postprocess(logits, boxes, (30, 40), ClassTable.numbered(7), config, threshold=0.0)
    pairs = [(float(logits[q, c].sigmoid()), q, c) for q in range(90) for c in range(7)]
    pairs = sorted(pairs, reverse=True)[:most]
    assert found.query_indices is not None
    assert [*zip(found.query_indices.tolist(), found.labels.tolist(), strict=True)] == [p[1:] for p in pairs]
    for box, (_, query, _) in zip(found.boxes.tolist(), pairs, strict=True):
        cx, cy, w, h = boxes[query].tolist()
        sides = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        if clamp:
            sides = [min(max(side, 0.0), 1.0) for side in sides]
        assert box == pytest.approx([s * p for s, p in zip(sides, (40, 30, 40, 30), strict=True)], abs=1e-4)
    outside = (found.boxes < 0).any() or (found.boxes > [40, 30, 40, 30]).any()
    assert outside != clamp
