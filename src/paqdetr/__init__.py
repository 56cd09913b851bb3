"""paqdetr: train, evaluate, convert and explain DETR-family detectors, with PaQ's pattern queries.

Everything here is loaded when it is first used, so `import paqdetr` is quick, and `paqdetr.paq` needs nothing of the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paqdetr._threads import calm_idle_threads, drop_missing_plot_backend, ignore_missing_bars
from paqdetr._version import __version__

calm_idle_threads()
drop_missing_plot_backend()
ignore_missing_bars()

if TYPE_CHECKING:
    from paqdetr.analysis import Report, analyze
    from paqdetr.deploy import export
    from paqdetr.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        NonFiniteError,
        OutOfMemoryError,
        StorageError,
        UserError,
        WorkerError,
    )
    from paqdetr.evaluation import Evaluation, evaluate
    from paqdetr.interrupt import TrainingInterrupted
    from paqdetr.loading import load
    from paqdetr.models import Detector, create_model, list_models, list_recipes
    from paqdetr.runs import Run
    from paqdetr.runtime import Predictor
    from paqdetr.structures import ClassTable, Detection, Detections, Targets
    from paqdetr.training import Callback, train

__all__ = [
    "BackendError",
    "Callback",
    "CheckpointError",
    "ClassTable",
    "ConfigError",
    "DataError",
    "Detection",
    "Detections",
    "Detector",
    "Evaluation",
    "ExportError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Predictor",
    "Report",
    "Run",
    "StorageError",
    "Targets",
    "TrainingInterrupted",
    "UserError",
    "WorkerError",
    "__version__",
    "analyze",
    "create_model",
    "evaluate",
    "export",
    "list_models",
    "list_recipes",
    "load",
    "train",
]


# Where each lives: nothing else is imported for it.
_HOMES = {
    **dict.fromkeys(("BackendError", "CheckpointError", "ConfigError", "DataError", "ExportError"), "errors"),
    **dict.fromkeys(("NonFiniteError", "OutOfMemoryError", "StorageError", "UserError", "WorkerError"), "errors"),
    **dict.fromkeys(("ClassTable", "Detection", "Detections", "Targets"), "structures"),
    **dict.fromkeys(("Detector", "create_model", "list_models", "list_recipes"), "models"),
    **dict.fromkeys(("Evaluation", "evaluate"), "evaluation"),
    **dict.fromkeys(("Callback", "train"), "training"),
    **dict.fromkeys(("Report", "analyze"), "analysis"),
    "Predictor": "runtime",
    "Run": "runs",
    "TrainingInterrupted": "interrupt",
    "export": "deploy",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'paqdetr' has no attribute {name!r}")
    return getattr(import_module(f"paqdetr.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
