"""`bitscale train`."""

import argparse
import signal

EXIT_PREEMPTED = 75

_EPILOG = """\
examples:
  bitscale train configs/quickstart.yaml
  bitscale train configs/quickstart.yaml train.steps=200 transition.at.fraction=0.5
  bitscale train configs/quickstart.yaml --resume auto
  bitscale train qat.yaml --resume runs/trunk/checkpoints/step-00001000
  torchrun --nproc-per-node 2 -m bitscale.cli.main train configs/quickstart.yaml
  deepspeed --num_gpus 2 --module bitscale.cli.main train configs/quickstart.yaml

exit codes: 0 done; 1 failure; 2 bad input; 3 a rank made no progress for watch.hang_seconds;
4 another rank was lost, or late; 75 stopped by SIGTERM or Ctrl-C after saving
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model: 16 bit, ternary, or one after the other",
        description="Train a model as CONFIG says; dotted overrides follow it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted override, e.g. train.steps=200"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue from the run's latest checkpoint, or from a checkpoint or run at PATH",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="on resume, let this key (or section, e.g. data) differ from the checkpoint's",
    )
    # The deepspeed launcher appends it; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.config import load_config
    from bitscale.ranks import adopt_ranks

    adopt_ranks()
    cfg = load_config(args.config, args.overrides)
    from bitscale.train import train  # after the configuration is known to be sound: torch is slow

    outcome = train(cfg, resume=args.resume, allow_change=args.allow_change)
    # How the run has ended is known: a signal while Python and torch are taken down (Slurm's,
    # before the time is up) must not turn 0 or 75 into a failure.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return EXIT_PREEMPTED if outcome.preempted else 0
