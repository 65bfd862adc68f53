"""Mixture-of-Attention (MoA, arXiv 2404.11565): personalisation of text-to-image diffusion models.

The names below are imported on first use, so that `import moa_train` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_train.inference.pipeline import MoAControlNetPipeline, MoAPipeline
    from moa_train.inference.subjects import Views
    from moa_train.model.unet import add_moa, personalized_state_dict, remove_moa

__version__ = "0.1.0"
__all__ = [
    "MoAControlNetPipeline",
    "MoAPipeline",
    "Views",
    "__version__",
    "add_moa",
    "personalized_state_dict",
    "remove_moa",
]

_HOME = {
    "MoAControlNetPipeline": "moa_train.inference.pipeline",
    "MoAPipeline": "moa_train.inference.pipeline",
    "Views": "moa_train.inference.subjects",
    "add_moa": "moa_train.model.unet",
    "remove_moa": "moa_train.model.unet",
    "personalized_state_dict": "moa_train.model.unet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
