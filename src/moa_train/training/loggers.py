"""Loggers that never end a run: what they cannot send or write is told once, and `metrics.csv` has it all the same."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pytorch_lightning import loggers
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities import rank_zero_only

logger = logging.getLogger(__name__)

_INIT_SECONDS = 30.0
"""How long wandb's server is waited for at the beginning of a run."""


class _Forgiving:
    """Calls a logger until it fails; then says so once and calls it no more."""

    _gone = False

    def _forgive(self, what: str, call: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 (whatever a logger meets, the training goes on)
            self._gone = True
            logger.warning("%s failed (%s); it gets no more numbers of this run, metrics.csv does", what, _told(error))


class Wandb(_Forgiving, loggers.WandbLogger):
    """Weights & Biases. Without its server the run goes on offline, without room on the disk without it.

    finish_timeout: how long its server is waited for at the end of a run, in seconds.
    """

    def __init__(self, offline: bool = True, finish_timeout: float = 60.0, **settings: Any) -> None:
        import wandb

        bounds = {"init_timeout": _INIT_SECONDS, "login_timeout": _INIT_SECONDS, "finish_timeout": finish_timeout}
        known = {name: value for name, value in bounds.items() if name in getattr(wandb.Settings, "model_fields", {})}
        super().__init__(offline=offline, settings=wandb.Settings(**known), **settings)

    @property
    def experiment(self) -> Any:
        """The run at wandb; begun offline where the server does not answer."""
        if self._experiment is None and not self._offline and getattr(rank_zero_only, "rank", 0) == 0:
            import wandb

            try:
                return super().experiment
            except Exception as error:  # noqa: BLE001 (as above)
                logger.warning(
                    "wandb cannot be reached (%s); this run goes on offline: `wandb sync` sends it later", _told(error)
                )
                wandb.teardown()  # what is left of the attempt holds the run's id
                self._wandb_init["mode"] = "offline"
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._forgive("wandb", lambda: super(Wandb, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self._forgive("wandb", lambda: super(Wandb, self).log_hyperparams(params))


class TensorBoard(_Forgiving, loggers.TensorBoardLogger):
    """TensorBoard. Where its folder cannot be written, the run goes on without."""

    @property
    def experiment(self) -> Any:
        """The writer; Lightning asks for it before anything is logged, and a full disk refuses it already then."""
        try:
            return super().experiment
        except OSError as error:
            self._forgive("TensorBoard", partial(_raise, error))
            return DummyExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._forgive("TensorBoard", lambda: super(TensorBoard, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **settings: Any) -> None:
        self._forgive("TensorBoard", lambda: super(TensorBoard, self).log_hyperparams(params, *args, **settings))

    @rank_zero_only
    def save(self) -> None:
        self._forgive("TensorBoard", super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._forgive("TensorBoard", lambda: super(TensorBoard, self).finalize(status))


def _raise(error: Exception) -> None:
    raise error


def _told(error: BaseException) -> str:
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
