"""The train step on DeepSpeed's pipeline engine: 1F1B or DualPipeV over stages, ZeRO-1 within each.

The one layer that DeepSpeed sees of a stage is our `DecoderStage`, so that who computes what, and
every name, are the model's. A step quantizes each stage's weights once, before its micro-batches.

Tied embedding and head: the first stage owns the weight. The last stage holds a copy without an
optimizer; its gradient is collected in fp32, added to the first stage's before data-parallel ranks
average, and the updated weight is sent back. (DeepSpeed's own tied layers keep a second optimizer
state, which data-parallel sums in another order let drift away.)
"""

from collections.abc import Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitscale.config import Config, num_pipeline_stages
from bitscale.data.batches import EvaluationBatch, MicroBatch
from bitscale.engine.mpu import ModelParallelUnit
from bitscale.engine.train_engine import StepResult, TrainEngine
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import forget_weights
from bitscale.model.stages import DecoderStage


class PipelineEngine(TrainEngine):
    """One stage of a model and its optimizer under DeepSpeed, at ZeRO-1."""

    def __init__(self, cfg: Config, model: DecoderStage, mesh: Mesh) -> None:
        self._stage = model
        super().__init__(cfg, model, mesh)
        parts = mesh.gather_objects((self._own_shapes(), super().ternary_weights()))
        self._shapes = {name: shape for shapes, _ in parts for name, shape in shapes.items()}
        self._ternary = {name for _, names in parts for name in names}
        self._tied_grad: Tensor | None = None
        if self._copy is not None:
            self._tied_grad = torch.zeros_like(self._copy, dtype=torch.float32)
            hook: Any = self._copy.register_post_accumulate_grad_hook
            hook(self._collect_tied_grad)

    def train_step(
        self, micro_batches: Iterable[MicroBatch], *, lr: float, weight_decay: float
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update; every stage
        is given the micro-batches, and has the loss."""
        self._set_hyperparameters(lr, weight_decay)
        self._engine.train()
        self._fetch_weights()
        self._prepare_weights()
        batches = list(micro_batches)
        self._hand_out_targets(batches)
        with self._own_gather():
            loss = self._engine.train_batch(_as_deepspeed_reads(batches))
        self._send_tied_weight()
        forget_weights(self.module)
        grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return StepResult(loss.float(), grad_norm.float(), self._own_clock.take())

    @torch.no_grad()
    def token_losses(self, batch: EvaluationBatch) -> Tensor:
        """Nats [B, S] of a held-out batch at the present λ, on every stage (a collective).

        One batch after the other: stages wait for each other."""
        self._engine.eval()
        self._fetch_weights()
        self._prepare_weights()
        input_ids_BS, target_ids_BS, document_ids_BS = self.to_device(batch)
        assert input_ids_BS is not None and target_ids_BS is not None
        self._hand_out_targets([batch])
        mesh, stage, x = self.mesh, self._stage, input_ids_BS
        there = range(mesh.pp_size)
        way = [*there, *reversed(there)][: num_pipeline_stages(self.cfg)]
        for hop, pp_rank in enumerate(way):
            if pp_rank != mesh.pp_rank:
                continue
            if hop > 0 and way[hop - 1] != pp_rank:
                x = self._receive_hidden(self._rank_at(way[hop - 1]), *input_ids_BS.shape)
            inputs = x if document_ids_BS is None else (x, document_ids_BS)
            out = stage(inputs, phase=hop // mesh.pp_size)
            x = out[0] if isinstance(out, tuple) else out
            if hop + 1 < len(way) and way[hop + 1] != pp_rank:
                dist.send(x.contiguous(), self._rank_at(way[hop + 1]), mesh.pp_group)
        losses_BS = torch.empty(target_ids_BS.shape, device=mesh.device)
        if stage.is_last:
            losses_BS = x.float().contiguous()
        dist.broadcast(losses_BS, self._rank_at(way[-1]), mesh.pp_group)
        return losses_BS

    def _hand_out_targets(self, batches: Sequence[MicroBatch | EvaluationBatch]) -> None:
        """Each stage takes its micro-batches in their order, in every schedule."""
        if self._stage.is_last:
            assert not self._stage.targets, "targets of a step that was not finished"
            ids = (batch.target_ids_BS.to(self.mesh.device) for batch in batches)
            self._stage.targets.extend(ids)

    def publish_masters(self) -> None:
        super().publish_masters()
        self._send_tied_weight()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def ternary_weights(self) -> set[str]:
        return set(self._ternary)

    @property
    def _copy(self) -> nn.Parameter | None:
        """The last stage's copy of the tied weight."""
        return self._stage.tied_weight if self._stage.is_last else None

    def _optimized(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p is not self._copy]

    def _deepspeed_model(self) -> Any:
        from deepspeed.pipe import DualPipeVModule, PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        mesh, stage = self.mesh, self._stage
        num_stages = num_pipeline_stages(self.cfg)
        # One layer a stage, of which only this rank's are ever asked for. The second is a function:
        # the module is there already.
        layers: list[Any] = [nn.Identity() for _ in range(num_stages)]
        layers[mesh.pp_rank] = stage
        kind = PipelineModule
        if num_stages > mesh.pp_size:
            kind, layers[-1 - mesh.pp_rank] = DualPipeVModule, partial(stage, phase=1)
        pipe = kind(
            layers,
            topology=PipeModelDataParallelTopology(mesh.pp_size, mesh.tp_size, mesh.dp_size),
            loss_fn=_given_loss,
            partition_method="uniform",
        )
        # The hook at which DeepSpeed sums tied gradients, once a step.
        pipe.get_tied_weights_and_groups = self._tied_grads
        return pipe

    def _deepspeed_mpu(self) -> ModelParallelUnit | None:
        return None  # the pipeline has its own

    def _collect_tied_grad(self, copy: Tensor) -> None:
        assert self._tied_grad is not None and copy.grad is not None
        self._tied_grad += copy.grad
        copy.grad = None

    def _tied_grads(self) -> list[tuple[Any, dist.ProcessGroup | None]]:
        """(what holds a gradient as `grad` or, in bf16, `_hp_grad`; ranks to sum it over)."""
        weight = self._stage.tied_weight
        if weight is None:
            return []
        if self._tied_grad is None:
            return [(weight, self.mesh.ends_group)]
        holder = SimpleNamespace(grad=self._tied_grad, _hp_grad=self._tied_grad)
        return [(holder, self.mesh.ends_group)]

    def _send_tied_weight(self) -> None:
        """The last stage's copy follows the first stage's weight (a collective)."""
        weight = self._stage.tied_weight
        if weight is not None:
            dist.broadcast(weight.data, self._rank_at(0), self.mesh.ends_group)
        if self._tied_grad is not None:
            self._tied_grad.zero_()

    def _rank_at(self, pp_rank: int) -> int:
        """In the world: who stands there in this pipeline."""
        return self.mesh.rank + (pp_rank - self.mesh.pp_rank) * self.mesh.stride

    def _receive_hidden(self, source: int, batch_size: int, seq_len: int) -> Tensor:
        mesh, tp = self.mesh, self._stage.tp
        d_model = self.cfg.model.d_model
        shape = (batch_size, seq_len, d_model)
        if tp.sequence_parallel:
            shape = (seq_len // tp.size, batch_size, d_model)
        dtype = next(self.module.parameters()).dtype
        hidden = torch.empty(shape, dtype=dtype, device=mesh.device)
        dist.recv(hidden, source, mesh.pp_group)
        return hidden


def _given_loss(loss: Tensor, labels: Tensor) -> Tensor:
    """The last stage has computed it."""
    return loss


def _as_deepspeed_reads(micro_batches: Iterable[MicroBatch]) -> Any:
    """(inputs of the first stage, labels of the last) of each micro-batch."""
    for batch in micro_batches:
        ids_BS, documents = batch.input_ids_BS, batch.document_ids_BS
        yield (ids_BS if documents is None else (ids_BS, documents)), batch.target_ids_BS


def make_engine(cfg: Config, model: nn.Module, mesh: Mesh) -> TrainEngine:
    """The engine for what `make_model` has made of the model of `cfg`."""
    if isinstance(model, DecoderStage):
        return PipelineEngine(cfg, model, mesh)
    return TrainEngine(cfg, model, mesh)
