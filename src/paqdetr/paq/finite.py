"""What a training does about NaN and infinite predictions: end, or leave the step out.

No such prediction ever reaches a solver: `matchables` raises `NonFiniteError`, which names layers and image ids. This is the
other half, the decision, for the one place of a training loop of your own that may catch it. `paqdetr.train` decides in its own
loop (`nan_policy`): there the steps left out in a row belong to the state that a resumption goes on from.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, distributed

from paqdetr.errors import NonFiniteError

_logger = logging.getLogger(__name__)


class NonFinitePolicy:
    """Decides after each step's matching and loss, before its backward pass, whether the step counts.

    ```python
    policy = NonFinitePolicy("skip-step")
    for images, targets in batches:
        loss, error = None, None
        try:
            loss = criterion(model(images), targets)
        except NonFiniteError as found:
            error = found
        if policy.skips(error):
            continue
        loss.backward()
    ```

    Args:
        action: "raise" ends the training with the error; "skip-step" leaves the step out and logs a warning.
        patience: so many steps in a row may be left out; the next is an error all the same, for the weights are broken then.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, action: Literal["raise", "skip-step"] = "raise", *, patience: int = 10) -> None:
        if action not in ("raise", "skip-step"):
            raise ValueError(f"action: expected 'raise' or 'skip-step', found {action!r}")
        if patience < 1:
            raise ValueError(f"patience: expected at least 1, found {patience}")
        self.action = action
        self.patience = patience
        self.skipped = 0
        self._in_a_row = 0

    def skips(self, error: NonFiniteError | None, *, device: torch.device | str = "cpu") -> bool:
        """Whether to leave this step out; call it once a step in every process.

        Args:
            error: what the matching raised, or None.
            device: of the tensor that the processes of a distributed training agree by; they must all leave out the same steps,
                or they would wait for each other for ever. "raise" asks nobody.

        Raises:
            NonFiniteError: under "raise", or when patience is at its end.
        """
        if self.action == "raise":
            if error is not None:
                raise error
            return False
        if not _anywhere(error is not None, device):
            self._in_a_row = 0
            return False
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self.patience:
            raise error or NonFiniteError(
                f"another process found NaN or infinite predictions in {self._in_a_row} steps in a row",
                "its own message names the images",
            )
        _logger.warning(
            "step left out (%d so far): %s",
            self.skipped,
            error.message if error else "another process found NaN or infinite predictions",
        )
        return True


def _anywhere(found: bool, device: torch.device | str) -> bool:
    """Whether any process has found it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return found
    flag: Tensor = torch.tensor(int(found), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())
