"""What the runs of tools/optimizer_state.py say: paired differences, the figure, the page."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure

from bitscale.recorder import METRICS_NAME, format_count
from bitscale.report.draw import STYLE
from bitscale.report.read import Floats, Run, read_run
from bitscale.report.spike import find_transition, measure_spike, rolling_mean

SEEDS = (1, 2, 3, 4, 5)
FORK_STEP, AFTER_STEPS = 400, 120  # of 1,024 tokens
REWARM_STEPS, RAMP_STEPS = 40, 40
SHAPES = ("jump", "ramp")
TOKENS_PER_STEP = 8 * 128

# Written, and committed, before the first run of the experiment.
PREDICTION = """\
1. Keeping softens the spike: without re-warming, the peak of the excess loss is higher after a
   reset than after a keep, since a reset Adam's first updates have the full size of the learning
   rate in every weight, whatever the gradient.
2. Re-warming the learning rate removes most of that difference, and by itself lowers the peak.
3. Further training compensates: at the end the validation losses of the four differ by less than
   a tenth of the difference in their peaks, or not measurably.
4. With a ramp of λ all peaks are lower, and the order stays."""


class Policy(NamedTuple):
    state: str  # transition.optimizer_state
    lr: str  # transition.lr


def policies() -> list[Policy]:
    return [Policy(state, lr) for state in ("keep", "reset") for lr in ("continue", "rewarm")]


class Seen(NamedTuple):
    """What one fork showed; losses in nats, excesses over the paired 16-bit continuation."""

    height: float  # peak of the loss over the trunk's level, as docs/report.md defines it
    peak_excess: float  # largest mean of WINDOW steps of the excess
    early_excess: float  # mean over the first REWARM_STEPS steps
    late_excess: float  # mean over the last REWARM_STEPS steps
    valid_excess: float  # of the final validation loss
    tokens_to_recover: float  # until the loss is back at the trunk's level; NaN: not in the run
    excess: Floats  # [AFTER_STEPS], a step each


class Interval(NamedTuple):
    """A mean over seeds with its 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


WINDOW = 4
# Two-sided 95% quantiles of Student's t, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
MEASURES = {
    "height": "height over the trunk",
    "peak_excess": "peak excess",
    "early_excess": f"mean excess, first {REWARM_STEPS} steps",
    "late_excess": f"mean excess, last {REWARM_STEPS} steps",
    "valid_excess": "final validation",
}
KEEP, KEEP_REWARM, RESET, RESET_REWARM = policies()
CONTRASTS = {
    "reset - keep, rate continued": (RESET, KEEP),
    "reset - keep, rate re-warmed": (RESET_REWARM, KEEP_REWARM),
    "re-warmed - continued, state kept": (KEEP_REWARM, KEEP),
    "re-warmed - continued, state reset": (RESET_REWARM, RESET),
}
Table = dict[Policy, list[Seen]]  # a row a seed


def write_report(work: Path, out: Path, provenance: str) -> list[Path]:
    """Write the page, the figures behind it as JSON, and the drawing; their paths."""
    tables: dict[str, Table] = {}
    for shape in SHAPES:
        seeds = [seed for seed in SEEDS if is_complete(work, seed, shape)]
        if len(seeds) >= 3:
            tables[shape] = {p: [measure(work, s, shape, p) for s in seeds] for p in policies()}
    if not tables:
        raise SystemExit("no shape has three finished seeds yet: nothing to report")
    page, data = out / "optimizer-state.md", out / "optimizer-state.json"
    picture = out.parent / "images" / "optimizer-state.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    page.write_text(render(tables, provenance), encoding="utf-8")
    rows = {
        shape: {
            f"{policy.state}, {policy.lr}": [seen._replace(excess=[])._asdict() for seen in column]
            for policy, column in table.items()
        }
        for shape, table in tables.items()
    }
    text = json.dumps({"provenance": provenance, "seeds_in_order": rows}, indent=1)
    data.write_text(text.replace("NaN", "null") + "\n", encoding="utf-8")
    draw(tables).savefig(picture, dpi=90)
    return [page, data, picture]


def is_complete(work: Path, seed: int, shape: str) -> bool:
    files = [fork_dir(work, seed, shape, policy) / METRICS_NAME for policy in policies()]
    files.append(work / f"seed{seed}" / "trunk" / METRICS_NAME)
    return all(file.is_file() and '"finished"' in file.read_text("utf-8") for file in files)


