"""What a training says of its queries: by hand, against the criterion, and in the records of runs."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.data.loader import plain_batch
from paqdetr.distributed import Processes
from paqdetr.losses import build_criterion
from paqdetr.metrics import gini
from paqdetr.models.outputs import Decoded, DetectorOutput
from paqdetr.models.zoo import build_model
from paqdetr.paq import Mixture, Pairs
from paqdetr.runs import Run
from paqdetr.structures import Targets
from paqdetr.training import train
from paqdetr.training.figures import Interval, ValidationLoss, batch_use, mixture_figures, to_host, watch_gradients
from paqdetr.training.setup import with_classes


@dataclass
class Output:
    """All that the figures look at."""

    mixture: Mixture


def pairs(queries: list[int], boxes: list[int]) -> Pairs:
    return Pairs(torch.tensor(queries, dtype=torch.int64), torch.tensor(boxes, dtype=torch.int64))


def output(content: Tensor, weights: Tensor | None = None) -> Any:
    return Output(Mixture(content=content, weights=weights))


def test_mixture_figures_by_hand() -> None:
    content = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])  # cosines 0, -1, 0
    weights = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]]])  # entropies 0, ln 2, ln 4

    figures = {name: value.item() for name, value in mixture_figures(output(content, weights)).items()}
    assert figures["query_cosine"] == pytest.approx(-1 / 3)
    assert figures["mixture_entropy"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert mixture_figures(output(content)).keys() == {"query_cosine"}
    assert mixture_figures(output(content), torch.tensor(0.25))["pattern_cosine"] == 0.25


def test_a_record_by_hand() -> None:
    """Two images with 2 and 1 boxes, 4 queries, 3 layers, then a batch with none."""
    weights = torch.tensor([[[1.0, 0]] * 4, [[0.5, 0.5]] * 4])
    intermediate = [pairs([0, 1, 3], [0, 0, 1]), pairs([2], [0])]  # k = 2, 1, 1
    second = [pairs([0, 1, 2, 3], [1, 1, 1, 0]), pairs([0, 1], [0, 0])]  # k = 1, 3, 2
    last = [pairs([0, 3], [0, 1]), pairs([0], [0])]
    first = batch_use(output(torch.zeros(2, 4, 2), weights), [intermediate, second, last], [2, 1])
    first.gradients += torch.tensor([3.0, 0, 0, 1])
    empty = batch_use(output(torch.zeros(2, 4, 2), weights), [[pairs([], [])] * 2] * 3, [0, 0])
    interval = Interval()
    interval.add({"loss": 1.0}, [first], 2)
    interval.add({"loss": 3.0}, [empty], 2)
    found = interval.means(Processes())
    assert found["loss"] == 2 and found["positives_per_box"] == [1.3333, 2.0, 1.0]
    assert found["positives_histogram"] == {
        "layer1": {"0": 0, "1": 2, "2": 1, "3": 0},
        "layer2": {"0": 0, "1": 1, "2": 1, "3": 1},
    }
    assert found["positives_gini"] == pytest.approx(gini([2, 0, 0, 1]))
    # Three uses in four images of four queries: 4 binomial draws with p = 3/16; a slow double sum.
    chances = [math.comb(4, k) * (3 / 16) ** k * (13 / 16) ** (4 - k) for k in range(5)]
    difference = sum(chances[i] * chances[j] * abs(i - j) for i in range(5) for j in range(5))
    assert found["positives_gini_chance"] == pytest.approx(difference / (2 * 0.75) * 3 / 4, abs=1e-6)
    assert found["gradient_gini"] == pytest.approx(gini([3, 0, 0, 1]))
    assert found["pattern_gini"] == pytest.approx(0.25) and found["dead_patterns"] == 0  # masses 12 and 4


def test_figures_cross_to_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    crossed, cpu = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: crossed.append(tensor.shape) or cpu(tensor))
    given = [torch.tensor(2.5, requires_grad=True), torch.zeros(0), torch.arange(6).reshape(2, 3).half()]
    found = to_host(given)
    assert len(crossed) == 1 and all(value.dtype == torch.float32 for value in found)
    assert [value.tolist() for value in found] == [2.5, [], [[0, 1, 2], [3, 4, 5]]]


def test_overflows_are_counted_and_left_out_of_the_norm() -> None:
    interval = Interval()
    interval.add({"loss": 1.0}, [], 2, overflowed=True)
    assert interval.means(Processes())["grad_norm"] is None
    interval.add({"loss": 2.0, "grad_norm": 3.0}, [], 2)
    interval.add({"loss": 3.0, "grad_norm": 5.0}, [], 2)
    found = interval.means(Processes())
    assert (found["loss"], found["grad_norm"], found["overflowed_steps"]) == (2, 4, 1)


def test_positives_of_a_box_are_a_mean_over_boxes() -> None:
    """A batch of 1 box with 4 positives, and one of 9 boxes with 1 each."""
    content = output(torch.zeros(1, 9, 2))
    few = batch_use(content, [[pairs([0, 1, 2, 3], [0] * 4)], [pairs([0], [0])]], [1])
    many = batch_use(content, [[pairs(list(range(9)), list(range(9)))]] * 2, [9])
    interval = Interval()
    interval.add({}, [few, many], 2)
    assert interval.means(Processes())["positives_per_box"] == [1.3, 1.0]


def test_many_positives_are_counted_together() -> None:
    use = batch_use(
        output(torch.zeros(1, 40, 2)), [[pairs(list(range(40)), [0] * 17 + [1] * 23)], [pairs([0], [0])]], [2]
    )
    interval = Interval()
    interval.add({}, [use], 1)
    figures = interval.means(Processes())
    assert figures["positives_histogram"]["layer1"]["16"] == 2
    assert not {"gradient_gini", "pattern_gini", "dead_patterns"} & figures.keys(), "nothing was there"


def test_gradients_are_those_of_the_content(tiny_digits: Path, tiny_settings: dict[str, Any]) -> None:
    """Against autograd's own, and what the criterion matched."""
    split = open_split(tiny_digits, "train")
    config = with_classes(load_config("paq_dino_nano", tiny_settings), split)
    model = build_model(config, classes=split.classes, pretrained_backbone=False).train()
    criterion = build_criterion(config.loss)
    batch = plain_batch(split, model.preprocessing, [0, 1, 2])
    found = model(batch.images, batch.padding_mask, batch.targets)
    report = criterion(found, batch.targets, aux_losses=model.aux_losses())
    boxes = [len(target) for target in batch.targets]
    use = batch_use(found, report.pairs, boxes)
    watch_gradients(found.mixture.content, use.gradients, scale=4.0)
    content = found.mixture.content
    (expected,) = torch.autograd.grad(report.total, content, retain_graph=True)
    use.gradients.zero_()  # the line before has been watched too
    (report.total * 4).backward()
    assert torch.allclose(use.gradients, expected.norm(dim=-1).sum(0), rtol=1e-4)
    assert use.gradients.min() > 0
    assert use.matches.sum() == sum(boxes) == use.histogram.reshape(2, -1)[0].sum()
    positives = use.histogram.reshape(2, -1) @ np.arange(17) / sum(boxes)
    assert positives == pytest.approx(report.positives_per_box[:-1])
    assert use.mass.sum() == pytest.approx(3 * 20, rel=1e-5)


