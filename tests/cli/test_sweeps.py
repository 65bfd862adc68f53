"""`moa-train -m`: trials in processes of their own, their records, the summary, interruption, Optuna's studies."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from moa_train.cli import evaluate, study, train, trials
from moa_train.cli.collect import gather, over_seeds
from moa_train.cli.study import distribution

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def sweep(monkeypatch, tmp_path, capfd):
    """Sweeps with the stand-in for `moa-train` in `tmp_path/s`; gives back exit code, output, errors."""
    monkeypatch.setattr(trials, "COMMAND", (sys.executable, str(STAND_IN)))
    monkeypatch.setattr(trials, "_POLL", 0.05)
    monkeypatch.setattr("moa_train.cli.study._POLL", 0.05)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it

    def call(*arguments: str, main=train.main) -> tuple[int, str, str]:
        given = ["-m", "hydra.sweep.dir=s"] if main is train.main else []
        monkeypatch.setattr(sys, "argv", ["moa", *given, *arguments])
        handlers = logging.root.handlers[:]
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            logging.root.handlers[:] = handlers  # Hydra's write to the captured stdout of this test
        told = capfd.readouterr()
        return code, told.out, told.err

    yield call
    signal.signal(signal.SIGINT, before)


def status(number):
    record = trials.read_record(Path("s") / str(number))
    return None if record is None else record.status


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(sweep):
    code, out, err = sweep("seed=1,2,0", "optim.lr=0.5")
    assert code == 1
    assert [status(number) for number in range(3)] == ["failed", "failed", "finished"]
    records = [json.loads(Path(f"s/{number}/trial.json").read_text()) for number in range(3)]
    assert [record["exit_code"] for record in records] == [1, -9, 0]
    assert [record["error"] for record in records] == ["the prior is missing", "killed by SIGKILL (out of memory?)", ""]
    with Path("s/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["status"], row["steps"]) for row in rows] == [
        ("1", "failed", "2"),
        ("2", "failed", "2"),
        ("0", "finished", "2"),
    ]
    assert float(rows[2]["val/identity_gap"]) == 0.5
    assert "optim.lr" not in rows[0]  # the same in all
    assert "the prior is missing" in Path("s/summary.md").read_text()
    assert "identity_gap" in out
    assert "hydra.sweep.dir=s" in err.splitlines()[-1]


def test_repeating_a_sweep_runs_what_is_not_finished_and_resumes_from_checkpoints(sweep):
    assert sweep("seed=0,1")[0] == 1
    before = Path("s/0/trial.json").read_text()
    code, _, err = sweep("seed=0,1")
    assert code == 0
    assert Path("s/0/trial.json").read_text() == before
    assert "[0] finished before" in err
    assert "[1] attempt last in group" in err
    record = trials.read_record(Path("s/1"))
    assert (record.status, record.attempts, record.error) == ("finished", 2, "")


def test_an_interrupted_sweep_ends_in_order_and_goes_on(sweep):
    code, _, err = sweep("seed=0,3,0")
    assert code == 130
    assert [status(number) for number in range(3)] == ["finished", "interrupted", None]
    assert "moa-train -m seed=0,3,0 hydra.sweep.dir=s" in err.splitlines()[-1]
    assert not Path("s/stop").exists()
    Path("s/1/stop").write_text("pruned at step 2")  # of the process before: it does not end this one
    assert sweep("seed=0,3,0")[0] == 0
    assert [status(number) for number in range(3)] == ["finished"] * 3
    assert not Path("s/1/stop").exists()


def test_a_launcher_that_gives_up_its_place_lets_the_trial_save(sweep, monkeypatch):
    def given_up(child, folder, sweep, relay):
        while "attempt" not in (folder / "output.log").read_text():
            time.sleep(0.01)
        raise SystemExit(7)

    monkeypatch.setattr(trials, "_wait", given_up)
    assert sweep("seed=4")[0] == 7
    record = trials.read_record(Path("s/0"))
    assert (record.status, record.exit_code) == ("interrupted", 143)


def test_a_trial_whose_sweep_was_killed_keeps_its_folder(tmp_path):
    code = (
        f"import sys; from moa_train.cli import train, trials; trials.COMMAND = (sys.executable, {str(STAND_IN)!r}); "
        "sys.argv = ['moa-train', '-m', 'hydra.sweep.dir=s', 'seed=4']; train.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    output = tmp_path / "s" / "0" / "output.log"
    while not output.exists() or b"attempt" not in output.read_bytes():
        assert process.poll() is None
        time.sleep(0.05)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    with trials.locked(output.parent) as lock:
        assert lock is None
    child.kill()
    child.wait()
    assert trials.read_record(output.parent).status == "lost"


def test_a_trial_that_its_cluster_asks_to_end_has_not_failed(sweep):
    """submitit's SIGUSR2 goes to every process of the job."""
    code, _, err = sweep("seed=5,6,0")
    assert code == 1
    assert [status(number) for number in range(3)] == ["interrupted", "interrupted", "finished"]
    assert "hydra.sweep.dir=s" in err.splitlines()[-1]


