"""ZeRO by DeepSpeed: the optimizer's part of the memory split over the ranks, the files those of one process.

DeepSpeed's engine reduces gradients, clips them and takes the steps. What this project promises about a step (none on
numbers that are not finite, float32 weights, one file that any number of ranks goes on with) is kept around it.
"""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, Precision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

ZERO_BUCKET = 50_000_000
"""Numbers in a bucket of gradients or weights that travels."""

_AUTOCAST = "bf16-mixed"


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed, stages 1 and 2, on CPUs, too, with the checkpoints of one process.

    Weights and their average are whole on every rank; moments, a second copy of what trains and (stage 2) gradients
    are split.
    """

    restore_checkpoint_after_setup = False  # as one process: weights, then the callbacks' states, then the optimizer
    lightning_restore_optimizer = True
    handles_gradient_accumulation = False  # Lightning tells when the gradients are complete: `block_backward_sync`

    # -------------------------------------------------------------------------------------------------------- set-up
    def setup_environment(self) -> None:
        """The processes of DDP; Lightning's own refuses CPUs."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """DDP's group of processes, which DeepSpeed then uses."""
        import deepspeed

        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
        DDPStrategy.setup_distributed(self)
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # DeepSpeed wants it; srun does not set it
        if self.root_device.type == "cpu":  # else it compiles this with a C++ compiler, for collectives not used here
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)

    @property
    def precision_plugin(self) -> Precision:
        """Autocast around float32 weights, whatever Lightning chose for the name of the precision."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        chosen = None if plugin is None else FullWeights(str(plugin.precision))
        DeepSpeedStrategy.precision_plugin.fset(self, chosen)  # type: ignore[attr-defined]

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        if isinstance(self.precision_plugin, FullWeights) and self.precision_plugin.autocast:
            # DeepSpeed ends an autocast that it does not know of; gradients travel in float32 all the same
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """The engine and its optimizer; Lightning's gives the device of a CPU no number."""
        import deepspeed

        engine, stepping, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[each for each in model.parameters() if each.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        engine.set_gradient_accumulation_boundary(True)
        return engine, stepping

    # --------------------------------------------------------------------------------------------------------- steps
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, gradients are added up and no step follows."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def gradient_norm(self) -> Float[Tensor, ""]:
        """Norm over all trained parameters, of the mean gradient over the ranks, before it is clipped."""
        parts = [part for group in self._zero.averaged_gradients.values() for part in group]
        squared = torch.nn.utils.get_total_norm(parts) ** 2
        torch.distributed.all_reduce(squared)
        return squared.sqrt()

    def shares(self) -> tuple[int, int]:
        """Bytes of the weights that this rank steps, and of all that train."""
        mine = sum(flat.numel() * flat.element_size() for *_, flat in self._groups())
        return mine, sum(each.numel() * each.element_size() for _, members, _ in self._groups() for each in members)

    def leave_out(self) -> None:
        """Forgets the gradients, so that the step that follows is not taken."""
        self._zero.zero_grad(set_to_none=True)
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    # --------------------------------------------------------------------------------------------------- checkpoints
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, by the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the whole file, to the CPU."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """The module takes it before the engine is made."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Torch's own state of the optimizer, of whole tensors, on the CPU of the first rank; empty on the others."""
        inner = self._zero.optimizer
        groups, states, number = [], {}, 0
        for group, members, flat in self._groups():
            groups.append({**group, "params": list(range(number, number + len(members)))})
            for parameter in members:
                if kept := inner.state.get(flat):
                    every = {name: _gathered(value, flat, parameter) for name, value in kept.items()}
                    states[number] = every if self.is_global_zero else {}
                number += 1
        return {"state": states, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every rank takes its part of what the optimizer keeps for each parameter."""
        (saved,) = checkpoint["optimizer_states"]
        groups, states, number = [], [], 0
        for place, (_, members, flat) in enumerate(self._groups()):
            groups.append({**saved["param_groups"][place], "params": [place]})
            mine: dict[str, Tensor] = {}
            for parameter in members:
                for name, value in saved["state"].get(number, {}).items():
                    if value.shape == parameter.shape:
                        whole = mine.setdefault(name, torch.zeros_like(flat, device="cpu"))
                        _copy_part(parameter, whole=value, flat=whole, gathers=False)
                    else:  # the number of steps
                        mine[name] = value
                number += 1
            states.append(mine)
        self._zero.optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around torch's."""
        return self.optimizers[0]

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter], Tensor]]:
        """For each group of parameters: its settings, its members, and what this rank steps of all of them, flat."""
        zero = self._zero
        settings = zero.optimizer.state_dict()["param_groups"]
        yield from zip(settings, zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)


class FullWeights(DeepSpeedPrecision):
    """Weights, gradients and moments in float32, as with Lightning's other strategies; bf16-mixed is torch's autocast.

    DeepSpeed's own mixed precision would leave bfloat16 weights to the average, the checkpoints and the pictures.
    """

    def __init__(self, precision: str) -> None:
        if precision not in ("32-true", _AUTOCAST):
            raise ValueError(f"trainer.precision={precision} with trainer=deepspeed: expected 32-true or {_AUTOCAST}")
        super().__init__("32-true")
        self.autocast = precision == _AUTOCAST

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(_device(), torch.bfloat16) if self.autocast else nullcontext()

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Nothing: the engine itself computes as `ZeroStrategy` tells it."""
        yield

    val_step_context = train_step_context

    def convert_module(self, module: nn.Module) -> nn.Module:
        """As it is: a frozen prior may be bfloat16."""
        return module

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Through the engine; Lightning has divided the loss by the number of micro-batches."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """A step of the engine, unless the gradients are gone once everybody has seen them."""
        loss = closure()
        self._after_closure(model, optimizer)
        if all(part is not None for part in optimizer.averaged_gradients.values()):
            engine: Any = model.trainer.model
            engine.step(**kwargs)
        return loss


def _gathered(value: Tensor, flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """What is kept of `parameter`, out of the ranks' parts of it all, on the CPU; the number of steps as it is."""
    if value.shape != flat.shape:
        return value.cpu().clone()
    whole = torch.zeros_like(parameter, requires_grad=False)
    _copy_part(parameter, whole, value, gathers=True)
    torch.distributed.all_reduce(whole)
    return whole.cpu()


def _copy_part(parameter: nn.Parameter, whole: Tensor, flat: Tensor, gathers: bool) -> None:
    """Copies this rank's part of `parameter`, if it has one, from `flat` into `whole` (gathers), or back."""
    part = parameter._hp_mapping  # type: ignore[attr-defined]
    if part is None:
        return
    pieces = [
        tensor.view(-1).narrow(0, address.start, address.numel)
        for tensor, address in ((whole, part.lp_fragment_address), (flat, part.hp_fragment_address))
    ]
    target, source = pieces if gathers else reversed(pieces)
    target.copy_(source)


def _device() -> str:
    from deepspeed.accelerator import get_accelerator

    name: str = get_accelerator().device_name()
    return name
