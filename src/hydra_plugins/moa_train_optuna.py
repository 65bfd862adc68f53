"""`hydra/sweeper=optuna`: Hydra finds sweepers in this namespace only; the work is in `moa_train.cli.study`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Runs the trials that an Optuna study proposes; `settings` are those of `configs/hydra/sweeper/optuna.yaml`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's: before the sweep."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Hydra's: the whole sweep. `arguments` are overrides, fixed ones and ranges."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from moa_train.cli.command import told_in_one_line
        from moa_train.cli.study import search

        assert self.launcher is not None
        assert self.hydra_context is not None
        assert self.config is not None
        overrides = OverridesParser.create(self.hydra_context.config_loader).parse_overrides(arguments)
        launcher = self.launcher

        def launch(jobs: list[list[str]], first: int) -> None:
            self.validate_batch_is_legal(jobs)
            launcher.launch(jobs, initial_job_idx=first)

        with told_in_one_line("moa-train", debug=bool(self.config.get("debug", False))):
            search(self.settings, overrides, Path(self.config.hydra.sweep.dir), launch)
