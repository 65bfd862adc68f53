"""Average, checkpoints, logs and guards, one by one."""

import csv
import random
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from moa_train.training.callbacks.checkpoint import Checkpoints
from moa_train.training.callbacks.ema import ExponentialMovingAverage
from moa_train.training.callbacks.progress import duration
from moa_train.training.callbacks.random_state import random_state, set_random_state
from moa_train.training.callbacks.sample_log import HEADER, keep_until
from moa_train.training.callbacks.summary import Summary
from moa_train.training.metrics_csv import MetricsCSV, read_rows
from moa_train.training.module import MoAModule
from moa_train.training.resume import step_files
from moa_train.training.writer import CheckpointWriter
from tiny import load


def a_trainer(**values):
    """Something that passes for a trainer."""
    trainer = Mock(spec=pl.Trainer)
    for name, value in values.items():
        setattr(trainer, name, value)
    return trainer


class Scalar(MoAModule):
    """One trained number beside a frozen one."""

    def __init__(self, value):
        nn.Module.__init__(self)
        self.number = nn.Parameter(torch.tensor(value))
        self.frozen = nn.Parameter(torch.tensor(100.0), requires_grad=False)

    def forward(self):
        return self.number


def averaged(values, decay):
    """EMA callback after it has seen these values."""
    module = Scalar(values[0])
    ema = ExponentialMovingAverage(decay)
    ema.on_fit_start(a_trainer(), module)
    for value in values[1:]:
        module.number.data.fill_(value)
        ema.after_step(a_trainer(), module, 0)
    return module, ema


def test_the_average_is_the_closed_form_with_its_warmup():
    values = [1.0, 4.0, -2.0, 3.0, 7.0]
    _, ema = averaged(values, 0.25)
    expected = values[0]
    for n, value in enumerate(values[1:]):
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.average["number"].item() == pytest.approx(expected)
    assert list(ema.average) == ["number"]
    assert ema.updates == 4


def test_the_average_stands_in_for_the_weights_and_gives_them_back():
    module, ema = averaged([1.0, 4.0], 0.5)
    with ema.in_place_of_weights(module):
        assert module.number.item() == pytest.approx(0.1 * 1 + 0.9 * 4)
    assert module.number.item() == 4.0


def test_a_resumed_average_goes_on_as_if_it_had_never_stopped():
    module, straight = averaged([1.0, 4.0, -2.0, 3.0], 0.9)
    _, first = averaged([1.0, 4.0, -2.0], 0.9)
    checkpoint = {}
    first.on_save_checkpoint(a_trainer(), module, checkpoint)
    second = ExponentialMovingAverage(0.9)
    second.on_load_checkpoint(a_trainer(), module, checkpoint)
    second.on_fit_start(a_trainer(), module)
    module.number.data.fill_(3.0)
    second.after_step(a_trainer(), module, 0)
    assert torch.equal(second.average["number"], straight.average["number"])
    assert second.updates == straight.updates


def test_a_checkpoint_without_an_average_is_refused():
    with pytest.raises(ValueError, match=r"callbacks\.ema=null"):
        ExponentialMovingAverage().on_load_checkpoint(a_trainer(), Scalar(1.0), {})


def test_only_the_latest_checkpoints_are_kept_and_last_is_the_newest(finished):
    assert list(step_files(finished / "checkpoints")) == [3, 4]
    assert load(finished)["global_step"] == 4
    assert load(finished, "step=000003.ckpt")["global_step"] == 3
    assert not list((finished / "checkpoints").glob("*tmp*"))


KILLED_IN_SAVE = """
import os, signal, sys, torch
from moa_train.training.writer import CheckpointWriter
save = torch.save
def torn(value, opened):
    save(value, opened)
    opened.flush()
    os.truncate(opened.file.name, 100)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
CheckpointWriter().save_checkpoint({"step": 2}, sys.argv[1])
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    CheckpointWriter().save_checkpoint({"step": 1}, path)
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_SAVE, str(path)], check=False)
    assert killed.returncode == -9
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    saved = []
    trainer = a_trainer(global_step=7, is_global_zero=True, save_checkpoint=saved.append)
    with pytest.raises(ValueError, match=r"after step 7 \(first: number\)"):
        Checkpoints(tmp_path).save(trainer, Scalar(float("nan")))
    assert saved == []


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"keep": -1}])
def test_impossible_checkpoint_settings_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint"):
        Checkpoints(tmp_path, **settings)


def test_the_random_generators_come_back_from_a_weights_only_file(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    torch.save(random_state(), tmp_path / "state")
    first = draw()
    draw()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first


def test_a_resumed_log_loses_the_steps_after_the_checkpoint_and_torn_lines(tmp_path):
    path = tmp_path / "sample_log.csv"
    path.write_text("step,rank,samples\n1,0,3 4\n2,0,5 6\n3,0,7 8\n4,0,9 1")
    keep_until(path, 2, HEADER)
    assert list(csv.reader(path.read_text().splitlines())) == [
        ["step", "rank", "samples"],
        ["1", "0", "3 4"],
        ["2", "0", "5 6"],
    ]


def test_metrics_share_rows_by_step_and_new_columns_are_added(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"loss": 1.0, "epoch": 0}, 1)
    log.log_metrics({"loss": 0.5}, 2)
    log.log_metrics({"gap": 0.25}, 2)
    log.finalize("success")
    again = MetricsCSV(tmp_path)
    again.resume_at(1)
    again.log_metrics({"loss": 0.75}, 2)
    again.finalize("success")
    assert read_rows(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "1.0", "gap": ""},
        {"step": "2", "loss": "0.75", "gap": ""},
    ]


@pytest.mark.parametrize(("inside", "starved"), [(0.95, 1.0), (0.5, 0.0)])
def test_a_starving_router_is_told_in_the_metrics_and_in_a_line(inside, starved, tmp_path, caplog):
    log = MetricsCSV(tmp_path)
    metrics = {"val/routing_inside": torch.tensor(inside), "val/identity_gap": torch.tensor(0.01)}
    trainer = a_trainer(callback_metrics=metrics, loggers=[log], global_step=5, is_global_zero=True)
    Summary().on_train_end(trainer, Scalar(1.0))
    log.finalize("success")
    assert float(read_rows(tmp_path / "metrics.csv")[0]["router_starved"]) == starved
    assert ("STARVING ROUTER" in caplog.text) == bool(starved)


def test_durations_read_as_hours_minutes_seconds():
    assert [duration(seconds) for seconds in (5.0, 65.0, 3723.0)] == ["0:00:05", "0:01:05", "1:02:03"]


def test_a_run_writes_what_it_promises(finished):
    rows = read_rows(finished / "metrics.csv")
    assert [int(float(row["step"])) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert [bool(row["val/identity_gap"]) for row in rows] == [False, True, False, True]
    assert rows[-1]["router_starved"] == "0.0"
    log = list(csv.DictReader((finished / "sample_log.csv").read_text().splitlines()))
    assert [row["step"] for row in log] == ["1", "2", "3", "4"]
    drawn = [sample for row in log for sample in row["samples"].split()]
    assert len(drawn) == len(set(drawn)) == 16  # within one epoch nothing is drawn twice
    for name in ("samples", "routing"):
        assert [path.name for path in sorted((finished / name).iterdir())] == ["step=000002.png", "step=000004.png"]
    assert (finished / "config.yaml").read_text().count("???") == 0
    assert "training" in (finished / "train.log").read_text()
