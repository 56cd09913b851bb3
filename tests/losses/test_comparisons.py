"""The rows an ablation needs are one setting away: other sources of content, other assigners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paqdetr.config import LossConfig
from paqdetr.losses import build_criterion
from paqdetr.models import create_model
from paqdetr.structures import Targets


@pytest.mark.parametrize(
    ("queries", "loss"),
    [
        ("static", dict(assigner="fixed_k", top_k=3)),
        ("static_mixture", dict(assigner="simota")),
        ("patterns", dict(assigner="simota", select="score", classification="varifocal")),
        ("patterns", dict(assigner="quality_aware", encoder_assigner="fixed_k")),
    ],
)
def test_every_parameter_learns(queries: str, loss: dict[str, Any]) -> None:
    small = {"backbone": "test_resnet", "num_queries": 20, "dim": 32, "ffn_dim": 64}
    model = create_model("dino_nano", num_classes=3, queries=queries, **small)
    targets = [
        Targets(torch.tensor([0, 2]), torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.4]])),
        Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)),
    ]
    model.train()
    output = model(torch.randn(2, 3, 96, 96), None, targets)
    report = build_criterion(LossConfig(**loss))(output, targets, aux_losses=model.query_source.aux_losses())
    report.total.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    *middle, last = report.positives_per_box
    assert last == 1 and all(1 <= positives <= 5 for positives in middle)
    if loss["assigner"] == "fixed_k":
        assert middle == [3.0] * len(middle)
