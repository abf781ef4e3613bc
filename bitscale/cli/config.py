"""`bitscale config`."""

import argparse

_EPILOG = """\
examples:
  bitscale config --show configs/quickstart.yaml train.steps=200
  bitscale config --deepspeed configs/quickstart.yaml --world-size 8
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "config",
        help="check a configuration and print what it resolves to",
        description="Check a configuration and print it resolved, or the DeepSpeed JSON it means.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--show", metavar="FILE", help="print the resolved configuration as YAML")
    what.add_argument("--deepspeed", metavar="FILE", help="print the derived DeepSpeed JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted override")
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="ranks, for --deepspeed (default 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.config import config_hash, load_config, to_yaml

    cfg = load_config(args.show or args.deepspeed, args.overrides)
    if args.show:
        print(f"# config hash {config_hash(cfg)}")
        print(to_yaml(cfg), end="")
        return 0
    import json

    from bitscale.config import check_world_size
    from bitscale.engine.ds_config import deepspeed_config

    check_world_size(cfg, args.world_size)
    print(
        json.dumps(
            deepspeed_config(cfg, args.world_size // (cfg.parallel.tp * cfg.parallel.pp)), indent=2
        )
    )
    return 0
