"""The job script under a SLURM of three shell scripts (`srun` starts and signals, `scontrol` notes); ranks of a job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from moa_train.training.metrics_csv import read_rows
from moa_train.training.strategies import cluster
from tiny import load

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"

SRUN = """#!/usr/bin/env bash
# Starts the tasks; in a job's first start sends SIGUSR1 to all of them once a step is done. Returns the highest code.
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
  tasks+=($!)
done
if [ "$SLURM_RESTART_COUNT" = 0 ]; then
  until [ "$(cat "$LOG" 2>/dev/null | wc -l)" -gt 1 ]; do sleep 0.05; done
  kill -USR1 "${tasks[@]}"
fi
highest=0
for task in "${tasks[@]}"; do
  wait "$task"
  code=$?
  if [ $code -gt $highest ]; then highest=$code; fi
done
exit $highest
"""

SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$REQUEUED"
"""


SQUEUE = """#!/usr/bin/env bash
[[ "$*" == "--noheader --jobs=42 --format=%T" ]] && echo "${STATE:-RUNNING}"
"""


class Slurm:
    """A folder of the three commands, and the environment of job 42."""

    def __init__(self, folder, tasks=1):
        self.folder, self.tasks = folder, tasks
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        moa_train = folder / "moa-train"
        moa_train.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m moa_train.train "$@"\n')
        moa_train.chmod(0o755)

    def start(self, *arguments, restarts=0, **more):
        """Runs the script as the batch system would."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "REQUEUED": str(self.folder / "requeued"),
            "LOG": str(self.folder / "runs" / "toy" / "slurm-42" / "sample_log.csv"),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NAME": "moa-train",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_NTASKS_PER_NODE": str(self.tasks),
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_RESTART_COUNT": str(restarts),
            **more,
        }
        command = ["bash", str(SCRIPT), *arguments, f"runs={self.folder / 'runs'}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_requeued_and_goes_on_in_its_own_folder(world, tmp_path):
    newer = tmp_path / "runs" / "toy" / "2026-01-01_00-00-00" / "checkpoints" / "last.ckpt"  # another run of this name
    newer.parent.mkdir(parents=True)
    newer.write_bytes(b"")
    slurm = Slurm(tmp_path)
    arguments = [each for each in world.overrides("max_steps=60") if each != "trainer=cpu"]
    arguments += ["trainer.accelerator=cpu", "optim.lr=1e-5"]
    first = slurm.start(*arguments)
    assert first.returncode == 138, first.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    run = tmp_path / "runs" / "toy" / "slurm-42"
    reached = load(run)["global_step"]
    assert 1 <= reached < 60
    second = slurm.start(*arguments, f"max_steps={reached + 1}", restarts=1)
    assert second.returncode == 0, second.stderr
    assert load(run)["global_step"] == reached + 1
    assert [int(row["step"]) for row in read_rows(run / "sample_log.csv")] == list(range(1, reached + 2))
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"  # a job that is done is not put back


@pytest.mark.parametrize(
    ("code", "restarts", "state", "requeued"),
    [
        (0, 0, "RUNNING", False),
        (1, 0, "RUNNING", False),
        (143, 99, "RUNNING", True),
        (143, 100, "RUNNING", False),
        (138, 3, "RUNNING", True),
        (143, 0, "COMPLETING", False),  # scancel, or SLURM puts it back itself
    ],
)
def test_only_a_run_that_saved_and_stopped_is_put_back_and_not_for_ever(tmp_path, code, restarts, state, requeued):
    slurm = Slurm(tmp_path)
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\nexit {code}\n")
    done = slurm.start(restarts=restarts, STATE=state)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    assert ("not again (MAX_REQUEUES)" in done.stderr) == (restarts == 100)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, LightningEnvironment),  # an sbatch script without srun
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, LightningEnvironment),  # a trial
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_NUM_TASKS": "4"}, SLURMEnvironment),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "x"}, None),
    ],
)
def test_only_the_tasks_of_srun_are_ranks(monkeypatch, variables, expected):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [type(each) for each in cluster(nodes=1)] == ([] if expected is None else [expected])


def test_one_process_of_a_slurm_job_cannot_be_several_machines(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with pytest.raises(ValueError, match="num_nodes=2 in a SLURM job, but this process is alone"):
        cluster(nodes=2)


@pytest.mark.slow
def test_a_job_without_srun_starts_the_ranks_that_it_was_asked_for(world, tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=1")
    command = [sys.executable, "-m", "moa_train.train", *world.overrides(*two, "max_steps=1", f"run_dir={tmp_path}")]
    done = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [len(read_rows(tmp_path / f"sample_log{rank}.csv")) for rank in ("", ".rank1")] == [1, 1]


@pytest.mark.slow
def test_the_tasks_of_srun_are_the_ranks_of_deepspeed(world, tmp_path):
    """srun numbers them in other variables than DeepSpeed reads."""
    job = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    job |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    two = ("trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=1")
    command = [sys.executable, "-m", "moa_train.train", *world.overrides(*two, "max_steps=1", f"run_dir={tmp_path}")]
    tasks = [
        subprocess.Popen([*command, "ckpt=auto"], env={**job, "SLURM_PROCID": task, "SLURM_LOCALID": task})
        for task in ("0", "1")
    ]
    assert [task.wait(300) for task in tasks] == [0, 0]
    assert [len(read_rows(tmp_path / f"sample_log{rank}.csv")) for rank in ("", ".rank1")] == [1, 1]
