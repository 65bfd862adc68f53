"""Feeds Lightning: training and validation batches, and the position in the data as part of every checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from moa_train.data.sequential import expand_shards, resume_shard, sequential_batches
from moa_train.data.shards import ShardIndex
from moa_train.data.stages import Pipeline, collate
from moa_train.data.stream import (
    STATE_VERSION,
    BadSampleGuard,
    ExactStream,
    GlobalBatchSampler,
    StreamOrder,
    StreamState,
    ValidationSampler,
    refuse_changed_state,
)

STREAMS = ("exact", "sequential")


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning takes as resumable. The position is the DataModule's; the loader itself has no state."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the batch sampler was built to begin at the position."""


class MoADataModule(pl.LightningDataModule):
    """Shards -> `Batch`, in an order that seed and step alone decide. Use `Trainer(use_distributed_sampler=False)`.

    The global batch is `batch_size` x ranks x accumulation. A resume on other ranks must keep it, and then sees the
    same samples at every step. There are no epochs: the trainer's `max_steps` ends the run.

    Args:
        train, validation: folders of one split each (or URLs); with `stream="sequential"`, `train` may be a glob or
            brace list of shards. `validation` None: no validation.
        tokenizer: the prior's CLIP tokenizer.
        resolution: side of the pictures, pixels.
        subject_size: side of a subject's picture, pixels: the image encoder's input.
        batch_size: samples of a micro-batch on one rank.
        max_subjects: subject slots.
        stream: "exact" or "sequential" (`moa_train.data.stream`, `.sequential`).
        seed: order and all random numbers of the samples.
        window: shards in use at once (exact).
        shuffle_buffer: samples among which the next is drawn (sequential).
        shard_samples: about how many samples a shard holds (sequential; a resume counts shards by it).
        num_workers, prefetch_factor: processes that prepare batches, and batches each prepares ahead.
        crop, flip_probability, unconditional_probability, keep_probability, augment_subject, background, latents:
            see `moa_train.data.stages.Pipeline`.
        on_bad_sample: "raise", or "skip": replace it.
        max_bad_fraction: of the samples read, before skipping stops the run.
        cache: local folder for remote shards.

    Raises:
        ValueError: a value outside its domain.
    """

    def __init__(
        self,
        train: str | Path,
        validation: str | Path | None,
        tokenizer: Any,
        resolution: int,
        subject_size: int,
        batch_size: int,
        max_subjects: int = 4,
        stream: str = "exact",
        seed: int = 0,
        window: int = 16,
        shuffle_buffer: int = 1000,
        shard_samples: int | None = None,
        num_workers: int = 2,
        prefetch_factor: int = 2,
        crop: str = "centre",
        flip_probability: float = 0.5,
        unconditional_probability: float = 0.1,
        keep_probability: float = 0.9,
        augment_subject: bool = False,
        background: str = "noise",
        latents: bool = False,
        on_bad_sample: str = "raise",
        max_bad_fraction: float = 0.01,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        if stream not in STREAMS:
            raise ValueError(f"stream is {stream!r}; expected one of {', '.join(STREAMS)}")
        if stream == "sequential" and not shard_samples:
            raise ValueError("stream=sequential needs shard_samples, about how many samples a shard holds")
        self.train, self.validation, self.cache = train, validation, cache
        self.pipeline = Pipeline(
            tokenizer=tokenizer,
            resolution=resolution,
            subject_size=subject_size,
            max_subjects=max_subjects,
            crop=crop,
            flip_probability=flip_probability,
            unconditional_probability=unconditional_probability,
            keep_probability=keep_probability,
            augment_subject=augment_subject,
            background=background,
            latents=latents,
        )
        self.batch_size, self.seed, self.stream, self.window = batch_size, seed, stream, window
        self.shuffle_buffer, self.shard_samples = shuffle_buffer, shard_samples or 0
        self.on_bad_sample, self.max_bad_fraction = on_bad_sample, max_bad_fraction
        self._guard()  # refuses a wrong policy now, not in a worker
        self._loading: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        if num_workers:
            self._loading["prefetch_factor"] = prefetch_factor
        self._index: ShardIndex | None = None
        self._resumed: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------------- loaders
    def train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank, from the position on that was loaded.

        Raises:
            ValueError: what decides the order has changed since the checkpoint; the message names it.
        """
        step = self._start_step()
        if self.stream == "sequential":
            return self._sequential_loader(step)
        order, index = self._order(), self._train_index()
        stream = ExactStream(index, self.pipeline, self.seed, self._guard(), self.window)
        sampler = GlobalBatchSampler(order, self._rank, self._world, self._accumulate, step)
        return self._loader(stream, batch_sampler=sampler, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation split in stored order, without any random choice."""
        if self.validation is None:
            return []
        index = ShardIndex.load(self.validation, self.cache)
        stream = ExactStream(index, self.pipeline.without_chance(), self.seed, self._guard(), self.window)
        sampler = ValidationSampler(len(index), self.batch_size, self._rank, self._world)
        return self._loader(stream, batch_sampler=sampler, collate_fn=collate)

    def _sequential_loader(self, step: int) -> DataLoader[Any]:
        batches = sequential_batches(
            expand_shards(str(self.train)),
            self.pipeline,
            self.batch_size,
            seed=self.seed,
            guard=self._guard(),
            shuffle_buffer=self.shuffle_buffer,
            start_shard=resume_shard(step, self._global_batch, self.shard_samples),
            rank=self._rank,
            world=self._world,
        )
        return self._loader(batches, batch_size=None)

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return ResumableLoader(dataset, pin_memory=on_gpu, **options, **self._loading)

    # -------------------------------------------------------------------------------------------------------- position
    def state_dict(self) -> dict[str, Any]:
        """The position, from what was processed: optimizer steps times the global batch."""
        return self._state(0 if self.trainer is None else self.trainer.global_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the loader, which begins there."""
        self._resumed = dict(state_dict)

    def _start_step(self) -> int:
        if self._resumed is None:
            return 0
        refuse_changed_state(self._resumed, self._state(0))
        if self.stream == "sequential":
            return int(self._resumed["samples_done"]) // self._global_batch
        return StreamState(**self._resumed).step(self._order())

    def _state(self, step: int) -> dict[str, Any]:
        if self.stream == "sequential":
            done = step * self._global_batch
            return asdict(
                StreamState(
                    STATE_VERSION, "sequential", 0, done, self._global_batch, self.seed, self.window, str(self.train)
                )
            )
        return asdict(StreamState.at(step, self._order(), self._train_index().hash))

    # ----------------------------------------------------------------------------------------------------------- parts
    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _accumulate(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self._world * self._accumulate

    def _order(self) -> StreamOrder:
        return StreamOrder(self._train_index().counts, self.seed, self.window, self._global_batch)

    def _train_index(self) -> ShardIndex:
        if self._index is None:
            self._index = ShardIndex.load(self.train, self.cache)
        return self._index

    def _guard(self) -> BadSampleGuard:
        return BadSampleGuard(self.on_bad_sample, self.max_bad_fraction)
