"""`export --format megatron` read by megatron-core's own GPTModel, at TP 1 and 2, and by ourselves.

Loading is megatron-core's dist_checkpointing, on CPU by megatron_cpu.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron_cpu import megatron_on_cpu
from tiny_models import make_source
from torch import Tensor
from world import World

from bitscale.config import Config, ModelConfig
from bitscale.convert.clients import decoder_logits
from bitscale.convert.formats import ExportOptions, export
from bitscale.convert.model_source import ModelSource
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import set_strength
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore::UserWarning")]

SEQ_LEN = 24
MODELS = {
    "tied": "model.tie_embeddings=true",
    "untied, q/k norms, all biases": "model={tie_embeddings: false, qk_norm: true, bias: true, "
    "rope_theta: 5e5, norm_eps: 1e-6}",
    "no gate, q/k/v biases, norms without weights": "model={mlp: relu2, bias: qkv, "
    "norm_affine: false, num_kv_heads: null}",
    "squared ReLU with a gate": "model.mlp=relu2_glu",
}


def their_logits(
    mesh: Mesh, model: ModelConfig, directory: Path, ids_BS: Tensor, tp: int, strength: Strength
) -> Tensor:
    """[B, S, V] of a GPTModel that loads `directory`; of our layer spec if `strength` is not 0."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with megatron_on_cpu(), torch.no_grad():
        parallel_state.initialize_model_parallel(tp)
        try:
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            gpt = make_gpt(model, tp, ternary=strength != SIXTEEN_BIT)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            wanted = {"model": gpt.sharded_state_dict(metadata={"dp_cp_group": group})}
            loaded = dist_checkpointing.load(wanted, str(directory), strict="raise_all")
            gpt.load_state_dict(loaded["model"])
            if strength != SIXTEEN_BIT:
                set_strength(gpt, strength)
            positions = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
            hidden = torch.ones(ids_BS.shape[1], ids_BS.shape[1]).triu(1).bool()[None, None]
            logits: Tensor = gpt(ids_BS, positions, hidden)
            return logits.float()
        finally:
            parallel_state.destroy_model_parallel()


def make_gpt(m: ModelConfig, tp: int, *, ternary: bool) -> Any:
    """megatron-core's model with the settings that a user of it would give for `m`."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from bitscale.model.megatron import ternary_layer_spec

    config = TransformerConfig(
        num_layers=m.num_layers, hidden_size=m.d_model, num_attention_heads=m.num_heads,
        num_query_groups=m.num_kv_heads or m.num_heads, ffn_hidden_size=m.d_ff,
        gated_linear_unit=m.mlp != "relu2",
        activation_func=F.silu if m.mlp == "swiglu" else squared_relu,
        add_bias_linear=m.bias is True, add_qkv_bias=m.bias == "qkv", qk_layernorm=bool(m.qk_norm),
        normalization="RMSNorm", layernorm_epsilon=m.norm_eps, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=tp, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=bool(m.qk_norm))
    spec = ternary_layer_spec(spec) if ternary else spec
    assert m.vocab_size is not None
    return GPTModel(
        config, spec, m.vocab_size, SEQ_LEN, parallel_output=False, position_embedding_type="rope",
        rotary_base=int(m.rope_theta), share_embeddings_and_output_weights=m.tie_embeddings,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def exports(
    make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[ModelSource, Path]]:
    folder = tmp_path_factory.mktemp("megatron")
    found = {}
    for index, (name, override) in enumerate(MODELS.items()):
        source = make_source(make_config(f"data.seq_len={SEQ_LEN}", override))
        export(source, folder / str(index), "megatron", ExportOptions())
        found[name] = source, folder / str(index) / "release"
    return found


IDS_BS = torch.randint(0, 96, (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tp", [1, 2])
def test_gpt_model_computes_our_logits(
    tp: int,
    exports: dict[str, tuple[ModelSource, Path]],
    world_of: Callable[[int], World],
) -> None:
    names = ["tied"] if tp == 1 else list(exports)
    for name in names:
        source, directory = exports[name]
        strengths = [SIXTEEN_BIT, TERNARY] if name == "tied" else [SIXTEEN_BIT]
        for strength in strengths:
            expected = decoder_logits(source, strength)(IDS_BS)
            largest = float(expected.abs().max())
            assert largest > 0.5
            ranks = world_of(2).run(
                their_logits, source.model, directory, IDS_BS, tp, strength, seconds=300.0
            )
            for found in ranks:
                assert float((found - expected).abs().max()) <= 5e-6 * largest, (name, strength)
