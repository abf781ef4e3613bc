"""`bitscale plan`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale plan configs/7b.yaml --nodes 4 --gpus-per-node 8 quant.kernel=auto
  bitscale plan configs/70b.yaml --nodes 32 --gpus-per-node 8 --search --json plan.json
  bitscale plan configs/350m.yaml --nodes 1 --gpus-per-node 8 --gpu a100-80 --mfu 0.4 \\
      model.vocab_size=32768 transition.at.fraction=0.2
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory, traffic, FLOPs and days of a configuration on a cluster",
        description="Reckon, without starting anything, what a rank holds and sends in 16 bit and "
        "ternary, what bounds the speed, and how long the run takes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted override")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="ranks")
    parser.add_argument("--gpu", default="h200", help="h200 (default), h100, a100-80, b200, cpu")
    parser.add_argument("--mfu", type=float, metavar="X", help="MFU to reckon the time with")
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="X",
        help="without --mfu: share of the bound that is reached (default 0.5)",
    )
    parser.add_argument(
        "--usable", type=float, metavar="X", help="share of the memory to fill (default 0.92)"
    )
    parser.add_argument(
        "--search", action="store_true", help="try all layouts, rank those that fit"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="of --search (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale import plan as planning
    from bitscale.cli.json_file import refuse_unwritable, write_json
    from bitscale.config import load_config

    refuse_unwritable(args.json)
    cfg = load_config(args.config, args.overrides)
    cluster = planning.Cluster(args.nodes, args.gpus_per_node, planning.find_gpu(args.gpu))
    shares = {
        "mfu": args.mfu,
        "efficiency": planning.DEFAULT_EFFICIENCY if args.efficiency is None else args.efficiency,
        "usable": planning.DEFAULT_USABLE if args.usable is None else args.usable,
    }
    if args.search:
        found = planning.search(cfg, cluster, **shares)
        print(planning.show_ranking(found, args.top), end="")
        tree: object = [planning.to_tree(plan) for plan in found.fitting[: args.top]]
        print(f"\nthe first of them:\n\n{planning.show(found.fitting[0])}", end="")
    else:
        plan = planning.make_plan(cfg, cluster, **shares)
        print(planning.show(plan), end="")
        tree = planning.to_tree(plan)
    if args.json:
        write_json(args.json, tree)
    return 0
