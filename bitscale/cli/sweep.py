"""`bitscale sweep`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitscale.sweep.campaign import Campaign
    from bitscale.sweep.schedule import Schedule

EXIT_FAILURE = 1
EXIT_PREEMPTED = 75

_EPILOG = """\
examples:
  bitscale sweep configs/sweeps/transition-point.yaml --dry-run
  bitscale sweep configs/sweeps/transition-point.yaml --out runs/sweeps --workers 2
  bitscale sweep configs/sweeps --out runs/sweeps --report --claims docs/results/seed-claims.md
  bitscale sweep configs/sweeps --report --table docs/results/seed-claims.csv \\
      --claims docs/results/seed-claims.md --figures docs/images/claims
  bitscale sweep mine.yaml train.dtype=bf16 --backend slurm --slurm slurm_partition=gpu \\
      --slurm gpus_per_node=1 --slurm timeout_min=240
  bitscale sweep mine.yaml --backend print > commands.sh

Stop it when you like: the same command goes on, and does nothing for what is finished.
exit codes: 0 done; 1 a cell failed twice, or could not begin; 2 bad input; 75 stopped by SIGTERM
or Ctrl-C
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="many runs from one file; shared 16-bit parts are trained once",
        description="Train every cell of the sweep files (docs/sweeps.md), write RESULTS.parquet "
        "and .csv, draw one figure a sweep and judge its claims.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items",
        nargs="+",
        metavar="SWEEP.yaml|KEY=VALUE",
        help="sweep files, or directories of them; overrides of their base configurations",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps"), metavar="DIR",
                        help="runs and results (default: runs/sweeps)")  # fmt: skip
    parser.add_argument("--over", type=Path, metavar="FILE.yaml", help="goes over every base")
    parser.add_argument("--seeds", default="", metavar="LIST", help="instead of the files': 0-4,7")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at once (default: cores)")
    parser.add_argument("--disk-gib", type=_positive, metavar="N",
                        help="what all checkpoints may take at once")  # fmt: skip
    parser.add_argument("--backend", choices=("local", "slurm", "print"), default="local")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained")
    parser.add_argument(
        "--report", action="store_true", help="train nothing: collect, draw and judge"
    )
    parser.add_argument(
        "--claims", type=Path, metavar="FILE.md", help="also write the verdicts, and FILE.csv"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE.csv", help="with --report: judge it instead of the runs"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="default: OUT/figures")
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="start every run with it, e.g. 'torchrun --standalone --nproc-per-node 2'",
    )
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="NAME=VALUE", help="submitit parameter"
    )
    parser.add_argument("--cluster", default="slurm", help=argparse.SUPPRESS)
    parser.set_defaults(run=run, overrides=[])


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def run(args: argparse.Namespace) -> int:
    import shlex

    from bitscale.errors import ConfigError
    from bitscale.sweep import campaign as campaigns
    from bitscale.sweep.spec import read_seeds

    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers} trains nothing; give 1 or more")
    if args.table is not None and not args.report:
        raise ConfigError("--table is for --report; leave it out to train")
    paths = [Path(item) for item in args.items if "=" not in item]
    overrides = [item for item in args.items if "=" in item] + args.overrides
    seeds = read_seeds(args.seeds) if args.seeds else ()
    campaign = campaigns.plan(paths, overrides, args.out, args.over, seeds)
    trains = not (args.dry_run or args.report or args.backend == "print")
    with campaigns.sole_trainer(campaign, enabled=trains):
        schedule = campaigns.make_schedule(campaign, shlex.split(args.launcher), args.disk_gib)
        return _run(args, campaign, schedule)


def _run(args: argparse.Namespace, campaign: "Campaign", schedule: "Schedule") -> int:
    import shlex

    from bitscale.sweep import campaign as campaigns

    for line in campaigns.describe(campaign, schedule):
        print(line, file=sys.stderr if args.backend == "print" else sys.stdout, flush=True)
    if args.dry_run:
        print("\n".join(campaigns.table_of_runs(campaign, schedule)))
        return 0
    if args.backend == "print" and not args.report:
        from bitscale.sweep.commands import command_list

        print("\n".join(command_list(schedule, shlex.split(args.launcher) or ["python"])))
        return 0
    whole = args.report or _train(args, campaign, schedule)
    _report(args, campaign)
    if args.report:
        return 0
    return _conclude(campaign, schedule) if whole else EXIT_PREEMPTED


def _train(args: argparse.Namespace, campaign: "Campaign", schedule: "Schedule") -> bool:
    from bitscale.sweep.progress import Progress

    progress = Progress(schedule, campaign.names)
    if args.backend == "slurm":
        from bitscale.sweep.slurm import make_executor, run_slurm

        executor = make_executor(args.out, args.cluster, _parameters(args.slurm))
        campaign.store.check_corpora(schedule.remaining())
        return run_slurm(schedule, progress, executor)
    from bitscale.sweep.local import default_workers, run_local

    campaign.store.check_corpora(schedule.remaining())
    return run_local(schedule, progress, args.workers or default_workers())


def _report(args: argparse.Namespace, campaign: "Campaign") -> None:
    from bitscale.fit.table import read_table
    from bitscale.sweep import campaign as campaigns

    rows = read_table(args.table) if args.table else campaigns.collect(campaign)
    figures = args.figures or args.out / "figures"
    judgements = campaigns.report(campaign, rows, figures, lambda text: print(text, flush=True))
    if not args.table:
        print(f"wrote {args.out / 'RESULTS.parquet'} and .csv")
    if args.claims:
        from bitscale.sweep.claims import write_claims

        write_claims(args.claims, campaign, rows, judgements, figures)
        print(f"wrote {args.claims}")


def _conclude(campaign: "Campaign", schedule: "Schedule") -> int:
    names = campaign.names
    for key, lines in schedule.failed.items():
        print(f"failed twice: {names[key]}; {schedule.store.log(key)} ends with", file=sys.stderr)
        print("\n".join(f"    {line}" for line in lines), file=sys.stderr)
    for run in schedule.blocked():
        print(f"not begun, its trunk failed: {names[run.key]}", file=sys.stderr)
    for run in schedule.not_begun():
        why = "it waits for a checkpoint, which the same command trains again, or for --disk-gib"
        if run.key in schedule.elsewhere:
            why = "another job trains it; when that has ended, the same command goes on"
        print(f"not done: {names[run.key]} ({run.key}): {why}", file=sys.stderr)
    return EXIT_FAILURE if schedule.failed or schedule.not_begun() else 0


def _parameters(texts: list[str]) -> dict[str, Any]:
    """`timeout_min=60` -> {"timeout_min": 60}."""
    from bitscale.errors import ConfigError

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--slurm {text!r} is not of the form NAME=VALUE")
        found[name] = int(value) if value.isdecimal() else value
    return found
