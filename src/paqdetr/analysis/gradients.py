"""How much each content query learns from a data set: the fourth view of the use of queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from paqdetr.data.dataset import DetectionDataset
from paqdetr.errors import DataError
from paqdetr.evaluation.evaluate import require_same_classes
from paqdetr.losses.criterion import Criterion
from paqdetr.metrics import Spread
from paqdetr.models.detector import Detector
from paqdetr.preprocessing import pad_images


def content_gradients(
    model: Detector,
    split: DetectionDataset,
    *,
    criterion: Criterion,
    images: int | None = None,
    train_progress: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Spread:
    """Norm of the training loss's gradient at each content query, summed over images.

    Every image passes alone, as an evaluation sees it, without augmentation, and its loss is not divided by its number of boxes:
    an image counts by what there is to learn in it, whatever it stands beside. Denoising queries, whose loss reaches the content
    queries they look at, take part. The model is left as it was: no weight, no running statistic, no gradient changes.

    Args:
        model: a detector; the classes of the split must be among its own.
        split: usually "train".
        criterion: the loss the model was trained with: `build_criterion` of `paqdetr.analysis.inside.loss_settings`.
        images: evenly spaced over the split; all if None.
        train_progress: share of the training at which the loss is taken, in [0, 1]; None: where one-to-many assignment begins, if
            it ever does.
        seed: of the denoising noise.
        progress: told (images done, images in all).

    Returns:
        A `Spread` of amounts: `counts` are the (n,) sums.

    Raises:
        DataError: an image cannot be read, or the split has a class that the model has not.
        NonFiniteError: a prediction is NaN or infinite.
    """
    require_same_classes(model.classes, split)
    count = len(split) if images is None else min(images, len(split))
    if train_progress is None:
        train_progress = criterion.config.one_to_many_from
    if count < 1:
        raise DataError(
            f"{split.annotation_file}: no image to take gradients of", "take another split, or images=1 or more"
        )
    chosen = [place * len(split) // count for place in range(count)]
    device = next(model.parameters()).device
    total = torch.zeros(model.config.num_queries, dtype=torch.float64)
    modes = {module: module.training for module in model.modules()}
    ranked = False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.train()
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
            for done, index in enumerate(chosen, start=1):
                pixels = model.preprocessing(split.checked_image(index))
                pixels, mask = pad_images([pixels], model.preprocessing.pad_divisor)
                target = split.targets(index, classes=model.classes).to(device)
                with torch.no_grad():  # the way from the loss to the content does not pass the backbone
                    features = model.extract(pixels.to(device), None if mask is None else mask.to(device))
                with torch.enable_grad():
                    output = model.detect(features, [target])
                    report = criterion(output, [target], progress=train_progress, num_boxes=1.0)
                    (gradient,) = torch.autograd.grad(report.total, output.mixture.content)  # (1, n, d)
                total += gradient[0].float().norm(dim=-1).cpu()
                ranked = output.proposals is not None
                if progress is not None:
                    progress(done, count)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Spread(counts=total.numpy(), images=count, ranked=ranked, discrete=False)
