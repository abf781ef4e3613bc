"""The parallel layers as megatron-core modules, for an unmodified `GPTModel`.

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    spec = ternary_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), "b158")
    model = GPTModel(config, spec, vocab_size, max_sequence_length)
    set_strength(model, strength)        # each step, as with bitscale's own decoder
    prepare_weights(model)               # optional: one collective a step instead of one a layer

With Megatron-LM's own training script nobody calls these two: bitscale/megatron_lm.py.

A scale belongs to a logical matrix: q, k and v in linear_qkv, gate and up in linear_fc1 have
one each, over all ranks of the group. Written for megatron-core 0.16.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from bitscale.config.presets import preset
from bitscale.errors import ConfigError
from bitscale.model.bitlinear import kernels_for
from bitscale.model.collectives import TensorGroup
from bitscale.model.norms import RMSNorm
from bitscale.model.parallel import (
    ColumnParallel,
    RowParallel,
    ShardedLinear,
    check_shared_spec,
    set_up_shard,
)
from bitscale.quant.reference import Quant, as_spec
from bitscale.quant.schedule import SIXTEEN_BIT, Strength

# λ of the present iteration, and the iteration's number.
StrengthSource = Callable[[], tuple[Strength, int]]


def ternary_layer_spec(
    layer: ModuleSpec,
    quant: Quant | str = "b158",
    *,
    source: StrengthSource | None = None,
    kernel: str = "reference",
) -> ModuleSpec:
    """A copy of a transformer layer's spec with linear_qkv, linear_proj, linear_fc1 and linear_fc2
    of ours, and RMSNorms that work with sequence parallelism.

    `source` gives λ in every forward pass; without it `set_strength` does. `kernel` as
    `quant.kernel`.

    Raises ConfigError for a layer whose linear modules are none of megatron-core's local ones
    (Transformer Engine fuses the norm into them), or a preset that is not shared.
    """
    quant = preset(quant) if isinstance(quant, str) else quant
    check_shared_spec(as_spec(quant))
    params = {"quant": quant, "source": source, "kernel": kernel}
    layer = copy.deepcopy(layer)
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    for modules, name in (
        (attention, "linear_qkv"),
        (attention, "linear_proj"),
        (mlp, "linear_fc1"),
        (mlp, "linear_fc2"),
    ):
        present = getattr(modules, name, None)
        present = getattr(present, "module", present)
        ours = _OURS.get(present)
        if ours is None:
            shown = getattr(present, "__name__", present)
            raise ConfigError(
                f"ternary_layer_spec: {name} is {shown}; start from megatron-core's local layer "
                "spec (get_gpt_layer_local_spec, --transformer-impl local), dense and without MLA"
            )
        setattr(modules, name, ModuleSpec(module=ours, params=params))
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(layer.submodules, name, MegatronRMSNorm)
    return layer


def ternary_block_spec(layer: ModuleSpec, num_layers: int) -> TransformerBlockSubmodules:
    """`num_layers` (of this pipeline stage) of `layer`, with our RMSNorm after the last: what
    `GPTModel` takes in place of a layer's spec. Without Transformer Engine and Apex, the last
    norm of megatron-core itself refuses sequence parallelism."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=MegatronRMSNorm)


