"""Draw docs/images/schedules.png: every λ ramp, learning-rate schedule and transition policy.

python tools/draw_schedules.py
"""

from pathlib import Path
from typing import get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bitscale.config import Config, parse_config
from bitscale.config.schema import OptimConfig, RampShape, TransitionConfig
from bitscale.optim import learning_rate, weight_decay
from bitscale.quant.schedule import quant_strength

TARGET = Path(__file__).parents[1] / "docs" / "images" / "schedules.png"
NUM_STEPS, START, LENGTH = 1000, 400, 300
STEPS = range(NUM_STEPS)
LINE_STYLES = ("-", "--", "-.")  # policies coincide over long stretches


def main() -> None:
    draw(TARGET)
    print(f"wrote {TARGET}")


def draw(path: Path) -> None:
    """A run of 1,000 steps whose transition begins at step 400."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    _draw_ramps(axes[0, 0])
    _draw_schedules(axes[0, 1])
    _draw_lr_policies(axes[1, 0])
    _draw_decay_policies(axes[1, 1])
    for axis in axes.flat:
        axis.axvline(START, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_ylim(-0.05, 1.08)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.1, 0.05))
    for axis in axes[1]:
        axis.set_xlabel("step (dotted: transition)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_ramps(axis: Axes) -> None:
    for shape in get_args(RampShape):
        length = 0 if shape == "none" else LENGTH
        cfg = _config(transition={"ramp": {"shape": shape, "over": {"steps": length}}})
        axis.plot(STEPS, [quant_strength(s, cfg).weight for s in STEPS], label=shape)
    axis.set_title(f"λ: transition.ramp.shape, over {LENGTH} steps", fontsize=10)


def _draw_schedules(axis: Axes) -> None:
    for schedule in get_args(OptimConfig.model_fields["schedule"].annotation):
        cfg = _config(optim={"schedule": schedule})
        axis.plot(STEPS, [learning_rate(s, cfg) for s in STEPS], label=schedule)
    axis.set_title("learning rate / peak: optim.schedule", fontsize=10)


def _draw_lr_policies(axis: Axes) -> None:
    policies = get_args(TransitionConfig.model_fields["lr"].annotation)
    for policy, dashes in zip(policies, LINE_STYLES, strict=True):
        cfg = _config(optim={"schedule": "wsd"}, transition={"lr": policy})
        axis.plot(STEPS, [learning_rate(s, cfg) for s in STEPS], dashes, label=policy)
    axis.set_title("learning rate / peak: transition.lr, over schedule wsd", fontsize=10)


def _draw_decay_policies(axis: Axes) -> None:
    for policy, dashes in zip(("constant", "off", "off_at"), LINE_STYLES, strict=True):
        cfg = _config(transition={"weight_decay": policy})
        axis.plot(STEPS, [weight_decay(s, cfg) for s in STEPS], dashes, label=policy)
    axis.set_title("weight decay: transition.weight_decay", fontsize=10)


def _config(
    optim: dict[str, object] | None = None, transition: dict[str, object] | None = None
) -> Config:
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"num_layers": 1, "d_model": 2, "num_heads": 1, "d_ff": 2},
            "data": {"corpora": [{"path": "unused"}], "seq_len": 1},
            "train": {"steps": NUM_STEPS, "global_batch_size": 1, "micro_batch_size": 1},
            "optim": {"lr": 1.0, "weight_decay": 1.0, "warmup": {"steps": 80}, **(optim or {})},
            "transition": {
                "at": {"step": START},
                "lr_rewarm": {"steps": 80},
                **(transition or {}),
            },
        },
        where="tools/draw_schedules.py",
    )


if __name__ == "__main__":
    main()
