"""`bitscale import`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale import Llama-3.2-1B checkpoint
  bitscale train run.yaml run.dir=runs/ternary --resume checkpoint
  bitscale import bitnet-b1.58-2B-4T checkpoint --config run.yaml
  bitscale import stories15M.bin checkpoint
  bitscale import megatron/checkpoints checkpoint --config run.yaml
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "import",
        help="make a checkpoint to train on from a published model or another trainer's state",
        description="Make a checkpoint (fp32 masters, new moments, step 0) from a Hugging Face "
        "directory (Llama, Mistral, Qwen2, Qwen3, OLMo, OLMo 2, BitNet), a packed export, a GGUF "
        "file, llama2.c's .bin or a Megatron-core checkpoint (docs/conversion.md); or, with "
        "--config, from a DeepSpeed or Megatron-core checkpoint, with its optimizer state and step "
        "(docs/checkpoints.md).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="MODEL", type=Path, help="directory, GGUF or .bin file")
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory, the checkpoint")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="of the run that will go on from it"
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens of a sequence (default: the model's)"
    )
    parser.add_argument(
        "--scales",
        choices=("divide", "multiply"),
        help="how packed codes use weight_scale (default: as the model's linear_class says)",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="as of train: let this key differ from what a trainer's checkpoint says",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --config")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.config import load_config
    from bitscale.convert.certificate import read_certificate
    from bitscale.convert.to_checkpoint import write_checkpoint
    from bitscale.errors import ConfigError
    from bitscale.run import versions
    from bitscale.sources import holds_training_state, locate
    from bitscale.sources.as_model import open_model

    if args.overrides and args.config is None:
        raise ConfigError(
            f"{args.overrides[0]!r} changes a configuration, and none is given; add --config FILE"
        )
    if args.seq_len is not None and args.seq_len < 1:
        raise ConfigError(
            f"--seq-len {args.seq_len} is not positive; leave it out for the model's own"
        )
    is_state = holds_training_state(args.source)
    # Our own export to Megatron-core holds weights and says all of them that is to be known.
    if is_state and args.config is not None and read_certificate(locate(args.source)) is None:
        return _import_state(args)
    cfg = None if args.config is None else load_config(args.config, args.overrides)
    seq_len = args.seq_len or (None if cfg is None else cfg.data.seq_len)
    source = open_model(args.source, cfg, seq_len=seq_len, scales=args.scales)
    write_checkpoint(source, args.out, versions(), cfg)
    m = source.model
    print(
        f"imported {args.source} to {args.out}: {source.form}, {m.num_layers} layers of "
        f"{m.d_model}, {source.num_parameters / 1e6:.1f} M parameters; "
        f"train with --resume {args.out}"
    )
    if is_state and source.form.endswith("masters"):
        print("note: weights only, as step 0; with --config optimizer state and step come along")
    return 0


def _import_state(args: argparse.Namespace) -> int:
    from bitscale import run as runs
    from bitscale.config import load_config
    from bitscale.sources import locate, open_state
    from bitscale.sources.to_checkpoint import import_state

    cfg = load_config(args.config, args.overrides)
    corpora = runs.load_corpora(cfg)
    cfg = runs.resolve_vocab(cfg, corpora[0].vocab_size)
    source, identity = open_state(locate(args.source), cfg), runs.identity(cfg, corpora)
    comparison = runs.compare(cfg, identity, source, args.allow_change)
    for line in (*comparison.notes, *(f"allowed change: {d}" for d in comparison.differences)):
        print(line)
    import_state(source, cfg, args.out, identity, runs.versions())
    print(
        f"imported {source.path} to {args.out}: step {source.meta.step:,}, masters and moments of "
        f"{len(source.meta.shapes)} parameters; train with --resume {args.out}"
    )
    return 0
