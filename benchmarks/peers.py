"""AP against CPU minutes: our nano models beside detectors of torchvision and transformers, on the same backbone and images.

paqdetr data make digits --output data/digits --train 1400 --val 100 --test 400
python benchmarks/peers.py --data data/digits --output runs/peers --minutes 20 -- image_size=256 model.num_queries=60 \
    augment.flip=0 augment.crop=0 'augment.scale=[0.75,1.0]'

Everything is the same for all but the detector: ImageNet weights of EfficientNet-Lite0 with its first stages frozen, our loader,
batches and augmentation, input size, AdamW with weight decay 1e-4, a warm-up of 50 steps and a cosine over the budget, and a
moving average of the weights, which our evaluator takes. The budget is the process's CPU time (all cores together) of loading
and training steps; evaluations are left out. After each of `--evaluations` equal parts of it AP is taken on the validation split,
at the end on the test split too.

The learning rate is the only thing that is chosen: `--sweep 3e-4 1e-3 3e-3` trains each detector for `--sweep-minutes` at each
rate, with a schedule of its own, and takes the one of best AP on the validation split; without it the rates are those of `RATES`.
The backbone's is a quarter of it, as in our recipes.

transformers' Deformable DETR is the one-stage form with box refinement, since its loss leaves the proposals of the two-stage form
untrained; `deformable_detr_refine_nano` is ours of that form.

Each detector's result is written to OUTPUT/NAME.json as soon as it is there; what lies there already is kept. `peers.json` and
`peers.svg` are made of all files in the folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

# The budget is CPU time, and threads that look out for work use it up: as few looks as `import paqdetr` sets.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from common import provenance
from peer_models import BACKBONE, PEERS, Peer, build_peer, preprocessing_of

from paqdetr.config import Config, load_config, parse_overrides
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.loader import training_loader
from paqdetr.errors import UserError
from paqdetr.metrics.coco import evaluate_detections
from paqdetr.training.optim import MovingAverage

# AdamW, for the parts after the backbone. Ours are those of the nano recipe; the others are not tuned: `--sweep` is for that.
RATES = dict.fromkeys(PEERS, 1e-3)
RATES["transformers_deformable_detr"] = 5e-4
_BACKBONE_SHARE, _WARMUP_STEPS = 0.25, 50


def main() -> None:
    """Parse, train each detector that has no result yet, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of images and of our models")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU minutes of training for each")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--sweep", nargs="+", type=float, default=[], metavar="LR")
    parser.add_argument("--sweep-minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        settings = parse_overrides(arguments.settings)
        asked = {
            "data": arguments.data.name,
            "cpu_minutes": arguments.minutes,
            "overrides": settings,
            "seed": arguments.seed,
        }
        for name in arguments.peers:
            file = arguments.output / f"{name}.json"
            if file.is_file():
                require_same(file, asked)
                print(f"{name}: {file} is there and is kept", flush=True)
                continue
            result = compare(
                name,
                data=arguments.data,
                settings=settings,
                minutes=arguments.minutes,
                evaluations=arguments.evaluations,
                rates=arguments.sweep,
                sweep_minutes=arguments.sweep_minutes,
                seed=arguments.seed,
            )
            result["provenance"] = provenance(
                threads=arguments.threads,
                seed=arguments.seed,
                packages=("paqdetr", "torch", "torchvision", "transformers", "timm"),
            )
            # Where folders lie on this machine is nobody's business.
            for folder in (arguments.data, arguments.output):
                command = result["provenance"]["command"]
                result["provenance"]["command"] = command.replace(str(folder), folder.name)
            write(file, result)
            gc.collect()
    except UserError as error:
        raise SystemExit(str(error)) from None
    results = collect(arguments.output)
    write(arguments.output / "peers.json", {"peers": results})
    draw(results, arguments.output / "peers.svg")
    print(table(results))


def compare(
    name: str,
    *,
    data: Path,
    settings: dict[str, Any],
    minutes: float,
    evaluations: int,
    rates: list[float],
    sweep_minutes: float,
    seed: int,
) -> dict[str, Any]:
    """One detector: the sweep over learning rates if there is one, the training, its curve and its figures on the test split."""
    rate, swept = RATES[name], {}
    for candidate in rates:
        curve, _ = train(name, data, settings, minutes=sweep_minutes, evaluations=1, rate=candidate, seed=seed)
        swept[f"{candidate:g}"] = curve[-1]["AP"]
    if swept:
        rate = float(max(swept, key=lambda key: swept[key]))
    curve, last = train(name, data, settings, minutes=minutes, evaluations=evaluations, rate=rate, seed=seed)
    return {
        "name": name,
        "data": data.name,
        "cpu_minutes": minutes,
        "learning_rate": rate,
        "sweep": {"cpu_minutes": sweep_minutes, "AP": swept} if swept else None,
        "backbone": BACKBONE,
        "overrides": settings,
        "curve": curve,
        **last,
    }


def train(
    name: str, data: Path, settings: dict[str, Any], *, minutes: float, evaluations: int, rate: float, seed: int
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train for so many CPU minutes.

    Returns:
        figures on the validation split after equal parts of the budget; and what else is to be known.
    """
    split, val = open_split(data, "train"), open_split(data, "val")
    recipe = _recipe(settings, seed)
    torch.manual_seed(seed)
    image_size = recipe.image_size if isinstance(recipe.image_size, int) else recipe.image_size[1]
    peer = build_peer(name, classes=split.classes, image_size=image_size, settings=settings)
    if recipe.channels_last:
        peer.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = MovingAverage(peer.model, recipe.ema_decay)
    optimizer = torch.optim.AdamW(_groups(peer, recipe, rate), lr=rate, fused=True)
    starts = [group["lr"] for group in optimizer.param_groups]
    loader, sampler = training_loader(recipe, split, preprocessing_of(image_size))

    budget, used, steps = 60 * minutes, 0.0, 0
    goals = [budget * (i + 1) / evaluations for i in range(evaluations)]
    curve: list[dict[str, float]] = []
    torch.manual_seed(seed)  # the noise of denoising
    while goals:
        batches = iter(loader)
        while goals:
            started = time.process_time()
            batch = next(batches, None)
            if batch is None:
                break
            share = min(used / budget, 1.0)
            factor = min((steps + 1) / (_WARMUP_STEPS + 1), 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
            for group, start in zip(optimizer.param_groups, starts, strict=True):
                group["lr"] = start * factor
            peer.model.train()
            if recipe.channels_last:
                batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
            loss = peer.loss(batch, share)
            if not math.isfinite(float(loss.detach())):
                raise SystemExit(f"{name}: the loss became {float(loss.detach())} in step {steps + 1}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.model.parameters(), peer.clip_norm)
            optimizer.step()
            average.update(peer.model)
            steps += 1
            used += time.process_time() - started
            if used >= goals[0]:
                while goals and used >= goals[0]:
                    goals.pop(0)
                figures = evaluate(peer, average.model, val, image_size)
                curve.append({"cpu_minutes": round(used / 60, 3), "step": steps, **figures})
                print(f"{name}: {curve[-1]}", flush=True)
        sampler.epoch += 1
    test = open_split(data, "test")
    return curve, {
        "test": evaluate(peer, average.model, test, image_size),
        "steps": steps,
        "cpu_seconds_per_step": round(used / steps, 4),
        "batch_size": recipe.batch_size,
        "image_size": image_size,
        "seed": seed,
        "parameters": sum(p.numel() for p in peer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in peer.model.parameters() if p.requires_grad),
        "settings": peer.settings,
    }


def _recipe(settings: dict[str, Any], seed: int) -> Config:
    """What concerns all: images, batches, averaging."""
    return load_config("dino_nano", {**settings, "seed": seed, "workers": 0})


def _groups(peer: Peer, recipe: Config, rate: float) -> list[dict[str, Any]]:
    """Trained parameters, the backbone's at a quarter of the rate; norms and biases do not decay."""
    inside = {id(parameter) for parameter in peer.body.parameters()}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in peer.model.parameters():
        if parameter.requires_grad:
            own = rate * _BACKBONE_SHARE if id(parameter) in inside else rate
            groups[own, 0.0 if parameter.ndim == 1 else recipe.weight_decay].append(parameter)
    return [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


@torch.inference_mode()
def evaluate(
    peer: Peer, model: torch.nn.Module, split: DetectionDataset, image_size: int, batch_size: int = 8
) -> dict[str, float]:
    """AP, AP50 and AP after suppression at IoU 0.7 of a model on a split."""
    preprocess = preprocessing_of(image_size)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (height, width) in enumerate(split.sizes.tolist()):
        buckets[preprocess.target_size(height, width)].append(index)
    model.eval()
    raw: list[dict[str, Any]] = []
    cleaned: list[dict[str, Any]] = []
    for size, members in buckets.items():
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            pictures = [split.checked_image(index) for index in chosen]
            images = [preprocess(picture, size) for picture in pictures]
            found = peer.detect(model, images, [(picture.height, picture.width) for picture in pictures])
            for index, detections in zip(chosen, found, strict=True):
                detections.image_id = split.image_ids[index]
                raw += detections.to_coco()
                cleaned += detections.without_duplicates().to_coco()
    truth = split.ground_truth()
    figures, after = evaluate_detections(truth, raw).to_json(), evaluate_detections(truth, cleaned).to_json()
    return {"AP": figures["AP"], "AP50": figures["AP50"], "AP_nms": after["AP"]}


def require_same(file: Path, asked: dict[str, Any]) -> None:
    """End if a result that is there was made with another budget, other images or settings: one table holds equals alone."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    for key, value in asked.items():
        if kept[key] != value:
            raise SystemExit(f"{file}: was made with {key}={kept[key]!r}, not {value!r}: choose another --output")


def collect(folder: Path) -> list[dict[str, Any]]:
    """Results of all detectors in a folder, in the order of `PEERS`."""
    files = [folder / f"{name}.json" for name in PEERS]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, best first."""
    head = "| detector | test AP | AP50 | AP after NMS | steps | CPU s per step | lr | million parameters |"
    rows = [
        f"| {row['name']} | {row['test']['AP']:.3f} | {row['test']['AP50']:.3f} | {row['test']['AP_nms']:.3f} | {row['steps']} "
        f"| {row['cpu_seconds_per_step']:.3f} | {row['learning_rate']:g} | {row['parameters'] / 1e6:.1f} |"
        for row in sorted(results, key=lambda row: -row["test"]["AP"])
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """AP on the validation split against CPU minutes, a line for each detector."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, row in enumerate(results):
        minutes = [0.0, *(point["cpu_minutes"] for point in row["curve"])]
        line = {"marker": "os^Dv<>"[number % 7], "markersize": 4, "linewidth": 1.8}
        axes.plot(minutes, [0.0, *(point["AP"] for point in row["curve"])], label=row["name"], **line)
    axes.set_xlabel("CPU minutes of training, all cores together")
    axes.set_ylabel("AP on the validation split")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def write(file: Path, content: dict[str, Any]) -> None:
    """Json that appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    main()
