"""Feeds Lightning: training and validation batches, and the position in the data as part of every checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from moa_train.data.guard import BadSampleGuard, Loaded, Notes, ReportedBatches, ReportedRows, as_it_is
from moa_train.data.mixture import Mixture
from moa_train.data.remote import Patience
from moa_train.data.sequential import expand_shards, resume_shard, sequential_batches
from moa_train.data.shards import ShardIndex
from moa_train.data.stages import Pipeline, collate
from moa_train.data.storage import Cache
from moa_train.data.stream import (
    STATE_VERSION,
    ExactStream,
    GlobalBatchSampler,
    StreamOrder,
    StreamState,
    ValidationSampler,
    refuse_changed_state,
)
from moa_train.data.views import check_views
from moa_train.symbols import Batch
from moa_train.training.callbacks.signals import ASKING

log = logging.getLogger(__name__)

STREAMS = ("exact", "sequential")


class ResumableLoader(DataLoader[Any]):
    """Batches, once a guard has seen what was noted with them.

    Lightning takes it as resumable. The position is the DataModule's; the loader itself has no state. Its processes
    leave signals to the run.
    """

    def __init__(self, dataset: Any, guard: BadSampleGuard, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=_leave_signals_to_the_run, **options)
        self.guard = guard

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        loaded: Loaded
        for loaded in super().__iter__():
            yield self.guard.take(loaded)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the batch sampler was built to begin at the position."""


