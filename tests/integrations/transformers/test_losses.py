"""The assigner's pairs in intermediate layers, and the host's own loss everywhere else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from paqdetr.errors import ConfigError
from paqdetr.integrations.transformers import attach
from paqdetr.integrations.transformers.losses import with_another
from paqdetr.paq import QualityAwareAssigner, Targets, focal_loss, varifocal_loss

Make = Callable[..., Any]
Batch = dict[str, Any]


def run(model: Any, batch: Batch) -> Any:
    """One step in training mode; the same denoising noise in each."""
    torch.manual_seed(3)
    return model.train()(**batch)


def is_middle(term: str, kind: str) -> bool:
    """Whether a term belongs to an intermediate decoder layer. RT-DETR and D-FINE count the encoder's as the last `aux`."""
    if kind.startswith(("rt", "d-fine")):
        return "_aux_" in term and not term.endswith("_aux_2")
    return term[-1].isdigit()


# --- what changes and what does not


def test_only_intermediate_layers_change(kind: str, make_host: Make, batch: Batch) -> None:
    host, other = make_host(kind), make_host(kind)
    if kind == "d-fine":  # its box heads start from zero: no layer has anything to distil from the last
        torch.nn.init.normal_(host.model.decoder.bbox_embed[-1].layers[-1].weight)
        other.load_state_dict(host.state_dict())
    plain = run(host, batch).loss_dict
    found = run(attach(other, min_positives=3, num_patterns=8), batch).loss_dict
    assert found.keys() - plain.keys() == {"loss_diversity"} and not plain.keys() - found.keys()
    for name, value in plain.items():
        if not is_middle(name, kind):
            assert torch.equal(found[name], value), f"{name} is the host's own"
    changed = {name for name in plain if is_middle(name, kind) and not torch.equal(found[name], plain[name])}
    assert {name.split("_")[1] for name in changed} >= {"bbox", "giou"}
    assert {name[-1] for name in changed} == {"0", "1"}, "both intermediate layers"
    if kind == "d-fine":
        assert {"loss_fgl_aux_0", "loss_ddf_aux_1"} <= changed


def test_intermediate_layers_have_more_positives(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), min_positives=3, num_patterns=8)
    run(model, batch)
    assert len(model.paq.positives_per_box) >= 2
    assert all(3 <= positives <= 4 for positives in model.paq.positives_per_box)


@pytest.mark.parametrize(
    ("settings", "least"),
    [(dict(assigner="fixed_k", top_k=3), 3), (dict(assigner="simota", select="score"), 1), (dict(select="score"), 1)],
)
def test_other_rules(settings: dict[str, Any], least: int, make_host: Make, batch: Batch) -> None:
    model = attach(make_host("rt"), num_patterns=8, **settings)
    run(model, batch).loss.backward()
    assert all(least <= positives <= 4 for positives in model.paq.positives_per_box)


def test_good_predictions_get_more_queries(make_host: Make, batch: Batch) -> None:
    """Without any minimum: truth laid where the model predicts anyway."""
    model = make_host("deformable")
    with torch.no_grad():
        boxes = model(**batch).auxiliary_outputs[0]["pred_boxes"]
    labels = [{"class_labels": torch.tensor([0]), "boxes": boxes[i].mean(0, keepdim=True)} for i in range(2)]
    attach(model, gamma=0.0, num_patterns=8)
    model(**(batch | {"labels": labels}))
    assert min(model.paq.positives_per_box) > 1


def test_switched_off_it_is_the_hosts_loss(kind: str, make_host: Make, batch: Batch) -> None:
    plain = run(make_host(kind), batch)
    model = attach(make_host(kind), min_positives=3, num_patterns=8)
    model.paq.one_to_many = False
    off = run(model, batch)
    never = run(attach(make_host(kind), assigner="none", num_patterns=8), batch)
    for found in (off, never):
        assert all(torch.equal(found.loss_dict[name], plain.loss_dict[name]) for name in plain.loss_dict)
    assert model.paq.positives_per_box == []
    alone = run(attach(make_host(kind), mode="none", assigner="fixed_k"), batch)
    assert alone.loss_dict.keys() == plain.loss_dict.keys() and alone.loss != plain.loss


# --- against pairs and formulas of our own


