"""The comparison at equal CPU minutes, with every detector for a few steps on a few images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from paqdetr.data.loader import Batch
from paqdetr.structures import ClassTable, Targets

pytestmark = pytest.mark.integration

DOCS = Path(__file__).resolve().parents[1] / "docs"
SETTINGS = {"image_size": 96, "model.num_queries": 20, "augment.scale": [0.7, 1.0], "batch_size": 2}


@pytest.fixture(scope="module")
def peers(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmarks/peers.py")


def names() -> list[str]:
    return ["paq_dino_nano", "transformers_deformable_detr", "fcos", "retinanet", "faster_rcnn"]


@pytest.mark.parametrize("name", ["paq_dino_nano", "transformers_deformable_detr", "fcos", "faster_rcnn"])
def test_a_training_of_seconds(peers: ModuleType, name: str, tiny_digits: Path, tmp_path: Path) -> None:
    result = peers.compare(
        name,
        data=tiny_digits,
        settings=SETTINGS,
        minutes=0.004,
        evaluations=1,
        rates=[1e-3] if name == "fcos" else [],
        sweep_minutes=0.001,
        seed=0,
    )
    assert result["steps"] >= 1 and result["curve"][-1]["cpu_minutes"] >= 0.004
    assert set(result["test"]) == {"AP", "AP50", "AP_nms"}
    assert result["learning_rate"] == peers.RATES[name]
    assert (result["sweep"] is not None) == (name == "fcos")
    peers.write(tmp_path / f"{name}.json", result)
    (kept,) = peers.collect(tmp_path)
    assert kept == json.loads(json.dumps(result))
    assert f"| {name} | {kept['test']['AP']:.3f} |" in peers.table([kept])
    peers.draw([kept], tmp_path / "peers.svg")
    assert "<svg" in (tmp_path / "peers.svg").read_text(encoding="utf-8")


def test_a_result_of_another_budget_is_not_put_beside(peers: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "fcos.json"
    peers.write(file, {"data": "digits", "cpu_minutes": 20.0, "overrides": {}, "seed": 0})
    peers.require_same(file, {"data": "digits", "cpu_minutes": 20.0, "overrides": {}, "seed": 0})
    with pytest.raises(SystemExit, match=r"fcos\.json: was made with cpu_minutes=20\.0, not 10\.0"):
        peers.require_same(file, {"data": "digits", "cpu_minutes": 10.0})


@pytest.mark.parametrize("name", names())
def test_all_start_from_the_same_backbone_and_see_the_same_boxes(peers: ModuleType, name: str) -> None:
    models = sys.modules["peer_models"]
    classes = ClassTable((3, 7), ("a", "b"))
    peer = models.build_peer(name, classes=classes, image_size=96, settings={"model.num_queries": 20})
    reference = models._backbone()
    assert any(part is peer.body for part in peer.model.modules())
    found = dict(peer.body.named_parameters())
    for key, parameter in reference.named_parameters():
        assert torch.equal(parameter, found[key]) and parameter.requires_grad == found[key].requires_grad
    # Without boxes the losses of all are finite too, and every trained parameter is reached over both batches.
    mask = torch.zeros(2, 96, 96, dtype=torch.bool)
    mask[0, 64:] = True
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6]])
    some = [Targets(torch.tensor([1]), boxes), Targets(torch.zeros(0).long(), torch.zeros(0, 4))]
    none = [some[1], some[1]]
    peer.model.train()
    for targets in (some, none):
        loss = peer.loss(Batch(torch.randn(2, 3, 96, 96), mask, targets), 0.0)
        assert loss.isfinite()
        loss.backward()
    missing = [k for k, p in peer.model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert models._valid_size(Batch(torch.zeros(2, 3, 96, 96), mask, some), 0) == (64, 96)


def test_what_torchvision_found_is_given_in_the_originals_pixels(peers: ModuleType) -> None:
    models = sys.modules["peer_models"]
    row = {
        "boxes": torch.tensor([[10.0, 10.0, 20.0, 30.0], [0.0, 0.0, 96.0, 70.0]]),
        "scores": torch.tensor([0.2, 0.9]),
        "labels": torch.tensor([1, 2]),
    }
    found = models._detections(row, torch.zeros(3, 64, 96), (128, 288), ClassTable((3, 7), ("a", "b")), first=1)
    assert found.scores.tolist() == pytest.approx([0.9, 0.2]) and found.labels.tolist() == [7, 3]
    assert found.boxes.tolist() == [[0, 0, 288, 128], [30, 20, 60, 60]]


def test_the_kept_results_are_of_one_budget_and_their_plot_is_on_the_page(peers: ModuleType) -> None:
    page = (DOCS / "study.md").read_text(encoding="utf-8")
    folders = list((DOCS / "results").glob("peers_*"))
    for folder in folders:
        results = peers.collect(folder)
        assert len(results) >= 3 and {row["cpu_minutes"] for row in results} == {results[0]["cpu_minutes"]}
        assert f"results/{folder.name}/peers.svg" in page and (folder / "peers.svg").is_file()
    assert len(folders) == 2