class _TernaryModule:
    """Construction of a megatron-core layer, whose class follows this one, as a ternary one."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        quant: Quant | str = "b158",
        source: StrengthSource | None = None,
        kernel: str = "reference",
        **options: Any,
    ) -> None:
        super().__init__(input_size, output_size, **options)  # type: ignore[call-arg]
        _set_up(self, quant, source, kernel)


class BitColumnParallelLinear(
    _TernaryModule,
    ColumnParallel,
    ColumnParallelLinear,  # type: ignore[misc]
):
    """linear_qkv or linear_fc1. λ = 0 is megatron-core's own layer."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        matrices = _matrices_of_rows(self, options.get("tp_comm_buffer_name"))
        if matrices is not None:
            self.matrix_F, self.num_matrices = matrices

    def forward(  # type: ignore[override]
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        _follow(self)
        if self.strength == SIXTEEN_BIT or weight is not None:
            assert self.strength == SIXTEEN_BIT, "a weight from elsewhere is not quantized"
            result: tuple[Tensor, Tensor | None] = ColumnParallelLinear.forward(
                self, input_, weight, runtime_gather_output
            )
            return result
        y = self.project(input_, None if self.skip_bias_add else self.bias)
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gathers:
            y = gather_from_tensor_model_parallel_region(y, group=self.tp_group)
        return y, self.bias if self.skip_bias_add else None


class BitRowParallelLinear(_TernaryModule, RowParallel, RowParallelLinear):  # type: ignore[misc]
    """linear_proj or linear_fc2. λ = 0 is megatron-core's own layer."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if not self.input_is_parallel:
            raise ConfigError(
                "BitRowParallelLinear: input_is_parallel=False; a ternary row-parallel layer "
                "takes the columns that its rank's column-parallel layer made"
            )

    def forward(  # type: ignore[override]
        self, input_: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        _follow(self)
        if self.strength == SIXTEEN_BIT:
            result: tuple[Tensor, Tensor | None] = RowParallelLinear.forward(self, input_)
            return result
        y = self.project(input_)
        if self.skip_bias_add:
            return y, self.bias
        return (y if self.bias is None else y + self.bias), None


class MegatronRMSNorm(RMSNorm):
    """RMSNorm as megatron-core builds its norms; its gradient is summed over the tensor-parallel
    ranks with sequence parallelism, as Megatron does for parameters so marked."""

    def __init__(
        self, config: Any = None, hidden_size: int = 0, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps)
        assert self.weight is not None
        self.weight = nn.Parameter(self.weight.detach().to(config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


_OURS = {
    ColumnParallelLinear: BitColumnParallelLinear,
    RowParallelLinear: BitRowParallelLinear,
}


def _set_up(layer: Any, quant: Quant | str, source: StrengthSource | None, kernel: str) -> None:
    if layer.is_expert:
        raise ConfigError("ternary layers are not experts of a mixture; use a dense layer spec")
    quant = preset(quant) if isinstance(quant, str) else quant
    size = layer.tp_group.size()
    tp = TensorGroup(
        layer.tp_group if size > 1 else None,
        layer.tp_group.rank(),
        size,
        layer.sequence_parallel and size > 1,
    )
    set_up_shard(layer, quant, tp)
    layer.kernels = kernels_for("", kernel, layer.weight.device.type, as_spec(quant), None)
    layer.source, layer.iteration = source, None


def _follow(layer: Any) -> None:
    """Take λ from the layer's source; quantize the weight once an iteration of training."""
    if layer.source is None:
        return
    layer.strength, iteration = layer.source()
    if not layer.training:  # an evaluation follows the update of its iteration
        layer.forget_weight()
        layer.iteration = None
    elif layer.iteration != iteration:
        layer.forget_weight()
        layer.prepare_weight()
        layer.iteration = iteration


def _matrices_of_rows(layer: Any, role: str | None) -> tuple[Tensor, int] | None:
    """The logical matrix of each of this rank's rows, and their number; None: it is one matrix.

    linear_qkv has for each group of query heads the rows of its q, k and v; a gated linear_fc1
    has on each rank gate and then up.
    """
    config, num_rows = layer.config, layer.weight.shape[0]
    if role == "qkv":
        if getattr(config, "attention_output_gate", False):
            raise ConfigError("ternary_layer_spec: attention_output_gate is not supported")
        heads_per_group = config.num_attention_heads // config.num_query_groups
        q, k = heads_per_group * config.kv_channels, config.kv_channels
        block = torch.tensor([0] * q + [1] * k + [2] * k)
        first = layer.tp_group.rank() * num_rows  # groups fewer than ranks are cut
        return block[(first + torch.arange(num_rows)) % len(block)], 3
    if role == "fc1" and config.gated_linear_unit:
        return torch.arange(num_rows) // (num_rows // 2), 2
    return None


def sharded_layers(model: nn.Module) -> list[ShardedLinear]:
    """Every layer of `model` that tensor-parallel ranks share, in module order."""
    return [module for module in model.modules() if isinstance(module, ShardedLinear)]