def _leave_signals_to_the_run(worker: int) -> None:
    """In a loader's process: a signal to all processes of a job (SLURM, Ctrl-C) asks the run, which saves and ends it.

    The second SIGTERM ends the process: torch's own way to end one that hangs, repeated when the interpreter ends.
    """
    for signum in ASKING:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class MoADataModule(pl.LightningDataModule):
    """Shards -> `Batch`, in an order that seed and step alone decide. Use `Trainer(use_distributed_sampler=False)`.

    The global batch is `batch_size` x ranks x accumulation. A resume on other ranks must keep it, and then sees the
    same samples at every step. There are no epochs: the trainer's `max_steps` ends the run.

    Args:
        train: folder of one split, or its URL, or a list of them; with `stream="sequential"` also globs or brace lists
            of shards.
        validation: folder of one split, or its URL; None: no validation.
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
        crop, zoom, pad, hold_subjects, flip_probability, unconditional_probability, keep_probability, min_subject_area,
            augment_subject, augmentation, background, latents: see `moa_train.data.stages.Pipeline`.
        on_bad_sample: "raise", or "skip": replace it.
        max_bad_fraction: of the samples read, before skipping stops the run.
        weights: how many samples of each of several sets are drawn, relative to the others; None: as many as it has.
        cache, cache_gigabytes: local folder for remote shards, and its bound (10^9 bytes; None: no bound).
        fetch_tries, fetch_timeout: see `moa_train.data.remote.Patience`.

    Raises:
        ValueError: a value outside its domain.
    """

    def __init__(
        self,
        train: str | Path | Sequence[str | Path],
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
        cache_gigabytes: float | None = 100.0,
        fetch_tries: int = 5,
        fetch_timeout: float = 60.0,
        weights: Sequence[float | int] | None = None,
        zoom: Sequence[float] = (1.0, 1.0),
        pad: str = "none",
        hold_subjects: bool = False,
        min_subject_area: float = 0.0,
        augmentation: str = "light",
    ) -> None:
        super().__init__()
        if latents and stream != "exact":
            raise ValueError("data.latents=true needs stream=exact: the index tells which VAE made the latents")
        if stream not in STREAMS:
            raise ValueError(f"stream is {stream!r}; expected one of {', '.join(STREAMS)}")
        if stream == "sequential" and not shard_samples:
            raise ValueError("stream=sequential needs shard_samples, about how many samples a shard holds")
        self.train = [train] if isinstance(train, (str, Path)) else list(train)
        if stream == "sequential" and weights is not None:
            raise ValueError("data.weights needs stream=exact: the sequential stream takes shards as they come")
        self.weights, self.validation = weights, validation
        self.cache = Cache.at(cache, cache_gigabytes, Patience(fetch_tries, fetch_timeout))
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
            zoom=tuple(zoom),
            pad=pad,
            hold_subjects=hold_subjects,
            min_subject_area=min_subject_area,
            augmentation=augmentation,
        )
        self.batch_size, self.seed, self.stream, self.window = batch_size, seed, stream, window
        self.shuffle_buffer, self.shard_samples = shuffle_buffer, shard_samples or 0
        self.on_bad_sample, self.max_bad_fraction = on_bad_sample, max_bad_fraction
        self._notes()  # refuses a wrong policy now, not in a worker
        self._train_guard = BadSampleGuard(max_bad_fraction)
        self._loading: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        if num_workers:
            self._loading["prefetch_factor"] = prefetch_factor
        self._sets: Mixture | None = None
        self._resumed: dict[str, Any] | None = None

    def check_latents(self, vae: str) -> None:
        """Refuse, where latents are asked for, those of another VAE (its hash is given) or of other settings.

        Raises:
            ValueError: names the set and what differs.
        """
        if not self.pipeline.latents:
            return
        wanted = {name: getattr(self.pipeline, name) for name in ("resolution", "crop", "pad", "hold_subjects")}
        wanted["zoom"] = list(self.pipeline.zoom)
        for index in self._train_sets().indexes:
            check_views(index, vae, wanted, self.pipeline.flip_probability > 0)
        if self.validation is not None:
            for name in ("crop", "zoom"):
                del wanted[name]
            check_views(ShardIndex.load(self.validation, self.cache), vae, wanted, False)

    def train_samples(self) -> int | None:
        """Samples of the train sets; None where the stream is sequential and has no index."""
        return len(self._train_sets()) if self.stream == "exact" else None

    def validation_samples(self) -> int | None:
        """Samples of the validation split; None where there is none."""
        return None if self.validation is None else len(Mixture([ShardIndex.load(self.validation, self.cache)]))

    # ------------------------------------------------------------------------------------------------------- loaders
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bytes cross to the device, floats are made there."""
        return batch.unpacked()

    def train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank, from the position on that was loaded.

        Raises:
            ValueError: what decides the order has changed since the checkpoint; the message names it.
        """
        step = self._start_step()
        if self.stream == "sequential":
            return self._sequential_loader(step)
        sampler = GlobalBatchSampler(self._order(), self._rank, self._world, self._accumulate, step)
        return self._rows_loader(self._train_sets(), self.pipeline, sampler, self._train_guard)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation split in stored order, without any random choice."""
        if self.validation is None:
            return []
        sets = Mixture([ShardIndex.load(self.validation, self.cache)])
        sampler = ValidationSampler(len(sets), self.batch_size, self._rank, self._world)
        return self._rows_loader(sets, self.pipeline.without_chance(), sampler, BadSampleGuard(self.max_bad_fraction))

    def micro_batches(self, step: int, rank: int, world: int, accumulate: int) -> list[Batch]:
        """What one of `world` ranks computes on at an optimizer step, counted from 1.

        Raises:
            ValueError: the stream is sequential, which no sample can be looked up in.
        """
        if self.stream != "exact":
            raise ValueError("data.stream=sequential reads shards as they come: a step's samples cannot be read again")
        sets = self._train_sets()
        order = StreamOrder(sets.counts, sets.shares, self.seed, self.window, self.batch_size * world * accumulate)
        rows = ExactStream(sets, self.pipeline, self.seed, self._notes(), self.window)
        addresses = islice(GlobalBatchSampler(order, rank, world, accumulate, step - 1), accumulate)
        return [collate([rows[address] for address in micro]).unpacked() for micro in addresses]

    def _rows_loader(self, sets: Mixture, pipeline: Pipeline, sampler: Any, guard: BadSampleGuard) -> DataLoader[Any]:
        notes = self._notes()
        rows = ReportedRows(ExactStream(sets, pipeline, self.seed, notes, self.window), notes)
        return self._loader(rows, guard, batch_sampler=sampler, collate_fn=as_it_is)

    def _sequential_loader(self, step: int) -> DataLoader[Any]:
        notes = self._notes()
        batches = sequential_batches(
            [shard for pattern in self.train for shard in expand_shards(str(pattern))],
            self.pipeline,
            self.batch_size,
            seed=self.seed,
            notes=notes,
            shuffle_buffer=self.shuffle_buffer,
            start_shard=resume_shard(step, self._global_batch, self.shard_samples),
            rank=self._rank,
            world=self._world,
        )
        return self._loader(ReportedBatches(batches, notes), self._train_guard, batch_size=None)

    def _loader(self, dataset: Any, guard: BadSampleGuard, **options: Any) -> DataLoader[Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return ResumableLoader(dataset, guard, pin_memory=on_gpu, **options, **self._loading)

    def teardown(self, stage: str) -> None:
        """Say how many samples were bad."""
        guard = self._train_guard
        if guard.bad:
            log.warning("%d of %d samples read were bad and skipped", guard.bad, guard.read)

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
        if self.stream == "exact":
            return asdict(StreamState.at(step, self._order(), self._train_sets().hash))
        told = " ".join(map(str, self.train))
        done = step * self._global_batch
        return asdict(
            StreamState(STATE_VERSION, "sequential", 0, done, self._global_batch, self.seed, self.window, told)
        )

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
        sets = self._train_sets()
        return StreamOrder(sets.counts, sets.shares, self.seed, self.window, self._global_batch)

    def _train_sets(self) -> Mixture:
        if self._sets is None:
            indexes = [ShardIndex.load(folder, self.cache) for folder in self.train]
            self._sets = Mixture(indexes, self.weights)
            refuse_small_cache(self.cache, indexes, self.window)
        return self._sets

    def _notes(self) -> Notes:
        return Notes(self.on_bad_sample)


def refuse_small_cache(cache: Cache, indexes: Sequence[ShardIndex], window: int) -> None:
    """Refuse a cache that cannot hold the remote shards in use at once: each would be fetched again and again.

    Raises:
        ValueError: says how much is needed.
    """
    remote = [index for index in indexes if index.storage.remote]
    largest = (sorted((shard.bytes for shard in index.shards), reverse=True)[:window] for index in remote)
    needed = sum(map(sum, largest)) / 1e9
    if cache.gigabytes is not None and cache.gigabytes < needed:
        raise ValueError(
            f"data.cache_gigabytes is {cache.gigabytes:g}, but data.window={window} keeps up to {needed:.3g} GB of "
            "shards in use: give a larger cache or a smaller window"
        )
