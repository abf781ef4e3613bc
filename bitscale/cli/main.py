"""The `bitscale` command: subcommands, exit codes, nothing else.

0 done; 1 a failure inside (traceback); 2 bad input, one line on stderr; 3 a rank hung; 4 another
rank was lost; 75 stopped by a signal after saving (EX_TEMPFAIL). After 3, 4 and 75 launch again
with --resume auto.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from bitscale import __version__
from bitscale.cli import (
    config,
    doctor,
    evaluate,
    export,
    fit,
    import_model,
    inspect,
    plan,
    prepare,
    probe,
    recommend,
    report,
    runs,
    status,
    supervise,
    sweep,
    train,
    verify,
)
from bitscale.errors import BitscaleError, ConfigError, PeerLost, TrainingFault

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_PEER_LOST = 4  # 3 is watch.EXIT_HUNG
_SILENT_RANK_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="bitscale",
        description="Pretrain in 16 bit, switch to 1.58 bit (ternary) in the middle of the run.",
        epilog="Each command has its own --help with examples. Documentation: docs/.",
    )
    parser.add_argument("--version", action="version", version=f"bitscale {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        prepare,
        plan,
        train,
        supervise,
        evaluate,
        probe,
        export,
        import_model,
        inspect,
        verify,
        report,
        status,
        runs,
        sweep,
        fit,
        recommend,
        config,
        doctor,
    ):
        command.add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest and (
        not hasattr(args, "overrides") or any(t.startswith("-") or "=" not in t for t in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # argparse stops collecting them at the first option
    try:
        code: int = args.run(args)
        return code
    except BitscaleError as error:
        _print_error(error)
        if isinstance(error, PeerLost):
            return EXIT_PEER_LOST
        return EXIT_FAILURE if isinstance(error, TrainingFault) else EXIT_BAD_INPUT
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _print_error(error: BitscaleError) -> None:
    """One line; what is the same on every rank only rank 0 tells, all else names rank and host."""
    rank = os.environ.get("RANK", "0")
    same_everywhere = isinstance(error, ConfigError | TrainingFault)
    if same_everywhere and rank != "0":
        # The launcher stops every rank at the first that exits: let rank 0 speak before that.
        time.sleep(_SILENT_RANK_SECONDS)
        return
    one_rank = os.environ.get("WORLD_SIZE", "1") == "1"
    where = "" if same_everywhere or one_rank else f" on rank {rank} ({os.uname().nodename})"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
