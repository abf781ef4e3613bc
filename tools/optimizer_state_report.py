"""What the runs of tools/optimizer_state.py say: paired differences, the figure, the page."""

from pathlib import Path
from typing import NamedTuple

SEEDS = (1, 2, 3, 4, 5)
FORK_STEP, AFTER_STEPS = 400, 120  # of 1,024 tokens
REWARM_STEPS, RAMP_STEPS = 40, 40
SHAPES = ("jump", "ramp")

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


def write_report(work: Path, out: Path, provenance: str) -> list[Path]:
    raise NotImplementedError
