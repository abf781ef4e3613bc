"""A configuration for a number of parameters and tokens: when to switch, and what that rests on.

The transition point is 1 - f*, with the best QAT fraction f* of arXiv:2509.22935 as a function of
tokens per parameter-byte: with the paper's constant, or with that of `bitscale fit ... --law
qat-fraction`. Everything else is a rule with a source, said beside the value.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.config import Config, ModelConfig, parse_config, to_yaml
from bitscale.errors import ConfigError, DataError
from bitscale.fit.estimate import Estimate
from bitscale.fit.qat_fraction import (
    PAPER_A,
    PAPER_MAE,
    SOURCE,
    best_fraction,
    tokens_per_parameter_byte,
)
from bitscale.model import cost

TERNARY_BITS = math.log2(3)
# Sizes and S of the runs behind the paper's constant (its abstract and summary; bits 1 to 6).
_PAPER_PARAMETERS = (86e6, 2.2e9)
_PAPER_BITS = 1.0, 6.0
_SMALLEST, _LARGEST = 5e4, 1e12
_MOST_TOKENS = 1e16
_FRACTION_LIMITS = (0.02, 0.98)


class Evidence(NamedTuple):
    """What the law's constant was estimated from."""

    name: str
    a: Estimate
    parameters: tuple[float, float]  # of the runs
    s: tuple[float, float]  # tokens per parameter-byte of the runs
    fractions: tuple[float, float]  # QAT fractions of the runs


class Recommendation(NamedTuple):
    cfg: Config
    fraction: Estimate  # QAT
    notes: tuple[str, ...]  # one line each

    def text(self) -> str:
        """The configuration as YAML, the notes above it as comments."""
        lines = [f"# {note}" for note in self.notes]
        return "\n".join(lines) + "\n" + to_yaml(self.cfg)