def fork_dir(work: Path, seed: int, shape: str, policy: Policy) -> Path:
    return work / f"seed{seed}" / f"{shape}-{policy.state}-{policy.lr}"


def measure(work: Path, seed: int, shape: str, policy: Policy) -> Seen:
    """One fork beside the 16-bit continuation of its trunk: the same batches, step by step."""
    trunk = read_run(work / f"seed{seed}" / "trunk" / METRICS_NAME, "trunk")
    fork = read_run(fork_dir(work, seed, shape, policy) / METRICS_NAME, "fork")
    after = trunk.train["step"] > FORK_STEP
    assert np.array_equal(trunk.train["step"][after], fork.train["step"])
    excess = fork.train["loss"] - trunk.train["loss"][after]
    whole = joined(trunk, fork)
    transition = find_transition(whole)
    assert transition is not None
    spike = measure_spike(whole, transition, FORK_STEP + AFTER_STEPS)
    assert spike is not None
    recovered = spike.tokens_to_recover
    return Seen(
        spike.peak_loss - spike.pre_loss,
        float(rolling_mean(excess, WINDOW).max()),
        float(excess[:REWARM_STEPS].mean()),
        float(excess[-REWARM_STEPS:].mean()),
        float(fork.valid["loss"][-1] - trunk.valid["loss"][-1]),
        math.nan if recovered is None else float(recovered),
        excess,
    )


def joined(trunk: Run, fork: Run) -> Run:
    """The fork with the steps of its trunk before it."""
    before = trunk.train["step"] <= FORK_STEP
    train = {
        field: np.concatenate([trunk.train[field][before], values])
        for field, values in fork.train.items()
    }
    return fork._replace(train=train)


