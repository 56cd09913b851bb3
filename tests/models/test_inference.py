from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from paqdetr.config import ModelConfig
from paqdetr.errors import ConfigError, DataError, NonFiniteError
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.models.inference import detect_batch, postprocess
from paqdetr.structures import ClassTable, Detections


@pytest.fixture(params=["dino_nano", "paq_dino_nano"])
def model(request: pytest.FixtureRequest, stir: Callable) -> Detector:
    """Two classes, so that all 200 scores of an image are detections and none is cut off at 300."""
    torch.manual_seed(3)
    model = create_model(request.param, num_classes=2, image_size=64, backbone="test_resnet", decoder_layers=2)
    for part in (model.encoder, model.decoder, model.query_source, model.start):
        stir(part)
    return model


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_query(detections: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores, query by query: scores all but equal may change places by rounding."""
    order = np.lexsort((detections.labels, detections.query_indices))
    return detections.boxes[order], detections.scores[order]


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected) == 200
    for a, b in zip(by_query(found), by_query(expected), strict=True):
        assert np.abs(a - b).max() < 1e-4 if a.ndim == 2 else np.abs(a - b).max() < 1e-6


def in_double(model: Detector) -> Detector:
    """The detector in float64, pixels too."""
    model.double().register_forward_pre_hook(lambda _, arguments: (arguments[0].double(), *arguments[1:]))
    return model


@pytest.mark.integration
def test_the_same_alone_and_in_any_batch_and_order(model: Detector) -> None:
    """In float64: sums are rounded in an order that depends on the size of the batch (BLAS picks its kernel by it), and in
    float32 that now and then exchanges two proposals of an untrained model whose scores are equal but for the last bit. Noise of
    one unit in the last place of the pixels does the same to an image alone. Detections are float32: hence the tolerances.
    """
    in_double(model)
    model.preprocessing = replace(model.preprocessing, image_size=128)  # float64 is slow
    sizes = [(60, 90), (90, 60), (60, 90), (61, 90), (60, 90)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    alone = [model.predict(image, threshold=0.0)[0] for image in images]
    for batch_size, order in ((1, [4, 3, 2, 1, 0]), (4, [0, 1, 2, 3, 4]), (2, [3, 0, 4, 1, 2])):
        found = model.predict([images[i] for i in order], threshold=0.0, batch_size=batch_size)
        for i, detections in zip(order, found, strict=True):
            assert_same(detections, alone[i])


def test_every_kind_of_source(model: Detector, tmp_path: Path) -> None:
    array = picture(48, 64, 0)
    image = Image.fromarray(array)
    path = tmp_path / "street.png"
    image.save(path)
    expected = model.predict(array, threshold=0.0)
    assert isinstance(expected, list) and len(expected) == 1 and expected[0].image_id is None
    for source in (path, str(path), image, [path], (image,), [array]):
        (found,) = model.predict(source, threshold=0.0)
        assert np.array_equal(found.boxes, expected[0].boxes)
    assert model.predict(path)[0].image_id == "street.png"
    mixed = model.predict([path, array, image], threshold=0.0)
    assert [d.image_id for d in mixed] == ["street.png", None, None]
    assert model.predict([]) == []


@pytest.fixture(scope="module")
def nano() -> Detector:
    return create_model("paq_dino_nano", num_classes=2, image_size=64, backbone="test_resnet", decoder_layers=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["paq_dino_nano", "deformable_detr_one_stage_nano", "dn_detr_nano"])
def test_a_model_in_another_precision(name: str, dtype: torch.dtype) -> None:
    """Without proposals the same queries answer, and boxes move by rounding alone."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=2, image_size=64, backbone="test_resnet", decoder_layers=2)
    (expected,) = model.predict(picture(48, 64, 0), threshold=0.0)
    model.to(dtype)
    (found,) = model.predict(picture(48, 64, 0), threshold=0.0)
    assert next(model.parameters()).dtype == dtype
    assert (found.boxes.dtype, found.scores.dtype) == (np.float32, np.float32)
    assert len(found) == len(expected)
    if name != "paq_dino_nano":
        (boxes, scores), (other_boxes, other_scores) = by_query(expected), by_query(found)
        limit = 1e-5 if dtype == torch.float64 else 0.03
        assert np.abs(scores - other_scores).max() < limit and np.abs(boxes - other_boxes).max() < 64 * limit


def test_a_forward_pass_in_half_precision_is_that_under_autocast() -> None:
    """With gradients, too: weights in bfloat16 against the same weights in float32."""
    torch.manual_seed(0)
    model = create_model("paq_dn_detr_nano", num_classes=2, image_size=64, backbone="test_resnet", decoder_layers=2)
    model.eval().bfloat16()
    pixels = torch.rand(1, 3, 32, 32).bfloat16()
    found = model(pixels)
    found.pred_logits.sum().backward()
    gradient = model.neck.lateral[0][0].weight.grad
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.float()(pixels.float())
    assert (found.pred_boxes - expected.pred_boxes).abs().max() < 0.01
    assert (found.pred_logits - expected.pred_logits).abs().max() < 0.05


def test_images_of_another_dtype_are_refused(nano: Detector) -> None:
    """Half precision would go through a model in float32 and come out as such; others end in torch's own error."""
    for dtype in (torch.float16, torch.float64, torch.uint8):
        with pytest.raises(ValueError, match=rf"expected torch\.float32, as the weights are, found {dtype}"):
            nano(torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_a_precision_that_the_device_has_not(nano: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("\"conv2d_cpu\" not implemented for 'Half'\nin some file")

    nano.half()
    monkeypatch.setattr(nano, "extract", fail)
    with pytest.raises(ConfigError, match=r"torch\.float16 does not run on this cpu: .* for 'Half'") as caught:
        nano.predict(picture(32, 32, 0))
    assert "model.float()" in caught.value.remedy
    nano.float()
    with pytest.raises(NotImplementedError):
        nano.predict(picture(32, 32, 0))


def test_boxes_are_in_pixels_of_the_picture_turned_upright(model: Detector, tmp_path: Path) -> None:
    upright = picture(40, 80, 1)
    lying = Image.fromarray(np.rot90(upright, 1).copy())  # 80 x 40, turned a quarter to the left
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter to the right to view"
    path = tmp_path / "turned.png"
    lying.save(path, exif=exif)
    with Image.open(path) as image:
        assert image.size == (40, 80)
        (opened,) = model.predict(image, threshold=0.0)
    (found,) = model.predict(path, threshold=0.0)
    (expected,) = model.predict(upright, threshold=0.0)
    for detections in (found, opened):
        assert np.array_equal(detections.boxes, expected.boxes)
    assert found.boxes[:, 0::2].max() > 40  # wider than the picture as stored


def test_threshold(model: Detector) -> None:
    image = picture(50, 70, 2)
    (everything,) = model.predict(image, threshold=0.0)
    assert (np.diff(everything.scores) <= 0).all()
    cut = float(everything.scores[20])
    (found,) = model.predict(image, threshold=cut)
    assert len(found) == int((everything.scores >= cut).sum())
    assert np.array_equal(found.boxes, everything.above(cut).boxes)
    (nothing,) = model.predict(image, threshold=1.0)
    assert len(nothing) == 0 and nothing.boxes.shape == (0, 4) and nothing.to_coco() == []


def test_boxes_lie_in_the_image(model: Detector) -> None:
    (found,) = model.predict(picture(50, 70, 2), threshold=0.0)
    assert (found.boxes >= 0).all() and (found.boxes <= [70, 50, 70, 50]).all()
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()


def test_the_mode_of_the_model_is_left_as_it_was(model: Detector) -> None:
    image = picture(32, 32, 0)
    first = model.train().predict(image, threshold=0.0)[0]
    assert model.training
    second = model.eval().predict(image, threshold=0.0)[0]
    assert not model.training
    assert np.array_equal(first.boxes, second.boxes)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_threads_share_a_model_in_evaluation_mode(model: Detector) -> None:
    """The first ends while the second is within the model, which stays as it is."""
    model.eval()
    both_inside, first_done, modes = threading.Barrier(2, timeout=60), threading.Event(), []

    def meet(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        both_inside.wait()
        if threading.current_thread().name == "second":
            assert first_done.wait(60)
            modes.append(model.training)

    model.register_forward_pre_hook(meet)

    def first() -> None:
        try:
            model.predict(picture(32, 32, 0))
        finally:
            first_done.set()

    threads = [
        threading.Thread(target=first, name="first"),
        threading.Thread(target=lambda: model.predict(picture(32, 32, 1)), name="second"),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert modes == [False]
    assert not model.training


def test_predictions_that_are_not_finite_are_an_error(model: Detector, tmp_path: Path) -> None:
    path = tmp_path / "street.png"
    Image.fromarray(picture(48, 64, 0)).save(path)
    pixels = model.preprocessing(Image.fromarray(picture(48, 64, 1)))
    with pytest.raises(NonFiniteError, match=r"image\(s\) \['batch position 1'\]"):
        list(detect_batch(model, [pixels, pixels * float("nan")], [(48, 64)] * 2))
    with torch.no_grad():
        for head in model.decoder.class_heads:
            head.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="predictions are NaN or infinite") as caught:
        model.predict([path, picture(48, 64, 2)], batch_size=2)
    assert caught.value.images == (str(path), "image 1")
    assert "earlier checkpoint" in caught.value.remedy


def test_a_broken_picture_is_named(model: Detector, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        model.predict([picture(32, 32, 0), path])


def test_images_of_one_batch_have_one_size(model: Detector) -> None:
    images = [model.preprocessing(Image.fromarray(picture(48, 64, seed))) for seed in range(2)]
    found = list(detect_batch(model, images, [(48, 64), (480, 640)]))
    assert found[0].boxes.max() <= 64 < found[1].boxes.max() <= 640


def case(**changes: Any) -> Detections:
    options = {
        "logits": torch.tensor([[0.0, -9.0], [2.0, 1.0]]),
        "boxes": torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.1, 0.2, 0.4, 0.2]]),
        "size": (100, 200),
        "classes": ClassTable((7, 3), ("cat", "dog")),
        "config": ModelConfig(),
        "threshold": 0.3,
    }
    return postprocess(**options | changes)


def test_postprocess_by_hand() -> None:
    found = case()
    assert found.scores.tolist() == pytest.approx([0.880797, 0.731059, 0.5])
    assert found.labels.tolist() == [7, 3, 7]
    assert found.query_indices is not None and found.query_indices.tolist() == [1, 1, 0]
    assert found.boxes[0].tolist() == pytest.approx([0, 10, 60, 30])  # cut off at the left border
    assert found.boxes[2].tolist() == pytest.approx([50, 0, 150, 100])
    assert found.names == {7: "cat", 3: "dog"}
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)


def test_postprocess_limit_and_threshold() -> None:
    assert case(config=ModelConfig(max_detections=2)).labels.tolist() == [7, 3]
    assert len(case(config=ModelConfig(max_detections=2), at_least=3)) == 3
    assert len(case(config=ModelConfig(max_detections=2), at_least=1)) == 2
    assert case(threshold=0.0).scores.size == 4
    assert case(threshold=0.5).scores.size == 3  # "at least"
    assert case(threshold=0.6).scores.size == 2
