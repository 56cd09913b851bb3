"""Deformable DETR with ResNet-50 against the one in transformers: same weights, same images, inference and training step.

python benchmarks/whole_model.py --json docs/results/performance/whole_model.json
make docs

transformers runs as it comes: its attention is grid_sample on a CPU. Its random weights go through `paqdetr convert`, and both
models have to give the same boxes before anything is timed. Calls take turns in one process.

`limit` is Amdahl's: how many times faster transformers would be if its attention took no time at all and nothing else changed.
Ours may pass it, since more than the attention differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
import transformers
from common import compare, interleave, provenance
from torch import Tensor, nn

from paqdetr.convert import convert_checkpoint
from paqdetr.losses import build_criterion
from paqdetr.models import Detector
from paqdetr.structures import Targets
from paqdetr.training.bench import saved_bytes

FORMS = {
    "one_stage": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
BOXES = 10


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=list(FORMS), default="one_stage")
    parser.add_argument("--image", type=int, nargs=2, default=(640, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2, help="of the training step; inference takes one image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Inference and training step of both, with what their attention takes and what they keep for backward."""
    report = provenance(
        threads=arguments.threads, seed=arguments.seed, packages=("paqdetr", "torch", "transformers", "timm", "numba")
    )
    torch.manual_seed(arguments.seed)
    theirs, ours = twins(arguments.form)
    one = torch.randn(1, 3, *arguments.image)
    difference = largest_difference(theirs, ours, one)

    def infer(model: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return model(one)

        return call

    theirs.eval(), ours.eval()
    inference = interleave({"transformers": infer(theirs), "paqdetr": infer(ours)}, rounds=arguments.rounds)
    share = attention_share(theirs, infer(theirs), inference["transformers"])

    images = torch.randn(arguments.batch, 3, *arguments.image)
    targets = [made_targets() for _ in range(arguments.batch)]
    steps = {
        "transformers": training_step(theirs.train(), lambda: their_loss(theirs, images, targets)),
        "paqdetr": training_step(ours.train(), our_loss(ours, images, targets)),
    }
    training = interleave(steps, rounds=arguments.rounds)
    report |= {
        "form": arguments.form,
        "image": list(arguments.image),
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "largest_difference_of_outputs": difference,
        "inference": compare(inference, against="transformers"),
        "attention_share_of_transformers_inference": round(share, 3),
        "limit": round(1 / (1 - share), 2),
        "training_step": compare(training, against="transformers"),
        "saved_bytes": {
            "transformers": saved_bytes(lambda: their_loss(theirs, images, targets)),
            "paqdetr": saved_bytes(our_loss(ours, images, targets)),
        },
    }
    return report


def twins(form: str) -> tuple[nn.Module, Detector]:
    """Their model with random weights, and ours with the same."""
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="resnet50", features_only=True, use_pretrained_backbone=False, out_indices=[2, 3, 4]
        ),
        num_labels=80,
        dropout=0.0,
        auxiliary_loss=True,
        class_cost=2,
        **FORMS[form],
    )
    theirs = transformers.DeformableDetrForObjectDetection(config)
    with torch.no_grad():  # a norm that starts at zero would leave half of the backbone without effect
        for name, buffer in theirs.named_buffers():
            if "backbone" in name and name.endswith("weight"):
                buffer.fill_(0.5)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, _ = convert_checkpoint(folder, origin="transformers")
    return theirs, ours


@torch.no_grad()
def largest_difference(theirs: nn.Module, ours: Detector, images: Tensor) -> float:
    """Between the boxes and logits of both.

    Raises:
        SystemExit: they differ by more than rounding, so that a comparison of times would mean nothing.
    """
    expected, found = theirs.eval()(images), ours.eval()(images)
    difference = max(
        float((found.pred_boxes - expected.pred_boxes).abs().max()),
        float((found.pred_logits - expected.logits).abs().max()),
    )
    if difference > 1e-3:
        raise SystemExit(f"the models differ by {difference}: nothing is timed")
    return difference


def made_targets() -> Targets:
    """Boxes of one image."""
    boxes = torch.cat([0.3 + 0.4 * torch.rand(BOXES, 2), 0.1 + 0.2 * torch.rand(BOXES, 2)], dim=1)
    return Targets(torch.randint(80, (BOXES,)), boxes)


def their_loss(model: nn.Module, images: Tensor, targets: list[Targets]) -> Tensor:
    """Forward pass and loss of transformers."""
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    return model(images, labels=labels).loss


def our_loss(model: Detector, images: Tensor, targets: list[Targets]) -> Callable[[], Tensor]:
    """Forward pass and loss of ours."""
    from paqdetr.config import LossConfig

    criterion = build_criterion(LossConfig())
    return lambda: criterion(model(images, None, targets), targets).total


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, loss, backward and AdamW over all that trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def attention_share(model: nn.Module, call: Callable[[], object], seconds: list[float]) -> float:
    """Share of a call that the sampling of deformable attention takes, without its linear layers."""
    spent: list[float] = []
    started: list[float] = []
    handles = []
    for part in model.modules():
        if type(part).__name__ == "MultiScaleDeformableAttention":
            handles.append(part.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())))
            handles.append(part.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started.pop())))
    if not handles:
        raise SystemExit("transformers has no module MultiScaleDeformableAttention any more")
    shares = []
    for _ in range(max(len(seconds) // 2, 3)):
        spent.clear()
        begun = time.perf_counter()
        call()
        shares.append(sum(spent) / (time.perf_counter() - begun))
    for handle in handles:
        handle.remove()
    return statistics.median(shares)


if __name__ == "__main__":
    main()
