"""The Lightning module: glue between batch, denoiser, objective and optimizer; no mathematics of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moa_train.diffusion import LATENT, NOISE, NoiseSchedule, keyed_noise, keyed_timesteps
from moa_train.latents import LatentCodec
from moa_train.symbols import Batch, Conditioning, LossTerms, Observations
from moa_train.training.objective import LossSettings, Masks, compute_losses, watched, with_wrong_subject
from moa_train.training.optim import NamedParameters, OptimizerSettings
from moa_train.training.split import part_like, split_weights

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Noised:
    """z_t, t and the regression target of a batch, all drawn from the samples' keys."""

    noisy: Float[Tensor, "b c h w"]
    timesteps: Int[Tensor, " b"]
    target: Float[Tensor, "b c h w"]


class MoAModule(pl.LightningModule):
    """Trains what is trainable in `denoiser` (and `image_encoder`); everything else is frozen and never saved.

    Args:
        denoiser: (z_t, t, Conditioning) -> (prediction, Observations); holds the U-Net with its MoA layers.
        text_encoder: token ids -> C_prior. Frozen.
        image_encoder: subject pictures -> f. Frozen but for the layers it was built to train.
        codec: the VAE as pictures <-> latents. Frozen.
        schedule: the diffusion process that the prior was trained with.
        trained: the parameters to train, by group of learning rate.
        loss: weights of the objective.
        optimizer: how the trained parameters are stepped.
        max_steps: optimizer steps of the whole run; the router loss's warm-up is a fraction of it.
        prior: identity of the frozen prior; a checkpoint of another prior is refused.
        provenance: plain values kept in every checkpoint (configuration, seed), for the export.
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        image_encoder: nn.Module,
        codec: LatentCodec,
        schedule: NoiseSchedule,
        trained: NamedParameters,
        loss: LossSettings,
        optimizer: OptimizerSettings,
        max_steps: int,
        prior: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.codec = codec
        self.schedule = schedule
        self.loss = loss
        self.optimizer_settings = optimizer
        self.max_steps = max_steps
        self.prior = dict(prior)
        self.provenance = dict(provenance or {})
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        self._groups = {group: [names[id(each)] for _, each in given] for group, given in trained.items() if given}
        chosen = {name for group in self._groups.values() for name in group}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in chosen)
        if not chosen:
            raise ValueError("there is nothing to train: the model gave no trained parameters")
        self.train()

    # ------------------------------------------------------------------------------------------------------- frozen
    def train(self, mode: bool = True) -> MoAModule:
        """Switches what trains; a module whose parameters are all frozen stays in evaluation mode."""
        _set_mode(self, mode)
        return self

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in this module's state."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def trained_names(self) -> set[str]:
        """Names of the saved tensors: trained parameters, and buffers of modules in which every parameter trains."""
        names = set(self.trained_parameters())
        for name, _ in self.named_buffers():
            owner = self.get_submodule(name.rpartition(".")[0])
            parameters = list(owner.parameters())
            if parameters and all(parameter.requires_grad for parameter in parameters):
                names.add(name)
        return names

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Stores the frozen weights in `dtype`; what trains stays in float32."""
        for parameter in self.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained tensors alone; the prior is never saved."""
        kept = self.trained_names()
        prefix = kwargs.get("prefix", "")
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name.removeprefix(prefix) in kept}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads exactly the trained tensors.

        Raises:
            ValueError: the state lacks a trained tensor, or holds one that does not train here or has another shape.
        """
        own = self.state_dict()
        check_tensors(state_dict, own)
        given = {name: part_like(value, own[name]) for name, value in state_dict.items()}
        return super().load_state_dict(given, strict=False, assign=assign)

    def configure_model(self) -> None:
        """Splits U-Net and trained image encoder blocks over the ranks where the strategy has a mesh for that."""
        if self.device_mesh is not None:
            denoiser: Any = self.denoiser
            encoder: Any = self.image_encoder
            split_weights(denoiser.unet, encoder.trained_blocks(), self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        self.schedule = self.schedule.to(self.device)

    # ------------------------------------------------------------------------------------------------------ forward
    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the batch; keys and sample ids stay on the CPU, where the numbers drawn from them are made."""
        return replace(batch.to(device), key=batch.key, sample=batch.sample)

    @torch.no_grad()
    def noised(self, batch: Batch) -> Noised:
        """z_t and its target for t and epsilon that are functions of the samples' keys."""
        latents = self._latents(batch).float()
        noise = _send(keyed_noise(batch.key, latents.shape[1:], NOISE), latents.device)
        timesteps = _send(keyed_timesteps(batch.key, self.schedule.steps), latents.device)
        return Noised(
            self.schedule.add_noise(latents, noise, timesteps),
            timesteps,
            self.schedule.target(latents, noise, timesteps),
        )

    def _latents(self, batch: Batch) -> Float[Tensor, "b c h w"]:
        moments = batch.latents
        if moments is None:
            assert batch.pixels is not None
            self.codec.latent_shape(batch.pixels.shape[-2], batch.pixels.shape[-1])
            moments = self.codec.moments(batch.pixels)
        noise = _send(keyed_noise(batch.key, moments.shape[2:], LATENT), moments.device)
        return self.codec.sample(moments, noise)

    def conditioning(self, batch: Batch) -> Conditioning:
        """C_prior and the subjects' features of a batch."""
        with torch.no_grad():
            prior_tokens = self.text_encoder(batch.token_ids)
        features = self.image_encoder(batch.subject_pixels, batch.subject_present)
        return Conditioning(prior_tokens, features, batch.subject_positions, batch.subject_present)

    def losses(
        self, batch: Batch, noised: Noised, conditioning: Conditioning, masks: Masks, settings: LossSettings
    ) -> tuple[LossTerms, Observations]:
        """One pass of the denoiser and its per-sample losses."""
        prediction, observations = self.denoiser(noised.noisy, noised.timesteps, conditioning)
        terms = compute_losses(
            settings, self.schedule, batch, masks, noised.timesteps, prediction, noised.target, observations
        )
        return terms, observations

    # ----------------------------------------------------------------------------------------------------- training
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        noised = self.noised(batch)
        masks = Masks.of(batch, (noised.noisy.shape[-2], noised.noisy.shape[-1]))
        progress = self.trainer.global_step / self.max_steps
        terms, observations = self.losses(batch, noised, self.conditioning(batch), masks, self.loss.at(progress))
        per_sample = self.loss.weighted(terms, progress)
        total = per_sample.mean()
        shown = {name: mean for name, (mean, _) in watched(observations, batch, masks).items()}
        subjects = batch.subject_present.any(dim=1)
        shown["masked"] = terms.masked.detach().sum() / subjects.sum().clamp_min(1)
        shown |= {
            "loss": total.detach(),
            "router": terms.router.detach().mean(),
            "object": terms.object.detach().mean(),
        }
        self.log_dict({f"train/{name}": value for name, value in shown.items()}, batch_size=len(batch.key))
        self.log("train/router_weight", self.loss.router.weight_at(progress), batch_size=len(batch.key))
        self.log("step", float(self.trainer.global_step + 1), batch_size=len(batch.key))  # what loggers count by
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(batch.key))
        return {"loss": total, "per_sample": per_sample.detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses and the identity gap: masked loss with the next sample's subject minus with the right one."""
        settings = replace(self.loss, mask_probability=1.0, min_snr_gamma=None)
        noised, conditioning = self.noised(batch), self.conditioning(batch)
        masks = Masks.of(batch, (noised.noisy.shape[-2], noised.noisy.shape[-1]))
        terms, observations = self.losses(batch, noised, conditioning, masks, settings)
        swapped = with_wrong_subject(conditioning.image_features, batch.subject_present)
        wrong, _ = self.losses(batch, noised, replace(conditioning, image_features=swapped), masks, settings)
        has_subject = batch.subject_present.any(dim=1)
        number = has_subject.sum()
        shown = watched(observations, batch, masks)
        shown["router"] = (terms.router.mean(), torch.tensor(has_subject.numel()))
        for name, value in (
            ("masked", terms.masked),
            ("masked_wrong_subject", wrong.masked),
            ("identity_gap", wrong.masked - terms.masked),
            ("object", terms.object),
        ):
            shown[name] = ((value * has_subject).sum() / number.clamp_min(1), number)
        for name, (mean, count) in shown.items():  # means over the validation samples that count, on all ranks
            self.log(f"val/{name}", mean, on_step=False, on_epoch=True, batch_size=int(count), sync_dist=True)
        self.log("step", float(self.trainer.global_step), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # clips, too: not fused
        own = self.trained_parameters()  # asked for here, since a strategy that splits them puts others in their place
        trained = {group: [(name, own[name]) for name in names] for group, names in self._groups.items()}
        optimizer, schedule = self.optimizer_settings.build(trained, self.device.type == "cuda" and not scales)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------- checkpoints
    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the run in plain values; empty where nobody gave one."""
        return dict(self.provenance.get("config", {}))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["moa_train"] = {
            "version": CHECKPOINT_VERSION,
            "prior": self.prior,
            "max_steps": self.max_steps,
            **self.provenance,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another prior; tells Lightning's counters how many micro-batches this set-up makes.

        Raises:
            ValueError: not a checkpoint of this project, or one that was trained on another prior.
        """
        check_prior(checkpoint, self.prior)
        self._tell_other_length(checkpoint["moa_train"]["max_steps"], checkpoint["global_step"])
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counter in (progress["total"], progress["current"]):
            saved_mid_hook = counter["completed"] < counter["processed"]
            counter.update(dict.fromkeys(("ready", "started", "processed"), done))
            counter["completed"] = done - 1 if saved_mid_hook else done

    def _tell_other_length(self, before: int, step: int) -> None:
        fractions = (self.loss.router.warmup, self.loss.router.ramp, self.loss.mask_warmup)
        if before != self.max_steps and any(fractions):
            logger.warning(
                "max_steps was %d, is %d: the warm-ups of router loss and mask and the ramp are fractions of it "
                "and move; the router loss's weight goes on with %g",
                before,
                self.max_steps,
                self.loss.router.weight_at(step / self.max_steps),
            )


def _send(drawn: Tensor, device: torch.device) -> Tensor:
    """Moves numbers drawn on the CPU without making it wait for the accelerator."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def check_format(checkpoint: Any) -> None:
    """Raises ValueError unless `checkpoint` is of this project and of the format that this version reads."""
    found = checkpoint.get("moa_train") if isinstance(checkpoint, Mapping) else None
    if not isinstance(found, Mapping) or found.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"not a checkpoint of moa-train that this version reads (expected format {CHECKPOINT_VERSION}, "
            f"found {found.get('version') if isinstance(found, Mapping) else 'none'})"
        )


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the saved tensors have exactly the expected names and shapes."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    reshaped = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    if missing or unknown or reshaped:
        raise ValueError(
            f"the checkpoint does not fit this model: it lacks {len(missing)} trained tensors {missing[:2]}, holds "
            f"{len(unknown)} unknown ones {unknown[:2]} and {len(reshaped)} of another shape {reshaped[:2]}; train "
            "with the model= and image_encoder= of that run"
        )


def check_prior(checkpoint: Mapping[str, Any], prior: Mapping[str, Any]) -> None:
    """Raises ValueError unless `checkpoint` was trained on the prior whose identity is given."""
    check_format(checkpoint)
    found = checkpoint["moa_train"]
    different = sorted(key for key in {*found["prior"], *prior} if found["prior"].get(key) != prior.get(key))
    if [key for key in different if key != "name"]:
        raise ValueError(
            f"the checkpoint was trained on the prior {found['prior'].get('name')!r}, this run has "
            f"{prior.get('name')!r} (they differ in {', '.join(different)}): resume with the same prior=, or start anew"
        )


def _set_mode(module: nn.Module, mode: bool) -> None:
    """`module.train(mode)`, except that a subtree whose parameters are all frozen is put into evaluation mode."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = mode
    for child in module.children():
        _set_mode(child, mode)
