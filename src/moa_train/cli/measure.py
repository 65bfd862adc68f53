"""The end of a run that measures itself: its weights are exported, and `moa-eval` looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.evaluate import toy_protocol
from moa_train.cli.overrides import read_arguments
from moa_train.cli.paths import config_dir
from moa_train.cli.schema import ArgumentError

if TYPE_CHECKING:
    from omegaconf import DictConfig

WEIGHTS, EVALUATION = "personalized.safetensors", "evaluation"
"""What lies in the run's folder afterwards."""


def evaluation_settings(cfg: DictConfig) -> DictConfig:
    """What `moa-eval` is to do at the end of a run: the settings in `evaluate`, and the prior of the run.

    Raises:
        ArgumentError, ValueError: a setting or a value that `moa-eval` does not take, or no settings; told before
            anything is trained.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    chosen: Any = OmegaConf.to_container(cfg.evaluate) if OmegaConf.is_config(cfg.evaluate) else cfg.evaluate
    if not isinstance(chosen, dict):
        raise ArgumentError(
            f"evaluate is {chosen}; expected settings of moa-eval, such as {{people: 8}}, or {{}}, or null"
        )
    given = [f"{key}={value}" for key, value in chosen.items()]
    with _beside_the_runs_hydra():
        given = read_arguments(given, config_dir(), "eval")
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            settings = compose("eval", given)
    settings.prior.source = cfg.prior.source
    if settings.benchmark == "toy":
        toy_protocol(settings)
    return settings


@contextmanager
def _beside_the_runs_hydra() -> Iterator[None]:
    """Inside, another command's configuration can be composed: Hydra knows one at a time."""
    from hydra.core.global_hydra import GlobalHydra

    instance = GlobalHydra.instance()
    running, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        instance.hydra = running


def measure(cfg: DictConfig, folder: Path) -> None:
    """Export the last checkpoint of the run in `folder` to personalized.safetensors and evaluate it to evaluation/."""
    from moa_train.cli import evaluate
    from moa_train.training.export import export_checkpoint

    settings, weights = evaluation_settings(cfg), folder / WEIGHTS
    export_checkpoint(folder / "checkpoints" / "last.ckpt", weights, dtype="float16", metrics=folder / "metrics.csv")
    settings.weights, settings.out = str(weights), str(folder / EVALUATION)
    evaluate.run(settings)
