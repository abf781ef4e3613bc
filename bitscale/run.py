"""What a run is made of, apart from the training itself: corpora, identity, directory."""

import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bitscale import __version__, checkpoint
from bitscale.config import Config, section_items, to_tree, to_yaml
from bitscale.data.corpus import PreparedCorpus, load_corpus
from bitscale.errors import CheckpointError, ConfigError, DataError
from bitscale.recorder import METRICS_NAME, read_lines

# Keys that cannot change results; a resumed run may differ in them.
_FREE_KEYS = {"quant.kernel"}


def load_corpora(cfg: Config) -> list[PreparedCorpus]:
    """Every corpus of `data.corpora`; they must share one tokenizer."""
    corpora = [load_corpus(Path(corpus.path)) for corpus in cfg.data.corpora]
    first = corpora[0]
    for other in corpora[1:]:
        if other.manifest.tokenizer.fingerprint != first.manifest.tokenizer.fingerprint:
            raise DataError(
                f"{other.directory} and {first.directory} were prepared with different "
                "tokenizers; prepare one with the other's (--tokenizer PATH)"
            )
    return corpora


def resolve_vocab(cfg: Config, vocab_size: int) -> Config:
    """`cfg` with `model.vocab_size` filled in from the tokenizer, or checked against it."""
    given = cfg.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size}; "
            "set it to null to take the tokenizer's"
        )
    model = cfg.model.model_copy(update={"vocab_size": given or vocab_size})
    return cfg.model_copy(update={"model": model})


def identity(cfg: Config, corpora: Sequence[PreparedCorpus]) -> dict[str, str]:
    """What a resumed run must share with its checkpoint, by configuration key.

    Model and quantizer (else the weights mean something else) and everything that decides which
    tokens come at which step (else text would be repeated or left out unnoticed).
    """
    tree = to_tree(cfg)
    items = section_items(cfg, "model", "quant")
    items["tokenizer"] = corpora[0].manifest.tokenizer.fingerprint
    items["data.corpora"] = ", ".join(
        f"{corpus.fingerprint[:16]} x {entry.weight}"
        for corpus, entry in zip(corpora, cfg.data.corpora, strict=True)
    )
    for section, key in (
        ("data", "seq_len"),
        ("data", "reset_attention"),
        ("data", "seed"),
        ("train", "global_batch_size"),
    ):
        items[f"{section}.{key}"] = json.dumps(tree[section][key])
    return {key: value for key, value in items.items() if key not in _FREE_KEYS}


def check_identity(
    ours: Mapping[str, str], theirs: Mapping[str, str], where: Path, allowed: Collection[str]
) -> list[str]:
    """Descriptions of the allowed differences; CheckpointError for the others, naming both sides.

    `allowed` holds keys, or sections such as "data".
    """
    differences = []
    for key in sorted(ours.keys() | theirs.keys()):
        if theirs.get(key) in (ours.get(key), checkpoint.ANY):
            continue
        text = f"{key} is {ours.get(key, 'unset')} here and {theirs.get(key, 'unset')} in {where}"
        if key not in allowed and key.split(".")[0] not in allowed:
            raise CheckpointError(
                f"{text}; use the checkpoint's, or pass --allow-change {key} to go on"
            )
        differences.append(text)
    return differences


def find_resume(cfg: Config, resume: str | None) -> Path | None:
    """The checkpoint to continue from: None for a fresh start.

    `resume` is None, "auto" (the latest of this run, if any) or a path.
    """
    root = checkpoints_dir(cfg)
    metrics = Path(cfg.run.dir) / METRICS_NAME
    if resume == "auto":
        own = checkpoint.latest_checkpoint(root) if root.is_dir() else None
        trunk = _trunk(metrics)
        return own or (None if trunk is None else checkpoint.resolve(trunk))
    chosen = None if resume is None else checkpoint.resolve(Path(resume))
    if chosen is not None and _same(chosen.parent, root):
        return chosen
    trunk = _trunk(metrics)
    killed_before_saving = chosen is not None and trunk is not None and _same(chosen, trunk)
    if checkpoint.list_checkpoints(root) or (metrics.exists() and not killed_before_saving):
        raise ConfigError(
            f"run.dir={cfg.run.dir!r} already holds a run; continue it with --resume auto, or "
            "choose another run.dir"
        )
    return chosen


def _trunk(metrics: Path) -> Path | None:
    """The checkpoint that the run began from; None if it began from nothing (or not yet)."""
    if not metrics.is_file():
        return None
    _, _, first = next(read_lines(metrics), (0, b"", {}))
    return Path(first["checkpoint"]) if first.get("event") == "resume" else None


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def checkpoints_dir(cfg: Config) -> Path:
    return Path(cfg.run.dir) / "checkpoints"


def write_config(cfg: Config) -> None:
    """Put the resolved configuration beside the run's metrics."""
    directory = Path(cfg.run.dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = directory / ".config.yaml.partial"
        staging.write_text(to_yaml(cfg))
        staging.replace(directory / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run.dir={cfg.run.dir!r} is not writable: {error}") from error


def versions() -> dict[str, str]:
    """Versions that can change numbers, for provenance."""
    packages = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")
    return {
        "bitscale": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
