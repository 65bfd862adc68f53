"""An Optuna study over runs: proposes values, prunes what falls behind, goes on where it was interrupted.

Only the process of the sweep touches the study's storage. It reads what trials report from their metrics.csv and stops
one by a file in its folder, so that trials may run in other processes and on other machines.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moa_train.cli.trials import FAILED, FINISHED, PRUNED, STOP, locked, read_record
from moa_train.training.rows import last_values, read_rows

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

RESULT = "optimization_results.yaml"
"""The best trial, in the sweep's folder; the name that Hydra's sweepers give it."""

_POLL = 1.0  # seconds between two looks at the metrics of running trials

Launch = Callable[[list[list[str]], int], None]
"""Runs jobs, each a list of overrides, with consecutive numbers from the given one on; returns when all have ended."""


def search(settings: Mapping[str, Any], overrides: list[Override], sweep: Path, launch: Launch) -> None:
    """Runs trials until the study has `n_trials` that are finished or pruned; failures in one call are not repeated.

    Args:
        settings: as in `configs/hydra/sweeper/optuna.yaml`.
        overrides: of the command line; those with several values span the space.
        sweep: its folder; trial N is in `sweep/N`.
        launch: runs trials.

    Raises:
        ValueError: Optuna is not installed, another process works on the study, or trials do not report the metric.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError("hydra/sweeper=optuna needs Optuna: pip install 'moa-train[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {each.get_key_element(): distribution(each) for each in overrides if each.is_sweep_override()}
    if not space:
        raise ValueError(
            "hydra/sweeper=optuna: no setting has a range; for example optim.lr=tag(log,interval(1e-5,1e-3))"
        )
    fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
    with locked(sweep) as lock:
        if lock is None:
            raise ValueError(f"another process works on the study in {sweep}: wait for it, or give another study_name")
        study = _open(settings, sweep)
        _Search(study, settings, space, fixed, sweep, launch).run()


def distribution(override: Override) -> BaseDistribution:
    """The values of `choice(...)`, `range(...)` and `interval(...)`, with Hydra's meaning: a range leaves out its end.

    Choices are the texts of their overrides; `tag(log,interval(...))` is drawn on a logarithmic scale.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        start, end, log = value.start, value.end, "log" in value.tags
        assert start is not None
        assert end is not None
        if isinstance(start, int) and isinstance(end, int):
            return IntDistribution(start, end, log=log)
        return FloatDistribution(float(start), float(end), log=log)
    texts = list(override.sweep_string_iterator())
    if isinstance(value, RangeSweep) and len(texts) > 1:
        low, high = sorted((float(texts[0]), float(texts[-1])))
        if isinstance(value.start, int) and isinstance(value.step, int):
            return IntDistribution(int(low), int(high), step=abs(value.step))
        return FloatDistribution(low, high, step=abs(float(value.step or 1)))
    return CategoricalDistribution(texts)


def _open(settings: Mapping[str, Any], sweep: Path) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = settings["storage"] or JournalStorage(JournalFileBackend(str(sweep / "study.journal")))
    pruner = optuna.pruners.NopPruner() if settings["pruner"] is None else instantiate(settings["pruner"])
    return optuna.create_study(
        study_name=settings["study_name"],
        storage=storage,
        direction=settings["direction"],
        pruner=pruner,
        load_if_exists=True,
    )


class _Search:
    def __init__(
        self,
        study: optuna.Study,
        settings: Mapping[str, Any],
        space: dict[str, BaseDistribution],
        fixed: list[str],
        sweep: Path,
        launch: Launch,
    ) -> None:
        self.study, self.settings, self.space, self.fixed = study, settings, space, fixed
        self.sweep, self.launch, self.metric = sweep, launch, settings["metric"]

    def run(self) -> None:
        from optuna.trial import TrialState

        begun = [self._again(each) for each in self.study.get_trials(states=(TrialState.RUNNING,))]
        done = len(self.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        left = self.settings["n_trials"] - done
        print(f"study {self.study.study_name}: {done} trials done, {max(left, 0)} to go; {self.sweep}", flush=True)
        while left > 0 and not (self.sweep / STOP).exists():
            batch, begun = self._batch(begun, left)
            with self._watched(batch):
                self.launch([self._overrides(trial) for trial in batch], batch[0].number)
            for trial in batch:
                self._tell(trial)
            left -= len(batch)
        self._tell_best()

    def _batch(self, begun: list[optuna.Trial], left: int) -> tuple[list[optuna.Trial], list[optuna.Trial]]:
        """The next trials, numbered consecutively: those begun before, or new ones; and what remains of those begun."""
        most = min(self.settings["n_jobs"], left)
        if not begun:
            return [self._ask() for _ in range(most)], []
        number = begun[0].number
        batch = [trial for place, trial in enumerate(begun[:most]) if trial.number == number + place]
        return batch, [trial for trial in begun if trial not in batch]

    def _ask(self) -> optuna.Trial:
        """A new trial. Its sampler's seed follows from its number, so that an interruption changes no proposal."""
        number = len(self.study.trials)
        seed = random.Random(f"{self.settings['seed']}/{number}").getrandbits(31)
        self.study.sampler = instantiate(self.settings["sampler"], seed=seed)
        return self.study.ask(self.space)

    def _again(self, begun: optuna.trial.FrozenTrial) -> optuna.Trial:
        import optuna

        return optuna.Trial(self.study, begun._trial_id)

    def _overrides(self, trial: optuna.Trial) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in trial.params.items())]

    def _folder(self, trial: optuna.Trial) -> Path:
        return self.sweep / str(trial.number)

    # --------------------------------------------------------------------------------------------------------- pruning
    @contextmanager
    def _watched(self, batch: list[optuna.Trial]) -> Iterator[None]:
        """Inside, a thread passes on what the trials report, and asks those to end that the pruner gives up."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_POLL):
                for trial in batch:
                    self._report(trial)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _report(self, trial: optuna.Trial) -> None:
        """Passes on the rows that the study does not know yet."""
        known = self.study.trials[trial.number].intermediate_values
        for row in read_rows(self._folder(trial) / "metrics.csv"):
            value, step = row.get(self.metric), int(float(row["step"]))
            if not value or step in known:
                continue
            trial.report(float(value), step)
            if trial.should_prune():
                request = f"{PRUNED} at step {step}, {self.metric} {float(value):.4g}"
                (self._folder(trial) / STOP).write_text(request)

    # ---------------------------------------------------------------------------------------------------------- results
    def _tell(self, trial: optuna.Trial) -> None:
        """Tells the study how a trial ended; one that was interrupted stays open and goes on next time."""
        from optuna.trial import TrialState

        self._report(trial)
        record = read_record(self._folder(trial))
        status = None if record is None else record.status
        if status == FINISHED:
            value = self._value(trial)
            self.study.tell(
                trial, value if math.isfinite(value) else None, None if math.isfinite(value) else TrialState.FAIL
            )
        elif status == PRUNED:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif status == FAILED:
            self.study.tell(trial, state=TrialState.FAIL)

    def _value(self, trial: optuna.Trial) -> float:
        numbers = last_values(self._folder(trial) / "metrics.csv")
        if self.metric not in numbers:
            raise ValueError(
                f"hydra.sweeper.metric={self.metric}: trial {trial.number} reported {', '.join(numbers) or 'nothing'}; "
                "val/... needs data.validation and a validate_every within max_steps"
            )
        return numbers[self.metric]

    def _tell_best(self) -> None:
        from optuna.trial import TrialState

        if not self.study.get_trials(states=(TrialState.COMPLETE,)):
            return
        best = self.study.best_trial
        result = {
            "name": "optuna",
            "best_evaluated_params": best.params,
            "best_value": best.value,
            "trial": best.number,
        }
        OmegaConf.save(OmegaConf.create(result), self.sweep / RESULT)
        values = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best trial {best.number}: {self.metric} {best.value:.6g} with {values}", flush=True)
