"""`moa-train` from the command line's point of view."""

import re
import subprocess
import sys

import pytest

from calling import call
from moa_train.cli import train
from moa_train.cli.paths import config_dir
from moa_train.cli.prior import prior_paths_as_source
from tiny import load


@pytest.mark.parametrize("experiment", ["toy", "ffhq_sd15"])
def test_each_experiment_trains_for_two_steps(world, tmp_path, experiment):
    run = world.train(tmp_path / "run", "max_steps=2", "optim.lr=1e-4", experiment=experiment)
    assert load(run)["global_step"] == 2
    assert load(run)["moa_train"]["config"]["name"] == experiment


@pytest.mark.parametrize("change", [("optim=adamw_cosine", "optim.schedule.warmup_steps=1"), ("logger=tensorboard",)])
def test_each_option_of_optimizer_and_logger_trains(world, tmp_path, change):
    run = world.train(tmp_path / "run", "max_steps=2", *change)
    assert load(run)["global_step"] == 2
    assert (run / "metrics.csv").exists()
    assert (run / "tensorboard").exists() == (change[0] == "logger=tensorboard")


def test_wandb_is_offline_with_the_runs_own_id(world, tmp_path):
    cfg = world.config(f"run_dir={tmp_path}/toy/now", "logger=wandb")
    assert cfg.logger.wandb.offline
    assert cfg.logger.wandb.resume == "allow"
    assert list(cfg.logger) == ["csv", "wandb"]


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [("cpu", ("cpu", 1, 1)), ("gpu", ("gpu", 1, 1)), ("ddp", ("gpu", "auto", 1)), ("ddp_nodes", ("gpu", "auto", 2))],
)
def test_each_machine_composes(world, trainer, expected):
    cfg = world.config(f"trainer={trainer}")
    assert (cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.num_nodes) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "values"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["trainer.devices=1,2", "trainer.strategy=ddp"]),
        (["hydra/launcher=submitit_local"], ["trainer.devices=1", "data.batch_size=2"]),
    ],
)
def test_each_trial_trains_in_a_process_of_its_own_with_ranks_of_its_own(world, tmp_path, launcher, values):
    settings = world.overrides("max_steps=1", f"hydra.sweep.dir={tmp_path}/sweep", *launcher, *values)
    command = [sys.executable, "-m", "moa_train.train", "-m", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trials = sorted(path.parent for path in (tmp_path / "sweep").glob("*/trial.json"))
    assert [load(trial)["global_step"] for trial in trials] == [1] * len(trials)
    assert [(trial / "sample_log.rank1.csv").exists() for trial in trials] == [False, True][: len(trials)]
    assert (tmp_path / "sweep" / "summary.md").exists()


MISTAKES = {
    "unknown setting": (["optim.learning_rate=1"], "optim.learning_rate"),
    "unknown experiment": (["experiment=toyy"], "toy"),
    "wrong kind": (["max_steps=many"], "max_steps"),
    "bad value": (["loss.router.warmup=2.5"], "loss.router.warmup"),
    "bad kind of loss": (["loss.object.kind=l3"], "balanced_l1"),
    "bad divisor of the loss": (["loss.masked_mean=pixels"], "masked_mean"),
    "bad dtype": (["prior_dtype=int8"], "prior_dtype"),
    "missing checkpoint": (["ckpt=nowhere.ckpt"], "nowhere.ckpt"),
    "missing prior": (["prior=/no/such/prior"], "/no/such/prior"),
    "sweep into one folder": (["-m", "seed=0,1", "run_dir=here"], "run_dir cannot be given with -m"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(world, tmp_path, monkeypatch, capfd, mistake):
    arguments, told = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    settings = [setting for setting in world.overrides() if setting.split("=")[0] not in ("experiment", "trainer")]
    if arguments[0].startswith("prior="):
        settings = [setting for setting in settings if not setting.startswith("prior.source")]
    assert call(train.main, monkeypatch, *arguments, *settings) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "moa-train: error:" in line]
    assert len(errors) == 1
    assert told in errors[0]


def test_several_processes_without_a_common_folder_are_refused(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(train.main, monkeypatch, *world.overrides(f"runs={tmp_path}")) == 2
    assert "run_dir=FOLDER" in capfd.readouterr().err


def test_a_prior_may_be_an_option_or_a_path():
    given = ["prior=toy", "prior=/a/b", "prior=owner/name", "prior=nosuch", "prior=/a,/b", "prior.source=x", "seed=1"]
    assert prior_paths_as_source(given, config_dir()) == [
        "prior=toy",
        "prior.source=/a/b",
        "prior.source=owner/name",
        "prior=nosuch",
        "prior.source=/a,/b",
        "prior.source=x",
        "seed=1",
    ]


def test_help_names_the_experiments_and_starts_without_heavy_imports():
    code = "import sys; sys.argv = ['moa-train', '--help']\nfrom moa_train.cli.train import main\nmain()\n"
    code += "heavy = {'torch', 'diffusers', 'pytorch_lightning'} & set(sys.modules)\nassert not heavy, heavy"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "toy" in told
    assert "ffhq_sd15" in told
    assert not re.search(r"\{[a-z_/]+\}", told)  # every group is filled in