def test_an_overflow_counts_nothing() -> None:
    content, into = torch.ones(1, 3, 2, requires_grad=True), torch.zeros(3)
    watch_gradients(content, into)
    factor = torch.tensor([[[1.0, 0], [math.inf, 0], [math.nan, 1]]])
    (content * factor).sum().backward()
    assert into.tolist() == [1, 0, 0]
    fixed = torch.ones(1, 3, 2)
    watch_gradients(fixed, into)  # frozen content has no gradient, and that is no error
    assert not fixed.requires_grad


def test_the_records_of_a_run(tiny_run: Run, tiny_digits: Path) -> None:
    boxes = sum(len(open_split(tiny_digits, "train").labels(i)) for i in range(8))
    for epoch in (1, 2):
        rows = [row for row in tiny_run.records("train") if math.ceil(row["epoch"]) == epoch]
        counted = 0
        for row in rows:
            histogram = row["positives_histogram"]
            assert list(histogram) == ["layer1", "layer2"]
            for layer, per_box in zip(histogram.values(), row["positives_per_box"], strict=False):
                total = sum(layer.values())
                assert sum(int(k) * count for k, count in layer.items()) / total == pytest.approx(per_box, abs=1e-3)
            counted += sum(histogram["layer1"].values())
            assert 0 < row["positives_gini"] < 1 and 0 < row["positives_gini_chance"] < 1
            assert 0 <= row["gradient_gini"] < 1 and 0 <= row["pattern_gini"] < 1
            assert row["pattern_cosine"] * 0.2 == pytest.approx(row["loss_diversity"], abs=1e-6)
            assert isinstance(row["dead_patterns"], int)
        assert 0.5 * boxes <= counted <= boxes, "boxes of an epoch, but for those that augmentation cuts away"


