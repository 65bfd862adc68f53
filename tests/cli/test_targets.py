"""What a configuration may build: refused by name, in one line, before anything of it is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moa_train.cli.paths import config_dir
from moa_train.cli.schema import ArgumentError
from moa_train.cli.targets import MORE, refuse_foreign_targets

ALLOWED = [
    "torch.optim.SGD",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.callbacks.DeviceStatsMonitor",
    "pytorch_lightning.plugins.environments.SLURMEnvironment",
    "moa_train.training.callbacks.ema.ExponentialMovingAverage",
    "moa_train.conditioning.encoders.build_image_encoder",
]

FOREIGN = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "hydra.utils.get_method",
    "torch.load",
    "torch.optim.adam.os.system",
    "torch.hub.load",
    "pytorch_lightning.strategies.launchers.subprocess_script.subprocess.Popen",
    "moa_train.checkpoint.os.system",  # reached through what a module of ours imports
    "moa_train.checkpoint.Path",
    "moa_train.cli.command.import_module",
    "moa_train.cli.train.run",
    "moa_train.data.sources.own.load_source",
    "moa_train.nowhere.Nothing",
    "moa_train.training.optim.Nothing",
    "moa_train",
    "moa_trainer.Evil",
    "",
]


@pytest.mark.parametrize("target", ALLOWED)
def test_own_classes_and_those_of_the_libraries_are_taken(target):
    refuse_foreign_targets(OmegaConf.create({"a": {"b": [{"_target_": target}]}}))


@pytest.mark.parametrize("target", FOREIGN)
def test_everything_else_is_refused_with_its_key(target):
    with pytest.raises(ArgumentError, match=r"^a\.b\.0\._target_=.* is refused"):
        refuse_foreign_targets(OmegaConf.create({"a": {"b": [{"_target_": target}]}}))


HIDDEN = {
    "an interpolation": {"name": "os.system", "a": {"_target_": "${name}"}},
    "a resolver": {"a": "${oc.create:{_target_:os.system}}"},
    "nested arguments": {"a": {"_target_": "torch.optim.SGD", "params": {"x": {"_target_": "os.system"}}}},
    "logging": {"hydra": {"job_logging": {"handlers": {"x": {"()": "os.system"}}}}},
    "a class for logging": {"hydra": {"job_logging": {"handlers": {"x": {"class": "subprocess.Popen"}}}}},
    "a launcher": {"hydra": {"launcher": {"_target_": "os.system"}}},
    "a plugin that is none": {"hydra": {"sweeper": {"_target_": "moa_train.checkpoint.os.system"}}},
}


@pytest.mark.parametrize("place", HIDDEN)
def test_a_target_is_found_where_it_hides(place):
    with pytest.raises(ArgumentError, match="is refused"):
        refuse_foreign_targets(OmegaConf.create(HIDDEN[place]))


@pytest.mark.parametrize("path", sorted(config_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_package_is_allowed(path):
    launchers = ["basic", "joblib"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for launcher in launchers:
            refuse_foreign_targets(compose(path.stem, [f"hydra/launcher={launcher}"], return_hydra_config=True))


def test_a_package_of_the_users_own_is_allowed_by_the_environment_alone(monkeypatch):
    cfg = OmegaConf.create({"_target_": "my_package.optim.Lion"})
    with pytest.raises(ArgumentError, match=MORE):
        refuse_foreign_targets(cfg)
    monkeypatch.setenv(MORE, "other, my_package")
    refuse_foreign_targets(cfg)
    with pytest.raises(ArgumentError):
        refuse_foreign_targets(OmegaConf.create({"_target_": "my_package_2.optim.Lion"}))


EVIL = "from pathlib import Path\nPath('it_ran').touch()\ndef build(*a, **k):\n    Path('it_ran').touch()\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.optimizer._target_=evil.build"],
        ["+callbacks.mine={_target_: evil.build}"],
        ["hydra.launcher._target_=evil.build"],
        ["-m", "optim.optimizer._target_=evil.build,torch.optim.SGD"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_the_command_refuses_in_one_line_and_imports_nothing(tmp_path, arguments):
    (tmp_path / "evil.py").write_text(EVIL)
    code = "import sys; sys.path.insert(0, '.')\nfrom moa_train.cli.train import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "_target_=evil.build is refused" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"evil.py"}


def test_a_later_job_of_a_sweep_is_judged_before_it_builds(tmp_path, monkeypatch):
    from moa_train.cli.train import _build

    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = OmegaConf.create({"optim": {"optimizer": {"_target_": "evil.build"}}})
    with pytest.raises(ArgumentError, match=r"optim\.optimizer\._target_=evil\.build is refused"):
        _build(cfg.optim)
    assert not Path("it_ran").exists()
