"""The train step on DeepSpeed's engine.

Only this module and pipeline_engine.py import deepspeed."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitscale.config import Config, check_world_size, moments_of, packs_codes
from bitscale.data.batches import EvaluationBatch, MicroBatch
from bitscale.engine import fragments as fragment_views
from bitscale.engine.ds_config import deepspeed_config
from bitscale.engine.fragments import Fragment, is_counted_here
from bitscale.engine.mpu import ModelParallelUnit
from bitscale.engine.optimizers import AdamW, make_optimizer
from bitscale.engine.own_time import OwnClock, OwnTime, layers_with_parameters
from bitscale.engine.ternary_gather import TernaryGather
from bitscale.engine.ternary_zero3 import TernaryZero3
from bitscale.errors import ConfigError
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import bit_linears, forget_weights, prepare_weights, set_kernels
from bitscale.model.collectives import shard_of, whole_parameter
from bitscale.optim import decayed_and_not


class StepResult(NamedTuple):
    loss: Tensor  # fp32 scalar: mean over this rank's sequences, not yet over ranks
    grad_norm: Tensor  # scalar: global norm before clipping, the same on every rank
    own_time: OwnTime


class TrainEngine:
    """One model and its optimizer under DeepSpeed, at any ZeRO stage."""

    def __init__(self, cfg: Config, model: nn.Module, mesh: Mesh) -> None:
        check_world_size(cfg, mesh.world_size)
        set_kernels(model, cfg.quant.kernel, mesh.device.type)
        self.cfg, self.mesh = cfg, mesh
        self.stage = cfg.engine.zero_stage
        self.module = model
        for parameter in model.parameters():
            # DeepSpeed's gradient norm counts these on every tensor-parallel rank, the others on
            # the first of them only.
            counts = shard_of(parameter) is not None and is_counted_here(parameter, mesh)
            parameter.tensor_model_parallel = counts  # type: ignore[attr-defined]
        groups = self._parameter_groups()
        self._optimizer = make_optimizer(cfg.optim, groups, fused=mesh.device.type == "cuda")
        deepspeed = _import_deepspeed(mesh.device.type)
        try:
            # DeepSpeed prints a dozen lines of memory readings on the way.
            with contextlib.redirect_stdout(io.StringIO()):
                self._engine, self._wrapper, _, _ = deepspeed.initialize(
                    model=self._deepspeed_model(),
                    optimizer=self._optimizer,
                    config=deepspeed_config(cfg, mesh.dp_size),
                    mpu=self._deepspeed_mpu(),
                )
        except (ValueError, NotImplementedError, AssertionError, KeyError, TypeError) as error:
            if not cfg.engine.deepspeed:
                raise  # our own derived configuration is refused: a bug, keep the traceback
            # pydantic's message has several lines, the key on the second.
            reason = " ".join(str(error).split()) or repr(error)
            raise ConfigError(
                f"DeepSpeed refuses the configuration with engine.deepspeed="
                f"{cfg.engine.deepspeed}: {reason.split(' For further information')[0]}"
            ) from error
        self._own_clock = OwnClock(mesh.device)
        # After DeepSpeed's own hooks, which fetch weights.
        self._own_clock.watch(layers_with_parameters(model) if self.stage == 3 else [model])
        moments = moments_of(cfg.optim)
        fragment_views.create_state(self._wrapper, self._optimizer, self.stage, moments)
        self._ternary_gather = self._make_ternary_gather() if cfg.engine.ternary_gather else None

    def _deepspeed_model(self) -> Any:
        return self.module

    def _deepspeed_mpu(self) -> ModelParallelUnit | None:
        return None if self.mesh.tp_size == 1 else ModelParallelUnit(self.mesh)

    def train_step(
        self, micro_batches: Iterable[MicroBatch], *, lr: float, weight_decay: float
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update."""
        self._set_hyperparameters(lr, weight_decay)
        self._engine.train()
        self._fetch_weights()
        with self._own_clock.running():
            self._prepare_weights()
            batches = list(micro_batches)
        total = torch.zeros((), device=self.mesh.device)
        for micro_batch in batches:
            loss = self._engine(*self.to_device(micro_batch))
            self._engine.backward(loss)
            total += loss.detach().float()
            if micro_batch is batches[-1]:
                grad_norm = self._replicated_grad_norm() if self.stage == 0 else None
            with self._own_gather():
                self._engine.step()
        forget_weights(self.module)
        if grad_norm is None:
            grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return StepResult(total / len(batches), grad_norm.float(), self._own_clock.take())

    @torch.no_grad()
    def token_losses(self, batch: EvaluationBatch) -> Tensor:
        """Nats [B, S] of a held-out batch at the present λ, 0 at padding (a collective)."""
        self._engine.eval()
        self._fetch_weights()
        self._prepare_weights()
        losses: Tensor = self.module(*self.to_device(batch), reduction="none")
        return losses

    def to_device(self, batch: MicroBatch | EvaluationBatch) -> tuple[Tensor | None, ...]:
        """The tensors of `batch` on this rank's device."""
        device = self.mesh.device
        tensors = (batch.input_ids_BS, batch.target_ids_BS, batch.document_ids_BS)
        return tuple(t if t is None else t.to(device, non_blocking=True) for t in tensors)

    def fragments(self) -> Iterator[Fragment]:
        """Writable views on the fp32 masters and the moments that this rank holds."""
        return fragment_views.fragments(
            self.module,
            self._wrapper,
            self._optimizer,
            stage=self.stage,
            mesh=self.mesh,
        )

    def publish_masters(self) -> None:
        """Make the compute weights follow masters that were written through fragments."""
        with self._own_gather():
            fragment_views.publish_masters(self.module, self._wrapper, self.stage)
        forget_weights(self.module)

    @contextlib.contextmanager
    def gathered(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The whole compute weight, on every rank, read-only (a collective at stage 3, with
        `engine.ternary_gather`, and where tensor-parallel ranks share it)."""
        with contextlib.ExitStack() as stack:
            if self._ternary_gather is not None:
                stack.enter_context(self._ternary_gather.whole(parameter))
            if self.stage == 3:
                import deepspeed

                stack.enter_context(deepspeed.zero.GatheredParameters(parameter))
            yield whole_parameter(parameter, self.mesh.tp_group)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every parameter, by name, whatever the stage and the ranks."""
        return self._own_shapes()

    def ternary_weights(self) -> set[str]:
        """Names of the weights of all BitLinears of the model."""
        return {f"{name}.weight" for name, _ in bit_linears(self.module)}

    def _optimized(self) -> list[nn.Parameter]:
        """The parameters that this rank's optimizer updates, or has parts of."""
        return list(self.module.parameters())

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices, which decay, and the rest; at stages 1 and 2 ternary matrices on their own,
        whose gather can then be another (whether it is or not: the order in which the gradient
        norm is added up must not depend on that)."""
        decayed, others = decayed_and_not(self._optimized())
        of_layers = {id(layer.weight) for _, layer in bit_linears(self.module)}
        # In fp32 the norm is reduced once a group over all model-parallel ranks, and pipeline
        # stages without an embedding would have fewer groups than the others: a deadlock.
        if self.stage not in (1, 2) or (self.mesh.pp_size > 1 and self.cfg.train.dtype == "fp32"):
            of_layers = set()
        ternary = [p for p in decayed if id(p) in of_layers]
        decayed = [p for p in decayed if id(p) not in of_layers]
        return [
            {"params": params, "decayed": params is not others, "ternary": params is ternary}
            for params in (decayed, ternary, others)
            if params
        ]

    def _make_ternary_gather(self) -> TernaryGather | TernaryZero3 | None:
        """None if nothing that is trained here is ternary."""
        layers = [layer for _, layer in bit_linears(self.module) if layer.weight.requires_grad]
        if not layers:
            return None
        scale_group = self.mesh.tp_group
        packed, packing = packs_codes(self.cfg), self.cfg.engine.code_packing
        if self.stage == 3:
            return TernaryZero3(self._wrapper, layers, scale_group, packed=packed, packing=packing)
        (index,) = [i for i, g in enumerate(self._optimizer.param_groups) if g["ternary"]]
        return TernaryGather(
            self._wrapper,
            self._optimizer,
            index,
            layers,
            scale_group,
            packed=packed,
            packing=packing,
        )

    def _fetch_weights(self) -> None:
        """What `_prepare_weights` reads is there from now on, or needs no preparing (a collective
        with `engine.ternary_gather`)."""
        if self._ternary_gather is not None:
            self._ternary_gather.prepare()

    def _own_gather(self) -> contextlib.AbstractContextManager[None]:
        gather = self._ternary_gather
        return contextlib.nullcontext() if gather is None else gather.own_gather()

    def _own_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for name, parameter in self.module.named_parameters():
            shard = shard_of(parameter)
            own = tuple(getattr(parameter, "ds_shape", parameter.shape))
            shapes[name] = own if shard is None else shard.whole
        return shapes

    def _prepare_weights(self) -> None:
        # At stage 3 the weights are there only while their layer runs, and codes kept from one
        # layer to the next would take the memory that the stage is chosen to save.
        if self.stage != 3:
            prepare_weights(self.module)

    def _set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0

    def _replicated_grad_norm(self) -> Tensor:
        """Stage 0 keeps plain gradients (already averaged here) and does not report a norm."""
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.module.parameters() if p.grad is not None]
        )


def _import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, quiet, bound to the device, without its start-up compilation."""
    wanted = os.environ.setdefault("DS_ACCELERATOR", device_type)
    if wanted != device_type:
        raise ConfigError(
            f"environment variable DS_ACCELERATOR={wanted!r} but the run uses {device_type!r}; "
            "unset it or set engine.device"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.ops import __compatible_ops__
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
        from deepspeed.utils import logger
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)  # torch's, to the bit: no reason for its warning
    logger.setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls torch collectives under names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device_type == "cpu":
        # A shared-memory all-reduce used only for inference; compiling it takes minutes.
        __compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, also for a single process
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed
