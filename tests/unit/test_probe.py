"""What the probe measures, against the model itself; and the ramp that follows from a curve."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitscale.cli.main import main
from bitscale.config import ModelConfig, QuantConfig
from bitscale.data.batches import IGNORE_ID
from bitscale.data.corpus import load_corpus
from bitscale.errors import CheckpointError, DataError
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.model.decoder import Decoder
from bitscale.probe import (
    HeldOut,
    Prober,
    layer_groups,
    loss_by_layer,
    loss_over_strength,
    num_measurements,
    read_held_out,
)
from bitscale.proposal import SHAPES, ideal_ramp, propose_ramp, shape_over, start_later
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, ramp_value
from bitscale.report.probe_chart import draw_probe

pytestmark = pytest.mark.unit

MODEL = ModelConfig(
    vocab_size=300, num_layers=2, d_model=16, num_heads=2, d_ff=32, head_bits=8, init_std=0.3
)
GRID = [i / 10 for i in range(11)]


@pytest.fixture(scope="module")
def text(corpus: Path) -> HeldOut:
    return held_out(corpus, max_tokens=700)


def held_out(corpus: Path, max_tokens: int | None, split: str = "valid") -> HeldOut:
    return read_held_out(
        [load_corpus(corpus), load_corpus(corpus)],
        split=split,
        seq_len=32,
        batch_size=4,
        max_tokens=max_tokens,
        reset_attention=False,
    )


@pytest.fixture
def model() -> Decoder:
    return Decoder(MODEL, QuantConfig(), seed=1)


def make_prober(model: Decoder, text: HeldOut) -> Prober:
    return Prober(model, text, torch.device("cpu"), lambda: None)


@torch.no_grad()
def plain_losses(model: Decoder, text: HeldOut) -> np.ndarray:
    """Nats of each window that has a target, by the model alone."""
    nats = []
    for batch in text.batches:
        losses_BS = model(batch.input_ids_BS, batch.target_ids_BS, None, reduction="none")
        keep_B = (batch.target_ids_BS != IGNORE_ID).any(dim=1)
        nats += losses_BS.double().sum(dim=1)[keep_B].tolist()
    return np.array(nats)


# --- Measured ---


def test_held_out_text_is_a_share_of_every_corpus(corpus: Path, text: HeldOut) -> None:
    whole = held_out(corpus, None)
    assert whole.num_tokens == 2 * (load_corpus(corpus).shard("valid").num_tokens - 1)
    assert 700 <= text.num_tokens < whole.num_tokens
    # The same text of both, and from their beginning.
    half = len(text.batches) // 2
    for ours, theirs in zip(text.batches[:half], text.batches[half:], strict=True):
        assert torch.equal(ours.input_ids_BS, theirs.input_ids_BS)
    assert torch.equal(text.batches[0].input_ids_BS, whole.batches[0].input_ids_BS)
    with pytest.raises(DataError, match="no corpus has a 'night' split; prepare with a share"):
        held_out(corpus, None, split="night")


def test_rises_are_those_of_the_model(model: Decoder, text: HeldOut) -> None:
    prober = make_prober(model, text)
    curve = loss_over_strength(prober, model, "both", [0.0, 1.0])
    num_tokens = text.num_tokens
    set_strength(model, SIXTEEN_BIT)
    base_N = plain_losses(model, text)
    set_strength(model, TERNARY)
    ternary_N = plain_losses(model, text)
    assert prober.loss == pytest.approx(base_N.sum() / num_tokens, rel=1e-12)
    assert curve.rises[0] == (0.0, 0.0)
    difference_N = ternary_N - base_N
    assert curve.rises[1].rise == pytest.approx(difference_N.sum() / num_tokens, rel=1e-9)
    error = difference_N.std(ddof=1) * math.sqrt(len(difference_N)) / num_tokens
    assert curve.rises[1].error == pytest.approx(error, rel=1e-9)
    assert curve.rises[1].rise > 3 * error > 0


def test_parts_of_the_layers(model: Decoder, text: HeldOut) -> None:
    prober = make_prober(model, text)
    both, weights, activations = (
        loss_over_strength(prober, model, part, [0.0, 1.0]).rises[1].rise
        for part in ("both", "weights", "activations")
    )
    # 8-bit activations cost far less than ternary weights.
    assert abs(activations) < 0.1 * weights
    assert both == pytest.approx(weights, rel=0.2)


def test_groups(model: Decoder) -> None:
    names = [name for name, _ in bit_linears(model)]
    assert layer_groups(model, "layer") == {name: [name] for name in [*names, "head"]}
    blocks = layer_groups(model, "block")
    assert list(blocks) == ["layers.0", "layers.1", "head"]
    assert sorted(itertools.chain(*blocks.values())) == sorted([*names, "head"])
    kinds = layer_groups(model, "kind")
    assert kinds["attn.q"] == ["layers.0.attn.q", "layers.1.attn.q"]
    assert kinds["mlp.down"] == ["layers.0.mlp.down", "layers.1.mlp.down"]
    assert num_measurements(11, 2, len(kinds)) == 1 + 22 + 8


def test_the_costliest_layer_comes_first(model: Decoder, text: HeldOut) -> None:
    """A layer whose output is made large matters; it is measured with all others in 16 bit."""
    with torch.no_grad():
        for name, layer in bit_linears(model):
            layer.weight.mul_(30.0 if name == "layers.1.mlp.down" else 0.1)
    prober = make_prober(model, text)
    damages = loss_by_layer(prober, model, layer_groups(model, "layer"))
    assert damages[0].group == "layers.1.mlp.down"
    rises = [damage.rise for damage in damages]
    assert rises == sorted(rises, reverse=True)
    assert "layers.1.mlp.down" in start_later(damages)
    set_strength(model, SIXTEEN_BIT)
    base_N = plain_losses(model, text)
    set_strength(model.get_submodule("layers.1.mlp.down"), TERNARY)
    alone = (plain_losses(model, text) - base_N).sum() / text.num_tokens
    assert damages[0].rise == pytest.approx(alone, rel=1e-9)


def test_a_damaged_checkpoint_is_an_error(model: Decoder, text: HeldOut) -> None:
    prober = make_prober(model, text)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="the held-out loss is not finite; the checkpoint's"):
        loss_over_strength(prober, model, "both", [1.0])


# --- Proposed ---


@pytest.mark.parametrize(
    ("rise", "shape"),
    [
        (lambda x: x, "linear"),
        (lambda x: x**4, "paper"),  # nothing happens at first: hurry there
        (lambda x: x**0.3, "exponential"),  # all happens at first
        (lambda x: math.acos(1 - 2 * x) / math.pi, "cosine"),
    ],
)
def test_the_shape_nearest_to_equal_rises(rise: Callable[[float], float], shape: str) -> None:
    proposal = propose_ramp(GRID, [0.3 * rise(x) for x in GRID], error=0.001, max_rise=0.02)
    assert proposal.shape == shape
    assert proposal.ideal_num_steps == 15
    assert proposal.overrides[0] == f"transition.ramp.shape={shape}"
    assert proposal.distances[shape] == min(proposal.distances.values())


def test_a_linear_rise_takes_as_many_steps_as_bounds_fit_into_it() -> None:
    proposal = propose_ramp(GRID, [2.0 * x for x in GRID], error=0.01, max_rise=0.05)
    assert (proposal.shape, proposal.num_steps, proposal.ideal_num_steps) == ("linear", 40, 40)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=10, max_size=10).filter(lambda rises: sum(rises) > 1))
def test_no_step_rises_more_than_the_bound(increments: list[float]) -> None:
    rises = np.concatenate([[0.0], np.cumsum(increments)])
    proposal = propose_ramp(GRID, rises.tolist(), error=0.001, max_rise=0.02)
    at = [
        ramp_value(proposal.shape, step, proposal.num_steps)
        for step in range(proposal.num_steps + 1)
    ]
    largest = np.diff(np.interp(at, GRID, rises)).max()
    assert 0.015 < largest <= 0.02 * (1 + 1e-6)  # and no more steps than that takes


def test_the_paper_ramp_is_left_out_where_its_jump_is_too_high() -> None:
    rises = [x**4 for x in GRID]
    jump = 1 - np.interp(ramp_value("paper", 1 - 1e-9, 1), GRID, rises)
    assert propose_ramp(GRID, rises, error=0.001, max_rise=1.01 * jump).shape == "paper"
    other = propose_ramp(GRID, rises, error=0.001, max_rise=0.99 * jump)
    assert "but for paper, whose jump at the end is" in other.why
    assert other.shape != "paper" and other.distances["paper"] < other.distances[other.shape]


def test_a_switch_that_costs_nothing_needs_no_ramp() -> None:
    unclear = propose_ramp(GRID, [0.1 * x for x in GRID], error=0.06)
    assert (unclear.shape, unclear.num_steps) == ("none", 0)
    assert "by 0.1000 nats, within its measuring error" in unclear.why
    small = propose_ramp(GRID, [0.1 * x for x in GRID], error=0.001, max_rise=0.2)
    assert small.shape == "none" and "allowed in one step" in small.why
    falling = propose_ramp(GRID, [-0.1 * x for x in GRID], error=0.001)
    assert falling.shape == "none"


def test_the_ideal_ramp_inverts_a_curve_that_stands_still_or_falls() -> None:
    u = np.linspace(0, 1, 101)
    ideal = ideal_ramp([0, 0.25, 0.5, 0.75, 1], [0, -0.5, 1, 0.5, 2], u)
    # Free up to .25, equal rises from there to .5, then none until .75.
    assert (ideal[0], ideal[1]) == (0, pytest.approx(0.255, abs=1e-3))
    assert np.interp([0.25, 0.49], u, ideal) == pytest.approx([0.375, 0.495], abs=0.01)
    assert ideal[51] > 0.75 and ideal[-1] == 1
    assert (np.diff(ideal) >= 0).all()


def test_shapes_are_those_of_the_schedule() -> None:
    for shape in SHAPES:
        values = shape_over(shape, np.array([0.0, 0.3, 1.0]))
        assert values == pytest.approx([ramp_value(shape, step, 10) for step in (0, 3, 10)])


def test_layers_that_could_begin_later() -> None:
    usual = [(f"l{i}", 0.01, 0.001) for i in range(8)]
    assert start_later(usual) == start_later([]) == []
    assert start_later([("bad", 0.5, 0.01), *usual]) == ["bad"]
    assert start_later([("unclear", 0.5, 0.3), *usual]) == []
    assert start_later([("falls", -0.5, 0.01), *usual]) == []


def test_draws_without_a_rise_or_layers(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    draw_probe(path, 3.0, [("both", GRID, [(0.0, 0.0)] * 11)], [], [], "ideal", "none")
    assert path.read_bytes()[:4] == b"\x89PNG"


# --- Command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "weights"], "--parts weights: give both first (the ramp follows from it)"),
        (["--parts", "both,noise"], "--parts both,noise: give both first"),
        (["--points", "1"], "--points 1 is too small or infinite; give 2 or more"),
        (["--max-tokens", "nan"], "--max-tokens nan is too small or infinite; give 0 or more"),
        (["--max-rise", "0"], "--max-rise 0 is no rise of a loss; give e.g. 0.01"),
        ([], "no checkpoint here; name a run directory"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["probe", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