def interval(values: Sequence[float]) -> Interval:
    """Mean and t interval of paired values, one a seed."""
    mean, n = float(np.mean(values)), len(values)
    half = T_95[n - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def contrast(table: Table, pair: tuple[Policy, Policy], field: str) -> Interval:
    """Of the differences within each seed."""
    ours, theirs = table[pair[0]], table[pair[1]]
    pairs = zip(ours, theirs, strict=True)
    return interval([getattr(a, field) - getattr(b, field) for a, b in pairs])


def verdict(table: Table) -> tuple[str, str]:
    """(does keeping soften the spike, does training compensate), by the rules on the page."""
    pair = CONTRASTS["reset - keep, rate continued"]
    peak, valid = contrast(table, pair, "peak_excess"), contrast(table, pair, "valid_excess")
    softens = "confirmed" if peak.low > 0 else "contradicted" if peak.high < 0 else "not seen"
    if softens == "not seen":
        return softens, "not testable: there was no difference to compensate"
    small = abs(valid.mean) < 0.1 * abs(peak.mean)
    compensated = small or valid.low <= 0 <= valid.high
    return softens, "confirmed" if compensated else "not within these tokens"


def verdict_line(shape: str, table: Table) -> str:
    softens, compensates = verdict(table)
    title = "λ jumps" if shape == "jump" else "λ ramps"
    return (
        f"- {title}: keeping softens the spike: **{softens}**; further training compensates: "
        f"**{compensates}**."
    )


def outcomes(tables: dict[str, Table]) -> str:
    """What became of each prediction, in its order."""
    table = tables["jump"]
    reset = CONTRASTS["reset - keep, rate continued"]
    peak, early = (contrast(table, reset, field) for field in ("peak_excess", "early_excess"))
    height = interval([seen.peak_excess for seen in table[KEEP]]).mean
    lines = [
        f"1. {judged(peak, 1)}: the peak after a reset differs by {peak}, which is "
        f"{abs(peak.mean) / height:.0%} of the peak after a keep. The mean of the first "
        f"{REWARM_STEPS} steps differs by {early}: {tendency(early)}."
    ]
    shown = []
    for state in ("kept", "reset"):
        pair = CONTRASTS[f"re-warmed - continued, state {state}"]
        lowered = contrast(table, pair, "peak_excess")
        shown.append(f"{judged(lowered, -1)} ({lowered}) with the state {state}")
    rewarmed = contrast(table, CONTRASTS["reset - keep, rate re-warmed"], "peak_excess")
    lines.append(
        f"2. A lower peak by re-warming: {'; '.join(shown)}. Re-warmed, a reset's peak differs "
        f"from a keep's by {rewarmed}."
    )
    ends = {name: contrast(table, pair, "valid_excess") for name, pair in CONTRASTS.items()}
    same = {name: end.low <= 0 <= end.high for name, end in ends.items()}
    word = "as predicted" if all(same.values()) else "only in part as predicted"
    listed = "; ".join(f"{name} {end}" for name, end in ends.items())
    lines.append(f"3. {word}: the validation losses at the end differ by {listed}.")
    if "ramp" in tables:
        lines.append(ramp_outcome(tables))
    return "\n".join(lines)


def ramp_outcome(tables: dict[str, Table]) -> str:
    """Over the seeds that both shapes have."""
    jump, ramp = tables["jump"], tables["ramp"]
    lower = {
        policy: interval(
            [
                b.peak_excess - a.peak_excess
                for a, b in zip(jump[policy], ramp[policy], strict=False)
            ]
        )
        for policy in policies()
    }
    words = sorted({judged(value, -1) for value in lower.values()})
    listed = "; ".join(f"{p.state}, {p.lr} {value}" for p, value in lower.items())
    order = contrast(ramp, CONTRASTS["reset - keep, rate continued"], "peak_excess")
    return (
        f"4. Lower peaks by a ramp: {', '.join(words)} ({listed}). With it a reset's peak differs "
        f"from a keep's by {order}: {judged(order, 1)}."
    )


def judged(value: Interval, expected_sign: int) -> str:
    """Of a difference that was predicted to be positive (1) or negative (-1)."""
    if value.low <= 0 <= value.high:
        return "not seen"
    return "as predicted" if value.mean * expected_sign > 0 else "the contrary of the prediction"


def tendency(early: Interval) -> str:
    if early.low <= 0 <= early.high:
        return "no difference is seen there"
    return "there a reset is the better one" if early.mean < 0 else "there too a keep is better"


def draw(tables: dict[str, Table]) -> Figure:
    """Mean excess with its interval, a panel a shape."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(tables), 3.9), layout="constrained")
        panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        tokens = np.arange(1, AFTER_STEPS + 1) * TOKENS_PER_STEP
        for panel, (shape, table) in zip(panels, tables.items(), strict=True):
            for policy, column in table.items():
                draw_policy(panel, tokens, policy, column)
            title = "λ jumps to 1" if shape == "jump" else f"λ ramps over {RAMP_STEPS} steps"
            panel.set_title(f"{title} ({len(column)} seeds)")
            panel.set_xlabel("tokens after the transition")
            panel.axhline(0.0, color="#888888", linewidth=0.8)
        panels[0].set_ylabel("loss over the paired 16-bit run, nats")
        panels[0].legend(frameon=False, fontsize=9)
    return figure


def draw_policy(panel: Any, tokens: Floats, policy: Policy, column: list[Seen]) -> None:
    color = "#2f6db3" if policy.state == "keep" else "#c8601a"
    dashes = "-" if policy.lr == "continue" else (0, (4, 2))
    smooth = np.stack([rolling_mean(seen.excess, WINDOW) for seen in column])
    bands = [interval(list(values)) for values in smooth.T]
    x = tokens[WINDOW - 1 :]
    label = f"{policy.state}, rate {'continued' if policy.lr == 'continue' else 're-warmed'}"
    panel.plot(x, [b.mean for b in bands], color=color, linestyle=dashes, label=label)
    low, high = [b.low for b in bands], [b.high for b in bands]
    panel.fill_between(x, low, high, color=color, alpha=0.10, linewidth=0)


def render(tables: dict[str, Table], provenance: str) -> str:
    sections = [shape_section(shape, table) for shape, table in tables.items()]
    return TEXT.format(
        prediction=PREDICTION,
        provenance=provenance,
        sections="\n".join(sections),
        verdicts="\n".join(verdict_line(shape, table) for shape, table in tables.items()),
        outcomes=outcomes(tables),
        fork=FORK_STEP,
        after=AFTER_STEPS,
        batch=TOKENS_PER_STEP,
        rewarm=REWARM_STEPS,
        window=WINDOW,
        trunk_tokens=format_count(FORK_STEP * TOKENS_PER_STEP),
        after_tokens=format_count(AFTER_STEPS * TOKENS_PER_STEP),
        missing="" if len(tables) == len(SHAPES) else MISSING,
    )


def shape_section(shape: str, table: Table) -> str:
    title = "λ jumps to 1" if shape == "jump" else f"λ ramps linearly over {RAMP_STEPS} steps"
    num_seeds = len(next(iter(table.values())))
    head = "| | " + " | ".join(MEASURES.values()) + " | tokens to recover (median) |"
    lines = [f"## {title} ({num_seeds} seeds)", "", head, "|---" * (len(MEASURES) + 2) + "|"]
    for policy, column in table.items():
        cells = [str(interval([getattr(seen, field) for seen in column])) for field in MEASURES]
        lines.append(
            f"| {policy.state}, {policy.lr} | " + " | ".join([*cells, recovery(column)]) + " |"
        )
    lines += ["", "Paired differences:", "", "| | " + " | ".join(MEASURES.values()) + " |"]
    lines.append("|---" * (len(MEASURES) + 1) + "|")
    for name, pair in CONTRASTS.items():
        cells = [str(contrast(table, pair, field)) for field in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    return "\n".join(lines)


def recovery(column: list[Seen]) -> str:
    tokens = sorted(seen.tokens_to_recover for seen in column if seen.tokens_to_recover >= 0)
    missing = len(column) - len(tokens)
    ordered = [*tokens, *[math.inf] * missing]
    middle = ordered[len(ordered) // 2]
    text = "not in the run" if math.isinf(middle) else format_count(int(middle))
    return f"{text} ({missing} of {len(column)} not in the run)" if missing else text


MISSING = """
The runs with a ramp were not finished when this page was written; the command goes on with them.
"""

TEXT = """\
# Keep or reset Adam's state at the transition?

Written by `python tools/optimizer_state.py --text TEXTS`: {provenance}.

arXiv:2502.11895 reports for 1B parameters that keeping the optimizer's state, and a ramp of λ,
soften the loss spike of the switch from 16 to 1.58 bit, and that further training makes up for
the difference. Here: a 1.05M-parameter decoder (4 layers, width 128, 94% of its parameters in
ternary layers, vocabulary 512), fp32, on eight English novels. For each seed (weights and order
of the text) one 16-bit trunk of {fork} steps of {batch:,} tokens ({trunk_tokens}), AdamW at a
constant 2e-3 after {rewarm} steps of warm-up. From its checkpoint there, four ternary forks of
{after} steps ({after_tokens}): {{keep, reset}} × {{learning rate continued, re-warmed over
{rewarm} steps}}. The trunk itself goes on in 16 bit over the same batches: the difference to it,
step by step, is the excess, free of the text's noise.

## Predicted, before the first run
{prediction}

## Rules of the verdict, committed before the first fork began
*Softened*: the 95% interval of the paired difference reset - keep (rate continued) of the peak
excess lies above 0; *contradicted* if below 0; else *not seen*. *Compensated*: the difference of
the final validation losses is smaller than a tenth of that of the peaks, or its interval contains
0.

## Verdict
The paper's claim, by these rules:

{verdicts}

Of the predictions:

{outcomes}

## Reading (of the runs of 2026-11-22)
- With a jump of λ the spike is the quantization itself: some .47 of .49 nats are there whatever
  Adam holds. A reset costs .02 at the peak and is then the better choice for 40,000 tokens; what
  Adam remembers of the 16-bit model seems to be of little use so far from it. (Why, is not
  measured here.)
- With a ramp the order is the paper's: a reset at the full rate costs .045 on average while λ
  rises and .02 at the peak. Of that .007 are left in the training loss of the last 40 steps; in the
  validation loss at the end no difference can be told from noise.
- The paper's "reset" is reset and re-warming together. With a ramp its peak is that of a keep;
  after a jump it lies a little above. Re-warming itself costs .004 to .011 of validation loss at
  the end: tokens learned from at a lower rate, in runs this short.
- The ramp matters some fourteen times as much for the peak as the state does (.329 and .023), and
  the run with it ends .013 lower.
- The same runs at .85M parameters (commit e5c2d45 of this file) gave the same signs and sizes, but
  for the validation loss after a ramp: there .007 [.002, .013] were left.

![excess loss after the transition](../images/optimizer-state.png)

Lines are means over seeds, bands 95% intervals (Student's t over seeds, paired by seed where two
are compared). Intervals are in brackets; nothing is corrected for the number of comparisons.

- *height over the trunk*: the peak of the loss smoothed over {window} steps, less the trunk's
  mean loss just before (docs/report.md); negative if the loss went on falling.
- *peak excess*: the largest mean of {window} steps of the excess.
- *tokens to recover*: until the smoothed loss is back at the trunk's level of before, 0 if it
  never rose.

{sections}
## How far this goes
One small model, one text, one learning rate, less than one epoch, a transition in an early phase
of training. Nothing here is about 1B parameters; the figures show whether the effect exists at
all at this size, and how large the noise is.
"""
