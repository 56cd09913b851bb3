"""Train a small RT-DETR of transformers on digits, as it is and with PaQ attached, and compare their AP.

paqdetr data make digits --output data/digits-small --train 1400 --val 100 --test 400
python benchmarks/plugin_digits.py --data data/digits-small --steps 700 --json plugin.json

All variants see the same images in the same order, start from the same weights of the host and the same ImageNet weights of
EfficientNet-Lite0, and are evaluated on the test split with the moving average of their weights. `residual` adds the mixture
through a gate that starts at zero, `replace` puts it in the place of the encoder's tokens; both use quality-aware assignment in
layers 1 and 2 for the first third of the training. `patterns` and `assignment` are the residual form's two halves.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
import transformers
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import paqdetr
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.data.loader import Batch, training_loader
from paqdetr.evaluation.evaluate import evaluate_split
from paqdetr.integrations.transformers import attach
from paqdetr.models.backbone import load_imagenet_weights, normalization_of
from paqdetr.preprocessing import Preprocessing
from paqdetr.training.optim import MovingAverage, build_optimizer, build_schedule

BACKBONE = "tf_efficientnet_lite0"
VARIANTS: dict[str, dict[str, Any] | None] = {
    "host": None,
    "residual": {"mode": "residual"},
    "replace": {"mode": "replace", "pattern_std": 0.02},
    "patterns": {"mode": "residual", "assigner": "none"},
    "assignment": {"mode": "none"},
}
ONE_TO_MANY_UNTIL = 0.35
_OF_PAQ = (("positives_per_box", 2), ("mean_gate", 4))  # and their decimals


class AsDetector(nn.Module):
    """A detector of transformers behind the face that `evaluate_split` wants."""

    def __init__(self, model: Any, classes: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.classes, self.preprocessing = model, classes, preprocessing

    def forward(self, images: Tensor, padding_mask: Tensor | None) -> Any:
        """Logits and boxes by the names of ours."""
        found = self.model(pixel_values=images)
        return SimpleNamespace(pred_logits=found.logits, pred_boxes=found.pred_boxes)


def main() -> None:
    """Parse, train each variant, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--variants", nargs="+", default=["host", "residual"], choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    report: dict[str, Any] = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "variants": {},
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "seed": arguments.seed,
        "one_to_many_until": ONE_TO_MANY_UNTIL,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "paqdetr": paqdetr.__version__,
    }
    for name in arguments.variants:
        report["variants"][name] = train(name, arguments)
        if arguments.json:  # after each, so that a run that is cut short keeps what it has
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


def build(num_classes: int) -> Any:
    """RT-DETR at the size of our nano models."""
    backbone = TimmBackboneConfig(backbone=BACKBONE, out_indices=(2, 3, 4), use_pretrained_backbone=False)
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[40, 112, 320],
        encoder_hidden_dim=96,
        encoder_ffn_dim=256,
        d_model=96,
        decoder_in_channels=[96] * 3,
        decoder_ffn_dim=256,
        decoder_layers=3,
        num_queries=60,
        num_denoising=50,
        num_labels=num_classes,
        # Its own frozen norm takes the place of timm's, and with it of the activation that timm's norm ends with.
        freeze_backbone_batch_norms=False,
    )
    model = RTDetrForObjectDetection(config)
    body = model.model.backbone.model._backbone
    load_imagenet_weights(body, BACKBONE)
    for name, parameter in body.named_parameters():  # stem and the stages to stride 4, as in our nano models
        parameter.requires_grad_(not name.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1")))
    for norm in norms_of(model):
        norm.requires_grad_(False)
    return model


def norms_of(model: Any) -> list[nn.Module]:
    """The batch norms of the backbone, which are frozen, as in our nano models."""
    return [x for x in model.model.backbone.modules() if isinstance(x, nn.BatchNorm2d)]


def train(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one variant on the test split."""
    split = open_split(arguments.data, "train")
    config = load_config(
        "digits_quickstart",
        {
            "image_size": arguments.image_size,
            "augment.scale": [1.0, 1.0],
            "batch_size": arguments.batch_size,
            "lr": 5e-4,
            "seed": arguments.seed,
            "workers": 0,
        },
    )
    preprocessing = Preprocessing(config.image_size, config.size_divisor, normalization_of(BACKBONE))
    torch.manual_seed(arguments.seed)
    model = build(len(split.classes))
    settings = VARIANTS[variant]
    if settings is not None:
        attach(model, num_patterns=64, **settings)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, arguments.steps)
    average = MovingAverage(model, config.ema_decay)
    loader, sampler = training_loader(config, split, preprocessing)

    torch.manual_seed(arguments.seed)  # the noise of denoising
    step, started, positives = 0, time.perf_counter(), []
    model.train()
    for norm in norms_of(model):
        norm.eval()  # keeps the statistics of ImageNet
    while step < arguments.steps:
        for batch in loader:
            if settings is not None and settings.get("assigner") != "none":
                model.paq.one_to_many = step < ONE_TO_MANY_UNTIL * arguments.steps
            loss = model(**inputs_of(batch)).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
            average.update(model)
            if settings is not None and model.paq.positives_per_box:
                positives.append(sum(model.paq.positives_per_box) / len(model.paq.positives_per_box))
            step += 1
            if step % 50 == 0:
                rate = step / (time.perf_counter() - started)
                print(
                    f"{variant}: step {step} of {arguments.steps}, loss {float(loss.detach()):.2f}, {rate:.2f} steps/s",
                    flush=True,
                )
            if step == arguments.steps:
                break
        sampler.epoch += 1
    seconds = time.perf_counter() - started
    test = open_split(arguments.data, "test")
    found = evaluate_split(cast(Any, AsDetector(average.model, split.classes, preprocessing)), test, batch_size=8)
    figures = found.to_json()
    keys = ("AP", "AP50", "AP75", "AP_nms", "predictions_per_image", "boxes_per_image")
    row = {name: figures[name] for name in keys}
    row |= {"training_seconds": round(seconds, 1), "parameters": sum(p.numel() for p in model.parameters())}
    if positives:
        row["positives_per_box"] = round(sum(positives) / len(positives), 3)
    if settings is not None and model.paq.gate is not None:
        row["mean_gate"] = round(float(model.paq.gate.detach().abs().mean()), 4)
    print(f"{variant}: {row}", flush=True)
    return row


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/plugin.md."""
    lines = ["| RT-DETR | test AP | AP50 | AP after NMS | positives per box | mean gate |", "|---|---|---|---|---|---|"]
    for name, row in report["variants"].items():
        of_paq = [f"{row[key]:.{digits}f}" if key in row else "-" for key, digits in _OF_PAQ]
        figures = [f"{row[key]:.3f}" for key in ("AP", "AP50", "AP_nms")]
        lines.append("| " + " | ".join([name, *figures, *of_paq]) + " |")
    return "\n".join(lines)


def inputs_of(batch: Batch) -> dict[str, Any]:
    """Our batch by the names of transformers."""
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in batch.targets]
    return {"pixel_values": batch.images, "labels": labels}


if __name__ == "__main__":
    main()
