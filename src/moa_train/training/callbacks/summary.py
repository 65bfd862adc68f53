"""The end of a run in a few lines: what it reached, and whether its routers starved."""

from __future__ import annotations

import logging

import pytorch_lightning as pl

from moa_train.training.metrics_csv import MetricsCSV

logger = logging.getLogger(__name__)

STARVED = 0.9
"""R_0 inside the subject above which the personalized expert has practically no say."""

_LINES = {
    "val/masked": "masked loss, held-out samples",
    "val/identity_gap": "identity gap (wrong subject minus right one)",
    "val/routing_inside": "R_0 inside the subject",
    "val/routing_outside": "R_0 outside",
    "val/attention_inside": "A_s inside the subject",
    "val/attention_outside": "A_s outside",
}


class Summary(pl.Callback):
    """Logs the last validation's numbers, and `router_starved` (1 or 0): R_0 inside the subject stayed above 0.9."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for each in trainer.loggers:
            if isinstance(each, MetricsCSV) and trainer.is_global_zero:
                each.resume_at(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        inside = metrics.get("val/routing_inside", metrics.get("train/routing_inside"))
        starved = inside is not None and float(inside) > STARVED
        for each in trainer.loggers:
            each.log_metrics({"router_starved": float(starved)}, step=trainer.global_step)
        for name, text in _LINES.items():
            if name in metrics:
                logger.info("%s: %.4f", text, float(metrics[name]))
        if starved and inside is not None:
            logger.warning(
                "STARVING ROUTER: R_0 inside the subject is %.3f (above %.1f): the personalized expert has little say. "
                "If the identity gap is small, too, or the pictures show the prior's people: "
                "raise loss.router.warmup and optim.lr_scale.router, or lower loss.router.weight",
                float(inside), STARVED,
            )  # fmt: skip
