"""The contract of every command: help at once, Hydra's overrides, and mistakes told in one line with exit code 2."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from moa_train.cli.command import command, command_group

CONFIGS = {
    "train.yaml": """
        defaults:
          - optim: adamw
          - experiment: toy
          - _self_
        debug: false     # show tracebacks
        name: run        # text
        prompt: ""       # text
        seed: 0          # integer
        every: 100       # steps; null: never
        seeds: [0]       # integers
        weights: null    # path
        devices: auto    # number of devices
        loss:
          router: {weight: 0.01, ramp: 500}   # factor; steps
        out: ${hydra:runtime.output_dir}      # path
        hydra: {output_subdir: null, run: {dir: .}, sweep: {dir: ., subdir: .}, job: {chdir: false}}
        """,
    "needs.yaml": "debug: false\nout: ???\nhydra: {output_subdir: null, run: {dir: .}}\n",
    "optim/adamw.yaml": "lr: 1e-4\nfused: false\n",
    "optim/sgd.yaml": "lr: 1e-2\nmomentum: 0.9\n",
    "experiment/toy.yaml": "# @package _global_\nname: toy\n",
    "experiment/ffhq_sd15.yaml": "# @package _global_\nname: ffhq\n",
}

JOBS: list = []  # what `run` below was called with


def run(cfg):
    JOBS.append(cfg)


def run_value_error(cfg):
    raise ValueError("the prompt has 2 subjects,\n  but 1 picture was given")


def run_instantiate(cfg):
    instantiate(cfg.optim)


def run_missing_file(cfg):
    Path("no/such/file").read_text()


def run_our_bug(cfg):
    raise KeyError("ours")


def run_interrupted(cfg):
    raise KeyboardInterrupt


@pytest.fixture
def configs(tmp_path):
    for name, text in CONFIGS.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        path.write_text("\n".join(line[8:] if line.startswith(" " * 8) else line for line in lines) + "\n")
    return tmp_path / "configs"


@pytest.fixture
def call(configs, monkeypatch, tmp_path, capsys):
    """Runs a command with arguments; returns (exit code, stdout, stderr, configurations it ran with)."""

    def call(*arguments, run="run", config_name="train", help="What it does.\n"):
        JOBS.clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moa-train", *arguments])
        monkeypatch.setitem(sys.modules, "the_command", sys.modules[__name__])
        main = command(config_name, help=help, run=run if ":" in run else f"the_command:{run}", folder=configs)
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err, list(JOBS)

    yield call
    for handler in [each for each in logging.root.handlers if isinstance(each, logging.FileHandler)]:
        logging.root.removeHandler(handler)  # Hydra's log file, which it leaves open
        handler.close()


def test_overrides_reach_the_command(call):
    code, _, err, jobs = call("seed=7", "optim=sgd", "optim.momentum=0.5", "loss.router.weight=1", "seeds=[1,2]")
    assert (code, err, len(jobs)) == (0, "", 1)
    cfg = jobs[0]
    assert (cfg.seed, cfg.optim.lr, cfg.optim.momentum, cfg.loss.router.weight, cfg.seeds) == (7, 1e-2, 0.5, 1, [1, 2])


def test_multirun_runs_every_combination(call):
    code, _, _, jobs = call("-m", "seed=1,2", "optim=adamw,sgd")
    assert code == 0
    assert sorted((cfg.seed, cfg.optim.lr) for cfg in jobs) == [(1, 1e-4), (1, 1e-2), (2, 1e-4), (2, 1e-2)]


def test_sweeps_run_in_parallel_processes(configs, tmp_path):
    (tmp_path / "jobs.py").write_text("def run(cfg):\n    open(f'seed{cfg.seed}', 'w').close()\n")
    script = (
        "import pathlib\n"
        "from moa_train.cli.command import command\n"
        "command('train', help='What it does.', run='jobs:run', folder=pathlib.Path('configs').absolute())()\n"
    )
    arguments = ["-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert {path.name for path in tmp_path.glob("seed*")} == {"seed1", "seed2"}


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a man <1> and a woman <2> at the beach",
        "a man, smiling",
        "it's 5 o'clock; a=b",
        "(x) & \\",
        "7",
        "",
        "#1",
    ],
)
def test_free_text_arrives_as_it_was_typed(call, text):
    code, _, err, jobs = call(f"prompt={text}")
    assert (code, err) == (0, "")
    assert jobs[0].prompt == text


def test_paths_with_equal_signs_and_spaces_arrive_as_typed(call):
    _, _, err, jobs = call("weights=runs/my run/step=500.ckpt")
    assert err == ""
    assert jobs[0].weights == "runs/my run/step=500.ckpt"
    assert call("weights=[a b=1.jpg, (2).jpg]")[3][0].weights == ["a b=1.jpg", "(2).jpg"]


MISTAKES = {
    "loss.ruter.weight=1": ["unknown setting loss.ruter.weight", "did you mean loss.router.weight?"],
    "momentun=1": ["unknown setting momentun"],
    "router.weight=1": ["did you mean loss.router.weight?"],
    "experiment=fo": ['experiment has no option "fo"', "expected one of ffhq_sd15, toy"],
    "experiment=ffhq_sd14": ["did you mean ffhq_sd15?"],
    "experiment=toy,ffhq_sd15": ["several need -m"],
    "optimm=sgd": ["unknown setting optimm", "did you mean optim?"],
    "seed=abc": ["seed expects an integer (its default is 0)", 'got "abc"'],
    "seed=1.5": ["seed expects an integer", "got 1.5"],
    "seed=true": ["seed expects an integer", "got true"],
    "seed=null": ["seed expects an integer", "got null"],
    "seed=1,2": ["seed expects an integer", "-m"],
    "seed=range(3)": ["several values", "-m"],
    "seeds=1": ["seeds expects a list", "seeds=[1]"],
    "seeds=[a]": ["seeds expects an integer"],
    "optim.lr=fast": ["optim.lr expects a number", 'got "fast"'],
    "optim.fused=1": ["optim.fused expects true or false"],
    "loss=3": ["loss expects a mapping"],
    "loss={ruter:{weight:1}}": ["unknown setting loss.ruter", "did you mean router?"],
    "ffhq_sd15": ["is not KEY=VALUE", "did you mean experiment=ffhq_sd15?"],
    "--experiment=toy": ["unrecognized arguments: --experiment=toy"],
    "-cn=trian": ['there is no config "trian"', "did you mean train?"],
    "prompt='open": ["cannot read", "quotes"],
    "hydra.runn.dir=x": ["runn"],
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line_that_helps_and_exit_code_2(call, argument):
    code, out, err, jobs = call(argument)
    assert (code, out, jobs) == (2, "", [])
    assert err.count("\n") == 1
    assert err.startswith("moa-train: error: ")
    for part in MISTAKES[argument]:
        assert part in err


@pytest.mark.parametrize(
    "argument", ["every=null", "weights=x.safetensors", "weights=3", "devices=2", "optim.lr=1", "+extra=1"]
)
def test_what_the_defaults_or_their_comments_allow_is_taken(call, argument):
    assert call(argument)[0] == 0


def test_a_required_value_that_is_not_given_is_named(call):
    code, _, err, jobs = call(config_name="needs")
    assert (code, jobs) == (2, [])
    assert err == "moa-needs: error: out is not given: add out=VALUE; --help shows how\n"
    assert call("out=x", config_name="needs")[0] == 0


def test_a_mistake_found_while_running_is_one_line(call):
    code, _, err, _ = call(run="run_value_error")
    assert code == 2
    assert err.startswith("moa-train: error: the prompt has 2 subjects, but 1 picture was given")
    assert err.count("\n") == 1
    code, _, err, _ = call(run="run_missing_file")
    assert code == 2
    assert "no/such/file" in err
    assert err.count("\n") == 1


def test_a_mistake_found_while_building_an_object_names_its_place(call, configs):
    (configs / "optim" / "sgd.yaml").write_text("_target_: moa_train.training.optim.Constant\nsteps: 1\n")
    code, _, err, _ = call("optim=sgd", run="run_instantiate")
    assert code == 2
    assert err.startswith("moa-train: error: optim: ")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(call):
    code, _, err, _ = call("debug=true", run="run_value_error")
    assert code == 2
    assert "Traceback" in err
    assert "run_value_error" in err


def test_our_own_mistakes_keep_their_traceback(call):
    code, _, err, _ = call(run="run_our_bug")
    assert code == 1
    assert "KeyError" in err


def test_an_interrupt_is_one_line_and_exit_code_130(call):
    assert call(run="run_interrupted")[::2] == (130, "moa-train: interrupted\n")


def test_help_names_the_options_and_runs_nothing(call):
    code, out, _, jobs = call("--help", help="Experiments: {experiment}. Kept: {prompt}\n")
    assert (code, out, jobs) == (0, "Experiments: ffhq_sd15, toy. Kept: {prompt}\n", [])


def test_cfg_job_prints_the_configuration_and_runs_nothing(call):
    code, out, _, jobs = call("--cfg", "job", "seed=3")
    assert (code, jobs) == (0, [])
    assert "seed: 3" in out


def test_a_group_runs_the_command_that_is_named(monkeypatch, capsys):
    seen = []
    main = command_group(
        "moa-data", help="Shards.\n", commands={"toy": lambda: seen.append(sys.argv[1:]), "pack": None}
    )
    monkeypatch.setattr(sys, "argv", ["moa-data", "toy", "n=1"])
    main()
    assert seen == [["n=1"]]
    monkeypatch.setattr(sys, "argv", ["moa-data", "pak"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (
        capsys.readouterr().err
        == 'moa-data: error: unknown command "pak": expected one of toy, pack; did you mean pack?\n'
    )


def test_help_imports_neither_hydra_nor_torch(configs):
    script = (
        "import sys, pathlib; configs = pathlib.Path(sys.argv[1]); sys.argv[1:] = ['--help']\n"
        "from moa_train.cli.command import command\n"
        "command('train', help='What it does.', run='no:no', folder=configs)()\n"
        "assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules), 'slow imports'"
    )
    done = subprocess.run([sys.executable, "-c", script, str(configs)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "What it does.\n", "")
