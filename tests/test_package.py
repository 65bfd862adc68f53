"""The wheel holds everything that a user needs who never sees the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["moa-train", "moa-generate", "moa-eval", "moa-export", "moa-data", "moa-pretrain", "moa-controlnet"]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))

pytestmark = pytest.mark.slow


def _files(folder: str) -> set[str]:
    """The paths, relative to the repository, of the files in a folder."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of an environment with the wheel in it; the libraries come from the running one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    install = [sys.executable, "-m", "pip", f"--python={folder}", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True)
    libraries = sysconfig.get_path("purelib")
    # A plain line adds the libraries but not their .pth files, hence not this repository's editable installation.
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return folder / ("Scripts" if os.name == "nt" else "bin")


def _call(installed, command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([installed / command, *arguments], cwd=cwd, env=clean, capture_output=True, text=True)


def test_the_wheel_holds_configs_assets_and_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {f"moa_train/{name}" for name in _files("configs")}
    package = {name.removeprefix("src/") for name in _files("src/moa_train")}
    assert "moa_train/configs/train.yaml" in configs
    assert any(name.startswith("moa_train/assets/") for name in package)
    assert configs | package <= names
    assert "hydra_plugins/moa_train_optuna.py" in names  # where Hydra looks for hydra/sweeper=optuna
    assert not {name for name in names if name.startswith(("tests/", "scripts/"))}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_wheel_helps(installed, tmp_path, command):
    done = _call(installed, command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_outside_the_repository(installed, tmp_path, experiment):
    command = "moa-pretrain" if experiment == "toy_prior" else "moa-train"
    done = _call(installed, command, f"experiment={experiment}", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "debug: false" in done.stdout
    assert not list(tmp_path.iterdir())
