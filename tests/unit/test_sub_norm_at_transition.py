"""SubLN that comes in with λ: absent at λ = 0, the ordinary SubLN at λ = 1."""

from collections.abc import Callable

import pytest
import torch

from bitscale.config import Config
from bitscale.model.bitlinear import prepare_weights, set_kernels, set_strength
from bitscale.model.decoder import Decoder
from bitscale.model.norms import BlendedNorm, BlendedRMSNorm, is_sub_norm
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]


def model_with(
    make_config: MakeConfig, sub_norm: str, strength: Strength, kernel: str = "reference"
) -> Decoder:
    """The same weights whatever the norms; the SubLN's own are not 1."""
    cfg = make_config(f"model.sub_norm={sub_norm}", "model.vocab_size=64")
    model = Decoder(cfg.model, cfg.quant, seed=3)
    set_kernels(model, kernel, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_sub_norm(name):
                parameter.uniform_(0.5, 1.5, generator=generator)
    set_strength(model, strength)
    prepare_weights(model)
    return model


def loss_and_grads(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    ids_BS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    loss = model(ids_BS[:, :-1], ids_BS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_at_zero_it_is_the_model_without(make_config: MakeConfig) -> None:
    loss, grads = loss_and_grads(model_with(make_config, "transition", SIXTEEN_BIT))
    wanted, grads_without = loss_and_grads(model_with(make_config, "false", SIXTEEN_BIT))
    assert torch.equal(loss, wanted)
    waiting = {name for name in grads if is_sub_norm(name)}
    assert len(waiting) == 2 * len(model_with(make_config, "true", TERNARY).layers)
    assert grads.keys() - waiting == grads_without.keys()
    for name, grad in grads.items():
        assert grad is not None, "AdamW would skip it, and ZeRO not"
        if name in waiting:
            assert not grad.any()
        else:
            assert torch.equal(grad, grads_without[name]), name


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_at_one_it_is_the_ordinary_sub_norm(make_config: MakeConfig, kernel: str) -> None:
    loss, grads = loss_and_grads(model_with(make_config, "transition", TERNARY, kernel))
    wanted, grads_with = loss_and_grads(model_with(make_config, "true", TERNARY, kernel))
    assert torch.equal(loss, wanted)
    assert grads.keys() == grads_with.keys()
    assert all(torch.equal(grad, grads_with[name]) for name, grad in grads.items())


def test_between_it_is_blended() -> None:
    torch.manual_seed(0)
    norm = BlendedRMSNorm(6, 1e-5)
    assert isinstance(norm, BlendedNorm)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(4, 6, requires_grad=True)
    norm.strength = 1.0
    whole = norm(x)
    norm.strength = 0.3
    blended = norm(x)
    torch.testing.assert_close(blended, x + 0.3 * (whole - x))
    (grad,) = torch.autograd.grad(blended.square().sum(), norm.weight)
    assert grad.abs().min() > 0
    norm.strength = 0.0
    assert torch.equal(norm(x), x)


def test_it_comes_with_the_strength_of_the_weights(make_config: MakeConfig) -> None:
    model = model_with(make_config, "transition", Strength(0.25, 0.75))
    norms = [module for module in model.modules() if isinstance(module, BlendedNorm)]
    assert norms and all(norm.strength == 0.25 for norm in norms)
    with_ramp, _ = loss_and_grads(model)
    plain, _ = loss_and_grads(model_with(make_config, "false", Strength(0.25, 0.75)))
    assert not torch.equal(with_ramp, plain)


def test_a_layer_that_is_ternary_alone_reads_what_its_norm_is_now(make_config: MakeConfig) -> None:
    """As `bitscale probe` makes them; the others, and with them the SubLN, stay in 16 bit."""
    losses = []
    for sub_norm in ("transition", "false"):
        model = model_with(make_config, sub_norm, SIXTEEN_BIT)
        set_strength(model.get_submodule("layers.0.attn.o"), TERNARY)
        set_strength(model.get_submodule("layers.0.mlp.down"), TERNARY)
        losses.append(loss_and_grads(model)[0])
    assert torch.equal(*losses)
