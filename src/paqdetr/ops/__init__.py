"""Kernels with one public door each."""

from paqdetr.ops.choice import choose_backend, use_backend
from paqdetr.ops.deform_attn import backends_run, ms_deform_attn

__all__ = ["ms_deform_attn", "choose_backend", "use_backend", "backends_run"]
