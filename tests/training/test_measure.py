"""A run that measures itself at its end."""

import json

import pytest
from omegaconf import OmegaConf

from moa_train.checkpoint import load_personalized
from moa_train.cli.schema import ArgumentError
from moa_train.cli.train import main

# diffusers' UniPC, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

QUICK = "evaluate={people:4,contexts:1,steps:1,split:validation}"


def test_a_run_exports_and_measures_what_it_trained(world, tmp_path, capsys, monkeypatch):
    """By the command itself, in which Hydra is at work already."""
    run = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["moa-train", *world.overrides("max_steps=1", QUICK, f"run_dir={run}")])
    main()
    assert load_personalized(run / "personalized.safetensors")[1]["step"] == 1
    numbers = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert (numbers["protocol"]["split"], numbers["n"]["people"]) == ("validation", 4)
    used = OmegaConf.load(run / "evaluation" / "eval.yaml")
    assert used.weights == str(run / "personalized.safetensors")
    assert used.prior.source == str(world.folder / "prior")
    assert "Is it the person of the photo?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("{peeple:4}", ArgumentError, "peeple"),
        ("{people:many}", ArgumentError, "expects an integer"),
        ("true", ArgumentError, "evaluate is True"),
        ("{people:2}", ValueError, "expected 4, 6"),
    ],
)
def test_a_mistake_in_its_settings_is_told_before_anything_is_trained(world, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        world.train(tmp_path / "run", "max_steps=1", f"evaluate={given}")
    assert not (tmp_path / "run").exists()