def test_the_first_signal_asks_and_the_second_ends_at_once(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with trials.StopOnSignal(tmp_path, (signal.SIGINT,)):
            signal.raise_signal(signal.SIGINT)
            assert (tmp_path / trials.STOP).read_text() == "interrupted"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_sweep_in_the_same_folder_is_refused(sweep):
    assert sweep("seed=0", "optim.lr=0.5")[0] == 0
    code, _, err = sweep("seed=0", "optim.lr=0.25")
    assert code == 2
    assert "holds the trial" in err


def test_a_trial_that_another_process_works_on_is_left_alone(sweep):
    with trials.locked(Path("s/0")) as lock:
        assert lock is not None
        assert "running already" in sweep("seed=0")[2]
    assert status(0) is None


def test_a_trial_whose_processes_are_gone_is_lost_and_runs_again(sweep):
    assert sweep("seed=0")[0] == 0
    record = json.loads(Path("s/0/trial.json").read_text())
    Path("s/0/trial.json").write_text(json.dumps({**record, "status": "running"}))
    assert status(0) == "lost"
    assert sweep("seed=0")[0] == 0
    assert trials.read_record(Path("s/0")).attempts == 2


def test_the_frozen_configuration_is_resolved_and_groups_the_runs(sweep):
    sweep("seed=0", "max_steps=7", "optim.lr=0.125")
    frozen = OmegaConf.load("s/0/trial.yaml")
    assert "${" not in Path("s/0/trial.yaml").read_text()
    assert (frozen.trainer.max_steps, frozen.optim.lr, frozen.run_dir) == (7, 0.125, str(Path("s/0").absolute()))
    assert frozen.group == f"{Path.cwd().name}-s"
    assert sweep("seed=0", "hydra.sweep.dir=t", "logger=wandb", "group=mine")[0] == 0
    assert OmegaConf.load("t/0/trial.yaml").logger.wandb.group == "mine"


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_sweep_in_each_of_several_ranks_is_refused(sweep, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    code, _, err = sweep("seed=0,1", "trainer=ddp")
    assert code == 2
    assert "2 processes" in err
    assert "once, without torchrun or srun" in err
    assert not Path("s/0").exists()


# -------------------------------------------------------------------------------------------------------------- Optuna
OPTUNA = ("hydra/sweeper=optuna", "optim.lr=tag(log,interval(1e-5,1e-1))")


def proposals(folder="s"):
    return [OmegaConf.load(f"{folder}/{number}/trial.yaml").optim.lr for number in range(4)]


def test_a_study_that_goes_on_proposes_what_the_uninterrupted_one_does(sweep):
    settings = ("seed=0", "hydra.sweeper.sampler.n_startup_trials=2", "hydra.sweeper.pruner=null")
    assert sweep(*OPTUNA, *settings, "hydra.sweeper.n_trials=4", "hydra.sweep.dir=straight")[0] == 0
    assert sweep(*OPTUNA, *settings, "hydra.sweeper.n_trials=1")[0] == 0
    code, out, _ = sweep(*OPTUNA, *settings, "hydra.sweeper.n_trials=4")
    assert code == 0
    assert "1 trials done, 3 to go" in out
    assert proposals() == proposals("straight")
    assert len(set(proposals())) == 4
    result = OmegaConf.load("s/optimization_results.yaml")  # the stand-in reports the learning rate as its gap
    assert result.best_value == max(proposals()) == float(result.best_evaluated_params["optim.lr"])


def test_what_falls_behind_is_pruned_by_a_signal_and_counts(sweep):
    storage = f"hydra.sweeper.storage=sqlite:///{Path.cwd()}/study.db"
    pruned = (
        "~hydra.sweeper.pruner",
        "+hydra.sweeper.pruner={_target_: optuna.pruners.ThresholdPruner, lower: 0.0}",
        storage,
    )
    assert sweep(*OPTUNA, "seed=4", "hydra.sweeper.n_trials=1", *pruned)[0] == 0
    record = trials.read_record(Path("s/0"))
    assert (record.status, record.exit_code, record.error) == ("pruned", 143, "pruned at step 2, val/identity_gap -1")
    stored = optuna.load_study(study_name="study", storage=storage.partition("=")[2])
    assert [trial.state for trial in stored.trials] == [TrialState.PRUNED]
    assert stored.trials[0].intermediate_values == {2: -1.0}
    code, out, _ = sweep(*OPTUNA, "seed=4", "hydra.sweeper.n_trials=1", *pruned)
    assert code == 0
    assert "1 trials done, 0 to go" in out


def test_an_interrupted_trial_of_a_study_goes_on_with_its_values(sweep):
    settings = ("hydra.sweeper.n_trials=1", "hydra.sweeper.pruner=null", "seed=3")
    assert sweep(*OPTUNA, *settings)[0] == 130
    assert status(0) == "interrupted"
    proposed = OmegaConf.load("s/0/trial.yaml").optim.lr
    assert sweep(*OPTUNA, *settings)[0] == 0
    assert (status(0), OmegaConf.load("s/0/trial.yaml").optim.lr) == ("finished", proposed)
    assert not Path("s/1").exists()


def test_trials_begun_before_go_on_in_launches_of_consecutive_numbers():
    """Trial N is job N of a launch, and a launch counts on from its first."""
    settings = {"n_jobs": 3, "metric": "val/identity_gap"}
    search = study._Search(None, settings, {}, [], Path("s"), lambda jobs, first: None)
    begun, launched = [SimpleNamespace(number=number) for number in (1, 2, 4, 5, 6, 7)], []
    while begun:
        batch, begun = search._batch(begun, left=9)
        launched.append([trial.number for trial in batch])
    assert launched == [[1, 2], [4, 5, 6], [7]]


def test_failed_trials_do_not_count_and_are_not_repeated_for_ever(sweep):
    assert sweep(*OPTUNA, "seed=2", "hydra.sweeper.n_trials=2")[0] == 1
    assert [status(number) for number in range(3)] == ["failed", "failed", None]
    more = ("hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=2")  # no more at once than are left
    assert sweep(*OPTUNA, "seed=0", *more)[0] == 1  # the failed two stay in the summary
    assert [status(number) for number in (2, 3)] == ["finished", None]


def test_mistakes_of_a_study_are_told_in_one_line(sweep):
    for arguments, told in (
        (("hydra/sweeper=optuna", "seed=0"), "no setting has a range"),
        ((*OPTUNA, "hydra.sweeper.n_trials=1", "hydra.sweeper.metric=val/nothing"), "val/nothing"),
        (("hydra/sweeper=optuna", "max_steps=interval(1,5)"), "max_steps expects an integer"),
    ):
        code, _, err = sweep(*arguments)
        assert code == 2
        assert told in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(0,10,3)", IntDistribution(0, 9, step=3)),
        ("range(10,0,-2)", IntDistribution(2, 10, step=2)),
        ("range(0.5,2,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("range(3,4)", CategoricalDistribution(["3"])),
        ("choice(adamw,sgd)", CategoricalDistribution(["adamw", "sgd"])),
        ("true,false", CategoricalDistribution(["True", "False"])),
    ],
)
def test_hydras_ranges_are_optunas_with_hydras_meaning(given, expected):
    assert distribution(OverridesParser.create().parse_override(f"a={given}")) == expected


# --------------------------------------------------------------------------------------------------------------- tables
def run_folder(folder, loss, evaluated=None, **config):
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({**config, "run_dir": str(folder), "run_id": folder.name}), folder / "config.yaml")
    (folder / "metrics.csv").write_text(f"step,train/loss,val/masked\n5,9.0,\n6,,{loss}\n")
    if evaluated is not None:
        (folder / "eval").mkdir()
        (folder / "eval" / "metrics.json").write_text(json.dumps(evaluated))


