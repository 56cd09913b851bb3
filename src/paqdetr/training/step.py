"""One optimiser step: forward, losses and backward of one or several batches, in one or several processes.

Sum over processes and batches = the one large batch: every loss is divided by the boxes of the whole step, wherever they lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from paqdetr.config import Config
from paqdetr.data.loader import Batch
from paqdetr.distributed import Processes
from paqdetr.errors import NonFiniteError
from paqdetr.losses.criterion import Criterion
from paqdetr.models import Detector
from paqdetr.training.figures import BatchUse, batch_use, grouped, mixture_figures, to_host, watch_gradients

_REMEDY = "lower the learning rate, or train without half precision; nan_policy=skip-step leaves out single steps"


# Each halves the gradient scaler's scale, which begins at 2**16: from there on it is not the scale.
_MOST_OVERFLOWS = 30


@dataclass(slots=True)
class Step:
    """What a step came to.

    Attributes:
        loss: of all processes; NaN if the step was left out.
        values: figures of this process's share.
        batches: how each used its queries.
        terms, mixtures: weighted terms of each batch, and figures of its mixture, scalars where they were computed.
        images: of this process.
        problem: why the step was left out; None if it was not.
        overflowed: whether the gradient scaler left it out and lowers its scale, which is part of half precision and no problem.
    """

    images: int
    loss: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    batches: list[BatchUse] = field(default_factory=list)
    terms: list[Mapping[str, Tensor]] = field(default_factory=list)
    mixtures: list[Mapping[str, Tensor]] = field(default_factory=list)
    problem: str | None = None
    overflowed: bool = False


class TrainingStep:
    """Computes gradients and changes the weights.

    Args:
        model: the detector; `wrapped` is what accelerate made of it.
    """

    def __init__(
        self,
        *,
        config: Config,
        model: Detector,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.model, self.wrapped = config, model, wrapped
        self.optimizer, self.criterion, self.accelerator = optimizer, criterion, accelerator
        self.processes = Processes.of(accelerator)
        self._overflows = 0  # steps in a row

    def __call__(self, batches: Sequence[Batch], *, boxes: float, progress: float) -> Step:
        """Take one step.

        Args:
            batches: of this process.
            boxes: in the batches of all processes.
            progress: share of the training that is done, in [0, 1].

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite, and the settings do not say to leave such steps out.
        """
        self.optimizer.zero_grad()
        # Running statistics of norms take in whatever went through them, and would stay NaN.
        keep = self.config.nan_policy == "skip-step"
        buffers = [(own, own.clone()) for own in self.model.buffers()] if keep else []
        step = self.gradients(batches, boxes=boxes, progress=progress)
        if step.problem is None:
            clipped = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
            norm = self._settle(step, cast(Tensor, clipped))
            self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
            if math.isfinite(norm):
                step.values["grad_norm"] = norm
            elif self.accelerator.scaler is not None and self._overflows < _MOST_OVERFLOWS:
                # Not `optimizer_step_was_skipped`: a fused optimiser leaves out the step inside of its kernel, where accelerate
                # cannot see it.
                step.overflowed = True
            else:
                # The gradient is of the images of all processes, and the main one's error is told.
                images = [image for own in self.processes.gather(_ids(batches)) or [] for image in own]
                self._give_up(step, NonFiniteError(f"the gradient's norm became {norm} on images {images}", _REMEDY))
        if step.problem is not None:
            self.optimizer.zero_grad()
            with torch.no_grad():
                for own, before in buffers:
                    own.copy_(before)
            return step
        self.optimizer.step()
        return step

    def gradients(self, batches: Sequence[Batch], *, boxes: float, progress: float) -> Step:
        """Add the gradients of a step to the parameters; the same on every process."""
        step = Step(images=sum(len(batch.targets) for batch in batches))
        for number, batch in enumerate(batches, start=1):
            # Gradients meet once a step, in the last backward pass.
            together = number == len(batches)
            with nullcontext() if together else self.accelerator.no_sync(self.wrapped):
                total, error = self._forward(
                    batch, step, boxes=max(boxes, 1.0), progress=progress, batches=len(batches)
                )
                loss, wrong = self.processes.sum([float(total.detach()), float(error is not None)])
                if wrong:
                    self._give_up(step, error)
                    break
                step.loss += loss
                # Data parallelism takes the mean over processes; the sum is meant.
                self.accelerator.backward(total * self.processes.count if self.processes.count > 1 else total)
        return step

    def _forward(
        self, batch: Batch, step: Step, *, boxes: float, progress: float, batches: int
    ) -> tuple[Tensor, NonFiniteError | None]:
        """The batch's share of the step's loss, or what is wrong with it."""
        images = batch.images
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            output = self.wrapped(images, batch.padding_mask, batch.targets)
        shares = batches * self.processes.count
        aux_losses = self.model.aux_losses()
        try:
            report = self.criterion(
                output, batch.targets, aux_losses=aux_losses, progress=progress, num_boxes=boxes, share=1 / shares
            )
        except NonFiniteError as error:
            return torch.zeros(()), error
        total = float(report.total.detach())
        if not math.isfinite(total):
            error = NonFiniteError(f"the loss became {total} on images {_ids([batch])}", _REMEDY)
            return torch.zeros(()), error
        step.values["loss"] = step.values.get("loss", 0.0) + total
        step.terms.append(report.terms)
        step.mixtures.append(mixture_figures(output, aux_losses.get("diversity")))
        use = batch_use(output, report.pairs, [len(t) for t in batch.targets])
        scaler = self.accelerator.scaler
        # get_scale() would be a GPU sync.
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=images.device))
        watch_gradients(output.mixture.content, use.gradients, scale=scale)
        step.batches.append(use)
        return report.total, None

    def _settle(self, step: Step, norm: Tensor) -> float:
        """Bring what the step's batches say to the host, in one transfer after all of its work; the gradient's norm."""
        waiting = [norm]
        for terms, mixture, use in zip(step.terms, step.mixtures, step.batches, strict=True):
            waiting += [*terms.values(), *mixture.values(), use.mass, use.gradients]
        first, *rest = to_host(waiting)
        arrived = iter(rest)
        for terms, mixture, use in zip(step.terms, step.mixtures, step.batches, strict=True):
            figures = grouped({name: float(next(arrived)) for name in terms})
            figures |= {name: float(next(arrived)) / len(step.batches) for name in mixture}
            use.mass, use.gradients = next(arrived), next(arrived)
            for name, value in figures.items():
                step.values[name] = step.values.get(name, 0.0) + value
        return float(first)

    def _give_up(self, step: Step, error: NonFiniteError | None) -> None:
        """All processes leave out the step for what went wrong in one of them, or end."""
        if self.config.nan_policy == "raise":
            self.processes.raise_together(error)
        reasons = self.processes.gather(None if error is None else error.message)
        reasons = self.processes.broadcast(reasons)
        step.problem = next(reason for reason in reasons if reason is not None)
        step.loss = math.nan


def _ids(batches: Sequence[Batch]) -> list[int | str | None]:
    return [target.image_id for batch in batches for target in batch.targets]