@pytest.mark.parametrize("more", [{"amp": "bf16"}, {"accumulate": 2, "model.queries": "static"}])
def test_other_kinds_of_runs(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None, more: dict[str, Any]
) -> None:
    run = train(
        "paq_dino_nano",
        data=tiny_digits,
        output=tmp_path / "run",
        device="cpu",
        max_steps=1,
        settings={**tiny_settings, **more},
    )
    row = run.records("train")[0]
    assert row["gradient_gini"] > 0 and row["positives_gini"] > 0
    assert ("pattern_gini" in row) == ("pattern_cosine" in row) == ("amp" in more)


@pytest.mark.parametrize("assigner", ["one_to_one", "quality_aware"])
def test_the_validation_loss_is_the_criterions_however_images_are_batched(assigner: str) -> None:
    """Three images, the last without boxes: in one batch, one by one, and by two processes, whose sums travel pickled."""
    config = load_config("paq_dino_nano", {"loss.assigner": assigner, "loss.one_to_many_from": 0.0})
    criterion, generator = build_criterion(config.loss), torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 3, 9, 4, generator=generator), torch.rand(2, 3, 9, 4, generator=generator) / 4 + 0.3
    targets = [
        Targets(torch.arange(n) % 4, torch.rand(n, 4, generator=generator) / 4 + 0.3, None, (64, 64)) for n in (3, 1, 0)
    ]

    def part(images: slice) -> tuple[Any, list[Targets]]:
        own = Decoded(logits[:, images], boxes[:, images])
        content = Mixture(content=torch.zeros(1, 9, 2), weights=None)
        return DetectorOutput(own.logits[-1], own.boxes[-1], own, None, content), targets[images]

    together, single, other = (ValidationLoss(criterion) for _ in range(3))
    together.see(*part(slice(0, 3)), indices=[0, 1, 2])
    single.see(*part(slice(0, 1)), indices=[0])
    other.see(*part(slice(1, 2)), indices=[1])
    other.see(*part(slice(2, 3)), indices=[2])
    single.merge(pickle.loads(pickle.dumps(other)))
    expected = criterion(*part(slice(0, 3)), progress=1.0)  # one-to-one in every layer
    found = together.means()
    assert found["loss"] == pytest.approx(float(expected.total), rel=1e-5)
    assert found["loss"] == pytest.approx(sum(value for name, value in found.items() if name != "loss"), abs=1e-5)
    assert single.means() == pytest.approx(found, rel=1e-5)
    nothing = ValidationLoss(criterion)
    nothing.see(*part(slice(2, 3)), indices=[2])
    assert nothing.means() == {}
