"""`python -m paqdetr.study.launch ...`: torchrun, which then returns how its processes ended.

torchrun itself ends with 1 whatever happened, and a training that was asked to stop, and has saved its state, would look like one
that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; the exit code of the process that failed first, which made it end the others.

    Returns:
        0 if all ended well; 128 + the number of a signal that killed that process, or that torchrun itself was sent.
    """
    try:
        run.main(list(arguments))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:  # the process has reported its reason
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