def read_evidence(path: Path) -> Evidence:
    """The JSON that `bitscale fit --law qat-fraction` wrote. Raises DataError for another file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        low, high = tree["range"]["parameters"]
        s_low, s_high = tree["range"]["tokens_per_parameter_byte"]
        f_low, f_high = tree["range"]["fraction"]
        return Evidence(
            f"{path} ({tree['rows']} runs)",
            Estimate(**tree["values"]["a"]),
            (float(low), float(high)),
            (float(s_low), float(s_high)),
            (float(f_low), float(f_high)),
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a fit's JSON") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is no fit of the QAT fraction; write one with "
            "`bitscale fit RESULTS --law qat-fraction`, and name its qat-fraction.json"
        ) from None


def recommend(
    parameters: float,
    tokens: float,
    *,
    evidence: Evidence | None = None,
    corpus: str = "data/corpus",
    run_dir: str = "runs/recommended",
    vocab_size: int | None = None,
    seq_len: int | None = None,
) -> Recommendation:
    """A checked configuration of about `parameters` parameters for `tokens` tokens.

    Raises ConfigError for sizes that no rule covers, DataError where the law means nothing.
    """
    if not _SMALLEST <= parameters <= _LARGEST:
        raise ConfigError(
            f"--params {parameters:g} is outside {_SMALLEST:g} to {_LARGEST:g}; give the number of "
            "parameters, e.g. 350e6"
        )
    if not tokens >= 1e5:
        raise ConfigError(f"--tokens {tokens:g} is too few for any rule here; give at least 1e5")
    if tokens > _MOST_TOKENS:
        raise ConfigError(
            f"--tokens {tokens:g} is more than any rule here covers; give at most {_MOST_TOKENS:g}"
        )
    for option, value in (("vocab-size", vocab_size), ("seq-len", seq_len)):
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} is not positive; leave it out for a default")
    model = shape_for(parameters, vocab_size)
    count = cost.parameters(model).total
    s = tokens_per_parameter_byte(count, tokens, TERNARY_BITS)
    fraction = _fraction(s, evidence)
    lr, batch_tokens = learning_rate_and_batch(count, tokens)
    length = seq_len or (2048 if count > 5e7 else 512 if count > 5e6 else 128)
    batch = max(1, round(batch_tokens / length))
    batch = round(batch / 8) * 8 if batch > 8 else batch  # divides among ranks
    steps = max(100, math.ceil(tokens / (batch * length)))
    cfg = parse_config(
        _tree(model, tokens, batch, length, steps, lr, fraction.value, corpus, run_dir),
        where="the recommended configuration",
    )
    return Recommendation(cfg, fraction, tuple(_notes(cfg, count, tokens, s, fraction, evidence)))


def _fraction(s: float, evidence: Evidence | None) -> Estimate:
    low, high = _FRACTION_LIMITS
    if evidence is None:
        value = best_fraction(s)
        ends = value, value - PAPER_MAE, value + PAPER_MAE
    else:
        a = evidence.a  # a larger a is a smaller fraction
        ends = (best_fraction(s, a.value), best_fraction(s, a.high), best_fraction(s, a.low))
    return Estimate(*(min(max(end, low), high) for end in ends))


def shape_for(parameters: float, vocab_size: int | None = None) -> ModelConfig:
    """The decoder nearest in size, depth about 0.6 sqrt(width) and a feed-forward of 8/3 widths.

    Widths are multiples of 32 (of 128 from 1,024 on), heads have 32 to 128 inputs.
    """
    vocab = vocab_size or _vocab_for(parameters)
    found = []
    for width in [*range(32, 1024, 32), *range(1024, 32768, 128)]:
        head = 32 if width < 256 else 64 if width < 2048 else 128
        if width % head:
            continue
        heads = width // head
        for layers in {max(2, round(ratio * math.sqrt(width))) for ratio in (0.5, 0.6, 0.7, 0.8)}:
            model = ModelConfig(
                vocab_size=vocab,
                num_layers=layers,
                d_model=width,
                num_heads=heads,
                num_kv_heads=heads // 4 if heads % 4 == 0 and heads > 4 else heads,
                d_ff=round(8 / 3 * width / 32) * 32,
                tie_embeddings=parameters < 3e9,
            )
            found.append((abs(math.log(cost.parameters(model).total / parameters)), model))
    return min(found, key=lambda pair: pair[0])[1]


def _vocab_for(parameters: float) -> int:
    """So small that ternary layers hold most of the parameters."""
    for limit, size in ((1e6, 512), (5e6, 2048), (5e7, 8192), (1e9, 32768)):
        if parameters < limit:
            return size
    return 65536


def learning_rate_and_batch(parameters: float, tokens: float) -> tuple[float, float]:
    """Peak learning rate, and tokens a batch, of arXiv:2401.02954 (DeepSeek LLM), section 3.1:
    .3118 C^-.1250 and .2920 C^.3271, with C = 6 N D for their FLOPs."""
    compute = 6.0 * parameters * tokens
    return float(f"{0.3118 * compute**-0.1250:.2g}"), 0.2920 * compute**0.3271


def _tree(
    model: ModelConfig,
    tokens: float,
    batch: int,
    seq_len: int,
    steps: int,
    lr: float,
    fraction: float,
    corpus: str,
    run_dir: str,
) -> dict[str, Any]:
    micro = next(m for m in range(min(batch, 32), 0, -1) if batch % m == 0)
    return {
        "run": {"dir": run_dir},
        "model": json.loads(model.model_dump_json(exclude_none=True)),
        "data": {"corpora": [{"path": corpus}], "seq_len": seq_len},
        "train": {
            "tokens": round(tokens),
            "global_batch_size": batch,
            "micro_batch_size": micro,
            "dtype": "bf16" if tokens > 1e8 else "fp32",
        },
        "optim": {
            "lr": lr,
            "schedule": "wsd",
            "warmup": {"steps": min(2000, max(10, steps // 50))},
            "decay": {"fraction": round(min(0.2, fraction), 4)},
        },
        "transition": {
            "at": {"fraction": round(1.0 - fraction, 4)},
            "ramp": {"shape": "linear", "over": {"fraction": round(min(0.02, fraction / 4), 4)}},
            "optimizer_state": "keep",
            "lr": "continue",
        },
        "quant": {"kernel": "auto"},
        "checkpoint": {"every": max(1, steps // 20)},
    }


def _notes(
    cfg: Config, count: int, tokens: float, s: float, fraction: Estimate, evidence: Evidence | None
) -> list[str]:
    ramp = cfg.transition.ramp.over.fraction
    assert ramp is not None
    switch = 1 - fraction.value
    of = "the paper's constant" if evidence is None else evidence.name
    interval = (
        f"mean error of the law over the paper's own runs, ±{PAPER_MAE}"
        if evidence is None
        else "95%, bootstrap"
    )
    return [
        f"{count:,} parameters, {tokens:,.0f} tokens ({tokens / count:.1f} a parameter, S = "
        f"{s:.0f} a ternary parameter-byte).",
        f"Transition at {switch:.2f} of the tokens [{1 - fraction.high:.2f}, "
        f"{1 - fraction.low:.2f}] ({interval}): the best QAT fraction of {SOURCE},",
        f"  f* = exp(-a / ln S), with {of}"
        f" (a = {PAPER_A if evidence is None else evidence.a.value:.3g}).",
        *_extrapolation(count, s, fraction.value, evidence),
        "Another answer: arXiv:2502.11895 reports a gain from a switch at 0.2 (2,000 of 10,000 "
        "steps, 1B parameters);",
        "  docs/results/seed-claims.md has our own comparison of points, at small scale.",
        f"Ramp: linear over {ramp:.1%} of the tokens, Adam's state kept: lowers the loss spike "
        "(docs/results/optimizer-state.md, 5 seeds, 1M parameters).",
        f"Learning rate {cfg.optim.lr:g} and batch: arXiv:2401.02954 (16 bit, 1e17 to 2e19 FLOPs), "
        "not tuned for ternary. Its decay begins no earlier than the switch.",
        "Shape: depth 0.5 to 0.8 sqrt(width), feed-forward 8/3 widths: our choice.",
    ]


def _extrapolation(count: int, s: float, fraction: float, evidence: Evidence | None) -> list[str]:
    """Warnings where the evidence does not reach."""
    low, high = _PAPER_PARAMETERS if evidence is None else evidence.parameters
    lines = []
    if not low <= count <= high:
        factor = low / count if count < low else count / high
        lines.append(
            f"EXTRAPOLATED: the runs behind it have {low:.3g} to {high:.3g} parameters, this has "
            f"{factor:.3g} times {'fewer' if count < low else 'more'}."
        )
    if evidence is not None:
        s_low, s_high = evidence.s
        f_low, f_high = evidence.fractions
        if not s_low <= s <= s_high:
            lines.append(
                f"EXTRAPOLATED: its runs have {s_low:.3g} to {s_high:.3g} tokens a parameter-byte, "
                f"this has {s:.3g}."
            )
        if not f_low <= fraction <= f_high:
            lines.append(
                f"EXTRAPOLATED: its runs have QAT fractions of {f_low:.2f} to {f_high:.2f}, this "
                f"is {fraction:.2f}."
            )
    if evidence is None:
        lines.append(
            "Its weights have 1 to 6 bits with 16-bit activations; ternary weights with 8-bit "
            "activations are not among them."
        )
    return lines
