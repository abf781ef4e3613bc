"""Quantizer specifications that cannot be, and the configuration's overrides."""

import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from gaussian import gaussian

from bitscale.config import Config, QuantConfig, quant_spec
from bitscale.config.presets import INT8_ROWS, PRESETS, preset, with_bits
from bitscale.config.schema import PresetName
from bitscale.config.spec import CodeSpec
from bitscale.convert.packed import refuse_unpackable
from bitscale.errors import CheckpointError, ConfigError
from bitscale.quant.quantizer import quantize

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


# --- Specifications that cannot be ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodeSpec(measure="mean"), "measure='mean' is unknown; use one of absmean"),
        (lambda: CodeSpec(measure="absmean", eps=0.0), "eps=0 and numerator=1 must be positive"),
        (lambda: CodeSpec(measure="absmean", code_max=200), "-1..200 must span 0 and fit"),
        (lambda: CodeSpec(measure="twn", code_min=-2), "ternary only"),
        (lambda: CodeSpec(measure="absmean", group_size=64), "'matrix' with group_size=64"),
        (lambda: CodeSpec(measure="absmean", granularity="group"), "'group' with group_size=None"),
        (
            lambda: CodeSpec(measure="absmean", granularity="row_shard"),
            "'row_shard' with num_shards=None",
        ),
        (
            lambda: CodeSpec(measure="absmean", granularity="row_shard", num_shards=-1),
            "num_shards=-1: give a positive number",
        ),
        (lambda: replace(preset("b158"), activation=None), "needs quantized activations"),
        (lambda: replace(preset("group64"), product="integer"), "several weight scales"),
        (lambda: replace(preset("hf"), product="integer"), "dequantizes once by fp32 steps"),
        (lambda: replace(preset("b158"), product="codes"), "scale_form='multiply'"),
        (lambda: replace(preset("b158"), bias="before"), "needs product='codes'"),
        (lambda: replace(preset("b158"), straight_through="added"), "multiplies codes themselves"),
        (
            lambda: replace(preset("b158"), activation=preset("b158").weight),
            "one scale a token .*not 'matrix'",
        ),
        (
            lambda: replace(preset("hf"), activation=replace(INT8_ROWS, rounding="stochastic")),
            "is of weights only",
        ),
        (
            lambda: replace(preset("hf"), activation=replace(INT8_ROWS, measure="absmean")),
            "scaled by their absmax or rms",
        ),
        (lambda: with_bits(preset("twn").weight, 2), "leave weight_bits out"),
        (lambda: preset("b159"), "'b159' is unknown; use one of b158, hf"),
    ],
)
def test_impossible_specification(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_groups_and_shards_must_divide_the_matrix() -> None:
    with pytest.raises(ConfigError, match=r"group_size=64 does not divide the 100 inputs"):
        quantize(gaussian(8, 100), preset("group64").weight)
    shards = replace(preset("b158").weight, granularity="row_shard", num_shards=3)
    with pytest.raises(ConfigError, match=r"num_shards=3 does not divide the 8 rows"):
        quantize(gaussian(8, 100), shards)


# --- Configuration ---


def test_configuration_knows_every_preset() -> None:
    assert list(get_args(PresetName)) == list(PRESETS)
    for name in PRESETS:
        assert quant_spec(QuantConfig(preset=name)) == preset(name)


def test_overrides_change_the_preset() -> None:
    spec = quant_spec(QuantConfig(weight_scale="absmedian"))
    assert spec.weight.measure == "absmedian"
    spec = quant_spec(QuantConfig(granularity="group", group_size=128))
    assert spec == preset("group128")
    assert quant_spec(QuantConfig(activation_bits=16)) == preset("weight_only")
    assert quant_spec(QuantConfig(preset="weight_only", activation_bits=8)).activation is not None
    assert quant_spec(QuantConfig(granularity="row", weight_bits=4)) == preset("int4")
    assert quant_spec(QuantConfig(preset="group64", granularity="matrix")).weight.group_size is None
    spec = quant_spec(QuantConfig(activation_max=128, eps=1e-6, gradient="clip", norm="layernorm"))
    assert spec.activation is not None
    assert (spec.activation.numerator, spec.activation.eps, spec.weight.eps) == (128, 1e-6, 1e-6)
    assert (spec.gradient, spec.norm) == ("clip", "layernorm")
    spec = quant_spec(QuantConfig(rounding="stochastic"))
    assert spec.activation is not None
    assert (spec.weight.rounding, spec.activation.rounding) == ("stochastic", "half_even")
    spec = quant_spec(QuantConfig(preset="int4", weight_scale="absmax"))
    assert spec.weight.numerator == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.preset=b159"], r"quant.preset=\"b159\": Input should be 'b158'"),
        (
            ["quant.preset=trilm", "quant.activation_max=128"],
            "quant.activation_max=128 means nothing with 16-bit activations",
        ),
        (
            ["quant.group_size=64"],
            r"quant \(preset b158\): granularity='matrix' with group_size=64",
        ),
        (["quant.preset=twn", "quant.weight_bits=2"], "'twn' is ternary"),
        (["quant.preset=twn", "quant.rounding=half_up"], "thresholds instead of rounding"),
        (["quant.preset=sdu", "quant.granularity=group", "quant.group_size=16"], "summed first"),
        (["quant.preset=group64"], r"quant: 64 \(group\) does not divide model.d_model=32"),
        (
            ["quant.granularity=row_shard", "quant.num_shards=3"],
            r"quant: 3 \(row_shard\) does not divide model.d_model=32",
        ),
    ],
)
def test_impossible_configuration(
    make_config: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["quant.preset=int4"], r"codes -8..7, not ternary"),
        (["quant.granularity=row"], "a scale per row, not one a matrix"),
        (["quant.rounding=stochastic"], "codes drawn anew"),
        (["quant.preset=sdu"], "a division by 1 / scale"),
        (["quant.preset=onebit"], r"sums x \+ \(x̂ - x\)"),
    ],
)
def test_export_refuses_what_the_packed_form_would_compute_differently(
    make_config: Callable[..., Config], overrides: list[str], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{reason}.*; keep the checkpoint, or train with"):
        refuse_unpackable(make_config(*overrides).quant)
    for name in ("b158", "hf", "torchao", "absmedian", "trilm", "twn", "weight_only"):
        refuse_unpackable(make_config(f"quant.preset={name}").quant)


def test_document_has_every_formula_and_figure() -> None:
    """The prose is compared; figures may move in their last digit from one torch to another."""
    tool = runpy.run_path(str(ROOT / "tools/document_quantizers.py"))
    committed = (ROOT / "docs/quantizers.md").read_text(encoding="utf-8")
    assert tool["sections"]() in committed, "run python tools/document_quantizers.py"
    assert tool["INTRODUCTION"] in committed, "run python tools/document_quantizers.py"
    assert set(tool["DIFFERS"]) == set(PRESETS)
    for name in PRESETS:
        assert "Source: " in (PRESETS[name].__doc__ or "").replace("\n", " ")
        row = re.search(rf"^\| `{name}` \| (\d+) \| .*$", committed, re.MULTILINE)
        assert row is not None, name
        assert int(row[1]) == preset(name).weight.num_levels
