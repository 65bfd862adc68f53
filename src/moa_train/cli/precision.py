"""`precision=auto`: bfloat16 where the hardware computes in it."""

from __future__ import annotations


def chosen_precision(precision: str, accelerator: str) -> str:
    """Lightning's name of a number format; "auto" becomes bf16-mixed, or 32-true on a CPU without such instructions.

    Emulated bfloat16 is more than ten times slower than float32 there.
    """
    if precision != "auto":
        return precision
    import torch

    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    return "32-true" if on_cpu and not _cpu_computes_bfloat16() else "bf16-mixed"


def _cpu_computes_bfloat16() -> bool:
    """Whether torch's CPU library has bfloat16 kernels for this processor (AVX-512 or better)."""
    import torch

    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
