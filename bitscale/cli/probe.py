"""`bitscale probe`: what quantization would cost a 16-bit model, and the ramp that follows."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitscale.probe import Curve, Damage, Part, Prober
    from bitscale.proposal import Proposal

_EPILOG = """\
examples:
  bitscale probe runs/trunk
  bitscale probe runs/trunk/checkpoints/step-00200000 --max-tokens 200000 --layers kind
  bitscale probe runs/trunk --set quant.preset=absmedian --parts both,weights,activations
  bitscale probe runs/trunk --data data/other --layers none --out probes/other

writes probe-STEP.json and probe-STEP.png; docs/probe.md says what the figures mean, and by which
rule the ramp is proposed.
"""
_PARTS = ("both", "weights", "activations")
_SHOWN_LAYERS = 12


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "probe",
        help="held-out loss over λ and by layer; proposes a ramp",
        description="Held-out loss of a checkpoint at λ = 0 to 1 and with one layer ternary at a "
        "time, the weights as they are; and the ramp that follows.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="run or checkpoint")
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        metavar="DIR",
        help="prepared corpus (default: those of the training run)",
    )
    parser.add_argument("--split", default="valid", help="train, valid (default) or test")
    parser.add_argument(
        "--max-tokens", type=float, default=100_000, metavar="N", help="0: all; default 100000"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="quant",
        metavar="quant.KEY=VALUE",
        help="another quantizer than the checkpoint's configuration says",
    )
    parser.add_argument(
        "--points", type=int, default=11, metavar="N", help="values of λ from 0 to 1; default 11"
    )
    parser.add_argument(
        "--parts",
        default="both",
        metavar="A,B",
        help="both (default: weights and activations together), weights, activations",
    )
    parser.add_argument(
        "--layers",
        choices=("layer", "block", "kind", "none"),
        default="layer",
        help="what is made ternary by itself (default: each layer)",
    )
    parser.add_argument(
        "--max-rise",
        type=float,
        default=0.01,
        metavar="NATS",
        help="largest rise of the loss in one step of the proposed ramp; default 0.01",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--seq-len", type=int, metavar="N", help="default: as in training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the run's directory")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    parts = _checked_parts(args)
    from tqdm import tqdm

    from bitscale import probe
    from bitscale.checkpoint import resolve
    from bitscale.convert import load_checkpoint
    from bitscale.evaluate import corpora_of_tokenizer
    from bitscale.mesh import single_process_mesh
    from bitscale.proposal import propose_ramp

    path = resolve(args.checkpoint)
    loaded = load_checkpoint(path, args.quant)
    corpora = corpora_of_tokenizer(
        args.data or [Path(corpus) for corpus in loaded.corpora], loaded.tokenizer_fingerprint
    )
    text = probe.read_held_out(
        corpora,
        split=args.split,
        seq_len=args.seq_len or loaded.seq_len,
        batch_size=args.batch_size,
        max_tokens=int(args.max_tokens) or None,
        reset_attention=loaded.reset_attention,
    )
    groups = {} if args.layers == "none" else probe.layer_groups(loaded.model, args.layers)
    strengths = [i / (args.points - 1) for i in range(args.points)]
    passes = probe.num_measurements(len(strengths), len(parts), len(groups))
    with tqdm(
        total=passes * len(text.batches),
        desc=f"{passes} passes",
        unit="batch",
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    ) as bar:
        device = single_process_mesh(args.device).device
        prober = probe.Prober(loaded.model, text, device, bar.update)
        curves = [probe.loss_over_strength(prober, loaded.model, part, strengths) for part in parts]
        damages = probe.loss_by_layer(prober, loaded.model, groups)
    rises = curves[0].rises
    proposal = propose_ramp(
        strengths, [r.rise for r in rises], error=rises[-1].error, max_rise=args.max_rise
    )
    print(
        f"{path}: step {loaded.step:,}, trained last at λ {loaded.strength.weight:g}/"
        f"{loaded.strength.activation:g}; loss in 16 bit {prober.loss:.4f} on {text.num_tokens:,} "
        f"tokens of {args.split}"
    )
    _print_curves(curves)
    _print_layers(damages)
    print(f"proposal: {proposal.why}\n  {' '.join(proposal.overrides)}")
    _write(args, path, loaded.step, prober, text.num_tokens, curves, damages, proposal)
    return 0


def _checked_parts(args: argparse.Namespace) -> "list[Part]":
    from bitscale.errors import ConfigError

    parts: list[Any] = args.parts.split(",")
    if parts[0] != "both" or not set(parts) <= set(_PARTS) or len(set(parts)) < len(parts):
        raise ConfigError(
            f"--parts {args.parts}: give both first (the ramp follows from it), then weights, "
            "activations or neither"
        )
    sizes = {
        "--points": (args.points, 2),
        "--batch-size": (args.batch_size, 1),
        "--max-tokens": (args.max_tokens, 0),
        "--seq-len": (1 if args.seq_len is None else args.seq_len, 1),
    }
    for name, (value, least) in sizes.items():
        if not value >= least or math.isinf(value):
            raise ConfigError(f"{name} {value:g} is too small or infinite; give {least} or more")
    if not 1e-5 <= args.max_rise < math.inf:
        raise ConfigError(f"--max-rise {args.max_rise:g} is no rise of a loss; give e.g. 0.01")
    return parts


def _print_curves(curves: "list[Curve]") -> None:
    print("\nλ       " + "".join(f"{curve.part:>22}" for curve in curves))
    for i, strength in enumerate(curves[0].strengths):
        cells = (f"{c.rises[i].rise:+12.4f} ± {c.rises[i].error:.4f}" for c in curves)
        print(f"{strength:<8.3g}" + "".join(f"{cell:>22}" for cell in cells))


def _print_layers(damages: "list[Damage]") -> None:
    from bitscale.proposal import start_later

    if not damages:
        return
    print(f"\nternary by itself ({len(damages)} groups, the costliest first)")
    width = max(len(damage.group) for damage in damages)
    for damage in damages[:_SHOWN_LAYERS]:
        print(f"  {damage.group:<{width}}  {damage.rise:+.4f} ± {damage.error:.4f}")
    if len(damages) > _SHOWN_LAYERS:
        print(f"  ... {len(damages) - _SHOWN_LAYERS} more in the JSON file")
    late = start_later(damages)
    advice = ", ".join(late) if late else "none stands out: all can begin together"
    print(f"could begin later than the others: {advice}\n")


def _write(
    args: argparse.Namespace,
    path: Path,
    step: int,
    prober: "Prober",
    num_tokens: int,
    curves: "list[Curve]",
    damages: "list[Damage]",
    proposal: "Proposal",
) -> None:
    import json

    from bitscale.errors import DataError
    from bitscale.proposal import IDEAL, drawn_ramps, start_later
    from bitscale.report.probe_chart import draw_probe

    own_run = path.parent.parent if path.parent.name == "checkpoints" else Path()
    out = args.out or own_run
    figures = {
        "checkpoint": str(path),
        "step": step,
        "quant": args.quant,
        "split": args.split,
        "num_tokens": num_tokens,
        "loss": prober.loss,
        "curves": {
            c.part: [
                {"lambda": s, **r._asdict()} for s, r in zip(c.strengths, c.rises, strict=True)
            ]
            for c in curves
        },
        "layers": [damage._asdict() for damage in damages],
        "could_begin_later": start_later(damages),
        "proposal": {**proposal._asdict(), "overrides": proposal.overrides},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix in ("json", "png"):
            staging = out / f".probe-{step:08d}.{suffix}.partial"
            if suffix == "json":
                staging.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            else:
                ramps = drawn_ramps(curves[0].strengths, [rise.rise for rise in curves[0].rises])
                draw_probe(staging, prober.loss, curves, damages, ramps, IDEAL, proposal.shape)
            staging.replace(out / f"probe-{step:08d}.{suffix}")
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    print(f"wrote {out / f'probe-{step:08d}.json'} and .png")