def test_runs_are_gathered_by_what_differs_and_averaged_over_seeds(sweep, tmp_path):
    for seed, loss in ((0, 1.0), (1, 2.0), (2, 3.0)):
        run_folder(tmp_path / "all" / "moa" / str(seed), loss, {"identity": {"moa": 0.5}}, seed=seed, optim={"lr": 0.1})
    run_folder(tmp_path / "all" / "moa" / "10", 4.0, seed=0, optim={"lr": 0.2})
    runs = gather(tmp_path / "all")
    assert [run.folder.name for run in runs] == ["0", "1", "2", "10"]
    assert runs[3].settings == {"seed": "0", "optim.lr": "0.2"}
    assert runs[0].metrics == {"train/loss": 9.0, "val/masked": 1.0, "eval/identity.moa": 0.5}
    one, other = over_seeds(runs)
    assert (one.settings, one.seeds, other.seeds) == ({"optim.lr": "0.1"}, 3, 1)
    mean, half = one.metrics["val/masked"]  # of 1, 2, 3: standard deviation 1, t(0.975, 2) = 4.3027
    assert (mean, half) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    code, out, _ = sweep(f"collect={tmp_path}/all", main=evaluate.main)
    assert code == 0
    assert "2 ± 2.5" in (tmp_path / "all" / "summary.md").read_text()
    assert "identity.moa" in out


def test_gathering_needs_no_torch_and_refuses_folders_without_runs(tmp_path):
    run_folder(tmp_path / "run", 1.0, seed=0)
    code = (
        "import sys; from moa_train.cli.evaluate import main; main(); assert 'torch' not in sys.modules, 'slow import'"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for folder, expected in ((tmp_path, 0), (tmp_path / "run" / "nowhere", 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, f"collect={folder}"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == expected, done.stderr
    assert done.stderr.count("\n") == 1
