"""A tiny world to train in, and `moa-train` as a function."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import tiny
from moa_train.cli.paths import config_dir
from moa_train.cli.train import run


@dataclass(frozen=True)
class World:
    """Prior and shards on disk."""

    folder: Path

    def overrides(self, *more: str, experiment: str = "toy") -> list[str]:
        """Settings of a quick run on them: float32, no loader processes, no pictures, no validation."""
        return [
            f"experiment={experiment}",
            "trainer=cpu",
            "image_encoder=toy",
            f"prior.source={self.folder / 'prior'}",
            f"image_encoder.name={self.folder / 'prior' / 'image_encoder'}",
            f"data.train={self.folder / 'data' / 'train'}",
            f"data.validation={self.folder / 'data' / 'validation'}",
            f"data.resolution={tiny.RESOLUTION}",
            "data.batch_size=4",
            "data.num_workers=0",
            "data.max_subjects=2",
            "trainer.accumulate_grad_batches=1",
            "trainer.precision=32-true",
            "trainer.log_every_n_steps=1",
            "model.sinusoids=8",
            "gradient_checkpointing=false",
            "validate_every=null",
            "callbacks.samples=null",
            "callbacks.progress=null",
            *more,
        ]

    def config(self, *more: str, experiment: str = "toy"):
        """The composed configuration of such a run."""
        return self.compose(self.overrides(*more, experiment=experiment))

    @staticmethod
    def compose(overrides: list[str]):
        """The configuration that `moa-train` makes of these overrides."""
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("train", overrides)

    def train(self, run_dir: Path, *more: str, experiment: str = "toy") -> Path:
        """Runs `moa-train` in this process."""
        run(self.config(f"run_dir={run_dir}", *more, experiment=experiment))
        return run_dir


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_prior(folder / "prior")
    tiny.save_shards(folder / "data")
    return World(folder)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory) -> Path:
    """The folder of a run of 4 steps with everything switched on."""
    return world.train(
        tmp_path_factory.mktemp("finished") / "run",
        "max_steps=4",
        "validate_every=2",
        "callbacks.checkpoint.every_n_steps=1",
        "callbacks.checkpoint.keep=2",
        "callbacks.samples={_target_: moa_train.training.callbacks.samples.SamplePictures, _partial_: true, "
        "directory: ${run_dir}, every_n_steps: 2, number: 2, steps: 2, guidance: 2.0, seed: 0}",
    )
