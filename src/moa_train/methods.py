"""The methods that can be trained and loaded, by the name that stands in the metadata of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moa_train.baselines.fastcomposer import FastComposerConfig
from moa_train.baselines.finetune import FinetuneConfig
from moa_train.baselines.ip_adapter import IPAdapterConfig
from moa_train.model.unet import Method, MoAConfig

METHODS: dict[str, type[Any]] = {
    kind.name: kind for kind in (MoAConfig, FastComposerConfig, IPAdapterConfig, FinetuneConfig)
}


def method_of(metadata: Mapping[str, Any]) -> Method:
    """The method that an export's metadata describes; without a name it is MoA.

    Raises:
        ValueError: a method or a setting of it that this version does not know.
    """
    name = metadata.get("method", MoAConfig.name)
    if name not in METHODS:
        raise ValueError(f"the weights are of the method {name!r}; this version reads {', '.join(METHODS)}")
    try:
        return METHODS[name](**metadata["moa"])
    except TypeError as error:
        raise ValueError(f"the weights have settings of {name} that this version does not know: {error}") from error
