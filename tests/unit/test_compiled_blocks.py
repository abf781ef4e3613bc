"""train.compile: the decoder's blocks by torch.compile, against the same blocks without."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitscale.config import ModelConfig, QuantConfig, load_config
from bitscale.errors import KernelUnavailable
from bitscale.mesh import single_process_mesh
from bitscale.model.bitlinear import forget_weights, prepare_weights, set_strength
from bitscale.model.compiled import compile_blocks
from bitscale.model.decoder import Block, Decoder
from bitscale.model.stages import make_model
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
VOCAB = 61
STRENGTHS = (SIXTEEN_BIT, SIXTEEN_BIT, *(Strength(i / 10, i / 10) for i in range(1, 10)))


def train(model: Decoder) -> list[Tensor]:
    """Losses of some steps: 16 bit, a ramp longer than torch's limit of recompilations, ternary."""
    generator = torch.Generator().manual_seed(3)
    losses = []
    for strength in (*STRENGTHS, TERNARY, TERNARY):
        ids = torch.randint(VOCAB, (2, 17), generator=generator)
        set_strength(model, strength)
        prepare_weights(model)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        forget_weights(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        ("aot_eager", "none"),
        ("aot_eager", "selective"),
        pytest.param("inductor", "none", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_train_alike_without_a_graph_break(
    backend: str, checkpointing: str
) -> None:
    m = ModelConfig(vocab_size=VOCAB, num_layers=3, d_model=32, num_heads=4, d_ff=48)
    plain, compiled = (
        Decoder(m, QuantConfig(), seed=1, activation_checkpointing=checkpointing) for _ in "ab"
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled, "cpu", backend=backend)
    for got, want in zip(train(compiled), train(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    # All blocks share a graph of λ = 0 and one of λ = 1, whatever their weights' codes are.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert [name for name, _ in compiled.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]


def test_a_run_compiles_only_if_it_says_so() -> None:
    for wanted in (False, True):
        changes = [f"train.compile={str(wanted).lower()}", f"model.vocab_size={VOCAB}"]
        model = make_model(load_config(QUICKSTART, changes), single_process_mesh("cpu"))
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        assert [block.compiled is not None for block in blocks] == [wanted] * len(blocks)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    model = Decoder(
        ModelConfig(vocab_size=VOCAB, num_layers=1, d_model=32, num_heads=4, d_ff=48), QuantConfig()
    )
    with pytest.raises(KernelUnavailable, match=r"no compiler was found.*install g\+\+, or set"):
        compile_blocks(model, "cpu")