def test_all_terms_of_a_layer_get_the_same_pairs(
    kind: str, make_host: Make, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-FINE's FGL and DDF too: they are the terms called "local"."""
    seen: dict[int, dict[str, Any]] = defaultdict(dict)
    outputs_of: dict[int, Any] = {}
    for owner in (DFineLoss, RTDetrLoss, ImageLoss):
        if "get_loss" not in owner.__dict__:
            continue

        def spy(self: Any, loss: str, outputs: Any, *args: Any, host: Any = owner.get_loss) -> Any:
            seen[id(outputs)][loss] = args[1]
            outputs_of[id(outputs)] = outputs
            return host(self, loss, outputs, *args)

        monkeypatch.setattr(owner, "get_loss", spy)
    model = attach(make_host(kind), top_k=3, min_positives=3, num_patterns=8)
    run(model, batch)
    assigner = QualityAwareAssigner(top_k=3, min_positives=3, cost_weights=model.paq.cost_weights)
    targets = [Targets(row["class_labels"], row["boxes"]) for row in batch["labels"]]
    terms = {"vfl", "boxes", "local"} if kind == "d-fine" else {"boxes"}
    checked = 0
    for key, pairs in seen.items():
        assert terms <= set(pairs)
        assert all(indices is pairs["boxes"] for indices in pairs.values()), "one list for all terms"
        counts = [len(queries) for queries, _ in pairs["boxes"]]
        if counts[1] != 3:  # one box, hence 1 or 3; 4 in denoising layers
            continue
        outputs = outputs_of[key]
        for (queries, boxes), expected in zip(
            pairs["boxes"], assigner(outputs["logits"], outputs["pred_boxes"], targets), strict=True
        ):
            assert torch.equal(queries, expected.query_indices)
            assert torch.equal(boxes, expected.target_indices)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("classification", ["host", "varifocal"])
@pytest.mark.parametrize("focal", ["deformable", "conditional", "dab"])
def test_terms_equal_the_formulas(focal: str, classification: Any, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(focal), min_positives=2, num_patterns=8, classification=classification)
    output = model(**batch)
    assigner = QualityAwareAssigner(min_positives=2, cost_weights=model.paq.cost_weights)
    targets = [Targets(row["class_labels"], row["boxes"]) for row in batch["labels"]]
    for layer, predicted in enumerate(output.auxiliary_outputs):
        logits, boxes = predicted["logits"], predicted["pred_boxes"]
        goal, l1 = torch.zeros_like(logits), torch.zeros(())
        for image, pairs in enumerate(assigner(logits, boxes, targets)):
            truth = targets[image].boxes[pairs.target_indices]
            mine = boxes[image, pairs.query_indices]
            l1 = l1 + (mine - truth).abs().sum()
            quality = iou(mine, truth) if classification == "varifocal" else torch.ones(len(pairs))
            goal[image, pairs.query_indices, targets[image].labels[pairs.target_indices]] = quality
        loss = varifocal_loss if classification == "varifocal" else focal_loss
        terms = output.loss_dict
        torch.testing.assert_close(terms[f"loss_bbox_{layer}"], l1 / 3)
        torch.testing.assert_close(terms[f"loss_ce_{layer}"], loss(logits, goal).sum() / 3)


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    from torchvision.ops import box_convert, box_iou

    return box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(others, "cxcywh", "xyxy")).diagonal().detach()


def test_the_matching_cost_is_the_hosts_own(make_host: Make) -> None:
    found = attach(make_host("deformable", class_cost=3, bbox_cost=4, giou_cost=5)).paq.cost_weights
    assert (found.classification, found.l1, found.giou, found.alpha, found.gamma) == (3, 4, 5, 0.25, 2)
    found = attach(make_host("rt", matcher_class_cost=3.0, matcher_alpha=0.5, matcher_gamma=1.0)).paq.cost_weights
    assert (found.classification, found.l1, found.giou, found.alpha, found.gamma) == (3, 5, 2, 0.5, 1)


# --- edges


def test_images_without_boxes(kind: str, make_host: Make, batch: Batch) -> None:
    empty = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    model = attach(make_host(kind), num_patterns=8)
    for labels in ([batch["labels"][0], empty], [empty, empty]):
        output = run(model, batch | {"labels": labels})
        output.loss.backward()
        assert output.loss.isfinite()
    assert model.paq.positives_per_box == [], "a batch without boxes has no figure"
    assert all(p.grad is not None for p in model.paq.parameters())


def test_one_decoder_layer_has_no_intermediate_one(make_host: Make, batch: Batch) -> None:
    model = attach(make_host("rt", decoder_layers=1), num_patterns=8)
    plain = run(make_host("rt", decoder_layers=1), batch).loss_dict
    found = run(model, batch).loss_dict
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def scale(x: float, *, factor: float = 2.0) -> float:
    return double(x) * factor


def double(x: float) -> float:
    return 2 * x


def test_a_function_with_another_name_in_it() -> None:
    changed = with_another(scale, "double", lambda original: lambda x: original(x) + 1)
    assert changed(5.0) == 22.0 and changed(5.0, factor=1.0) == 11.0
    assert scale(5.0) == 20.0, "the function itself is as it was"
    with pytest.raises(ConfigError, match="builds no triple"):
        with_another(scale, "triple", lambda original: original)
    with pytest.raises(ConfigError, match=r"loss function .*len"):
        with_another(len, "double", lambda original: original)
