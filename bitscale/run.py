"""What a run is made of, apart from the training itself: corpora, identity, directory."""

import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bitscale import __version__, checkpoint
from bitscale.config import Config, section_items, to_tree, to_yaml, transition_step
from bitscale.data.corpus import PreparedCorpus, load_corpus
from bitscale.errors import CheckpointError, ConfigError, DataError
from bitscale.mesh import Mesh
from bitscale.quant.schedule import SIXTEEN_BIT, quant_strength
from bitscale.recorder import METRICS_NAME, has_begun, read_lines
from bitscale.sources import ForeignSource, StateSource, locate

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


class Comparison(NamedTuple):
    """This run and what it continues from."""

    differences: list[str]  # allowed ones
    notes: list[str]  # of a foreign checkpoint: what it is, and what it does not say


def compare(
    cfg: Config, ours: Mapping[str, str], source: StateSource, allowed: Collection[str]
) -> Comparison:
    """Hold `ours`, the identity of `cfg`, against what `source` says of itself.

    Our own checkpoints say everything. Of a foreign one only what it says is compared, and the
    position in the data; nothing else needs to be allowed. Neither may be a 16-bit one of after
    the transition, nor may λ fall.

    Raises CheckpointError for a difference that is not in `allowed`.
    """
    if not isinstance(source, ForeignSource):
        theirs = identity_for(cfg, source.meta)
        if _has_missed_transition(cfg, source.meta):
            ours, theirs = _with_transition(cfg, ours, theirs, f"step {source.meta.step} or later")
        elif _would_fall_back(cfg, source.meta):
            ours, theirs = _with_transition(
                cfg, ours, theirs, f"step {source.meta.step} or earlier"
            )
        differences = check_identity(ours, theirs, source.path, allowed)
        differences += check_optimizer(cfg, source.meta, source.path, allowed)
        return Comparison(differences, [])
    theirs = source.meta.identity
    notes = _notes(source, ours)
    step = source.meta.step
    ours = {key: ours.get(key, "null") for key in theirs}
    if "data.position" in theirs:
        ours["data.position"] = f"{step * cfg.train.global_batch_size} sequences"
    start = transition_step(cfg)
    if start is not None and start < step:  # its weights are 16-bit ones for all that is known
        ours, theirs = _with_transition(cfg, ours, theirs, f"step {step} or later")
    differences = check_identity(ours, theirs, source.path, allowed)
    if source.has_optimizer_state:
        differences += check_optimizer(cfg, source.meta, source.path, allowed)
    return Comparison(differences, notes)


def _has_missed_transition(cfg: Config, meta: checkpoint.Meta) -> bool:
    """Whether a checkpoint of ours is a 16-bit one, and a run of `cfg` ternary before it: λ would
    jump, and the policy for the optimizer's state never act."""
    start = transition_step(cfg)
    if start is None or start >= meta.step or meta.lambda_weight or meta.lambda_activation:
        return False
    never_begins = meta.config.get("transition", {}).get("at") is None
    # A ramp's first step has λ = 0, too.
    return never_begins or quant_strength(meta.step - 1, cfg) != SIXTEEN_BIT


def _would_fall_back(cfg: Config, meta: checkpoint.Meta) -> bool:
    """Whether λ of a run of `cfg` is lower at the checkpoint's step than it was before. A longer
    run with the same `transition.at.fraction`, for one, has its transition later."""
    strength = quant_strength(meta.step, cfg)
    return strength.weight < meta.lambda_weight or strength.activation < meta.lambda_activation


def _with_transition(
    cfg: Config, ours: Mapping[str, str], theirs: Mapping[str, str], there: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Both sides with where the transition is, and where it was or might be."""
    start = transition_step(cfg)
    here = "null" if start is None else f"step {start}"
    return {**ours, "transition.at": here}, {**theirs, "transition.at": there}


def _notes(source: ForeignSource, ours: Mapping[str, str]) -> list[str]:
    notes = [f"it is a {source.tensors.format} checkpoint"]
    if not source.has_optimizer_state:
        notes.append("it holds weights only: Adam's moments and step counts start at 0")
    unstated = [key for key in ours if key not in source.meta.identity]
    if unstated:
        notes.append(f"not stated by {source.path}: {', '.join(_in_sections(unstated, ours))}")
    return notes


def _in_sections(keys: Collection[str], all_keys: Collection[str]) -> list[str]:
    """`keys` in fewer words: a section of which none of `all_keys` is left out is named once."""
    shown = []
    for key in keys:
        section = key.split(".")[0]
        whole = {other for other in all_keys if other.split(".")[0] == section}
        shown.append(f"{section}.*" if len(whole) > 1 and whole <= set(keys) else key)
    return list(dict.fromkeys(shown))


def identity_for(cfg: Config, meta: checkpoint.Meta) -> dict[str, str]:
    """The checkpoint's identity as a run of `cfg` compares it: a SubLN that has yet to begin to act
    makes no other model of a trunk without one."""
    if not sub_norms_wait(cfg, meta):
        return meta.identity
    return meta.identity | {"model.sub_norm": json.dumps(cfg.model.sub_norm)}


def sub_norms_wait(cfg: Config, meta: checkpoint.Meta) -> bool:
    """Whether one side has SubLN from the transition on, the other none, and neither has come so
    far: the weights are then new, and either side may lack them."""
    start = transition_step(cfg)
    theirs = meta.config.get("model", {}).get("sub_norm", False)
    sides = {str(cfg.model.sub_norm), str(theirs)}
    before = meta.lambda_weight == 0.0 and (start is None or meta.step <= start)
    return sides == {"False", "transition"} and before


def check_optimizer(
    cfg: Config, meta: checkpoint.Meta, where: Path, allowed: Collection[str]
) -> list[str]:
    """Descriptions of an allowed change of optimizer, with which the moments start afresh.

    Raises CheckpointError for another optimizer than the checkpoint's, naming both. At the very
    step of the transition a `reset` discards the moments anyway, and so allows it.
    """
    if meta.adam_steps and not any(meta.adam_steps.values()):
        return []  # weights only: there are no moments to leave behind
    theirs = meta.config.get("optim", {}).get("name", "adamw")  # before there was a choice
    if theirs == cfg.optim.name:
        return []
    text = f'optim.name is "{cfg.optim.name}" here and "{theirs}" in {where}'
    resets = meta.step == transition_step(cfg) and cfg.transition.optimizer_state == "reset"
    if not resets and not {"optim.name", "optim"} & set(allowed):
        raise CheckpointError(
            f"{text}, whose moments mean something else; use the checkpoint's, or pass "
            "--allow-change optim.name to go on with fresh moments"
        )
    return [f"{text}: its moments are left behind"]


def find_resume(cfg: Config, resume: str | None) -> Path | None:
    """The checkpoint to continue from: None for a fresh start.

    `resume` is None, "auto" (the latest of this run, if any) or a path.
    """
    root = checkpoints_dir(cfg)
    metrics = Path(cfg.run.dir) / METRICS_NAME
    if resume == "auto":
        own = checkpoint.latest_checkpoint(root) if root.is_dir() else None
        trunk = _trunk(metrics)
        return own or (None if trunk is None else locate(trunk))
    chosen = None if resume is None else locate(Path(resume))
    if chosen is not None and _same(chosen.parent, root):
        if not checkpoint.is_checkpoint_name(chosen.name):
            raise ConfigError(
                f"--resume {chosen} is no checkpoint in force of run.dir={cfg.run.dir!r}; to go "
                "back to it, rename it step-NNNNNNNN (its step); to fork from it, move it elsewhere"
            )
        return chosen
    trunk = _trunk(metrics)
    killed_before_saving = chosen is not None and trunk is not None and _same(chosen, trunk)
    if checkpoint.list_checkpoints(root) or (has_begun(metrics) and not killed_before_saving):
        raise ConfigError(
            f"run.dir={cfg.run.dir!r} already holds a run; continue it with --resume auto, or "
            "choose another run.dir"
        )
    return chosen


def check_same_checkpoint(mesh: Mesh, path: Path | None) -> None:
    """That every rank resumes from the same one (a collective).

    On a network file system a rank may still see an older `latest`, or none.
    """
    seen = mesh.gather_objects("none" if path is None else path.name)
    for rank, name in enumerate(seen):
        if name != seen[0]:
            raise CheckpointError(
                f"rank {rank} would resume from {name} and rank 0 from {seen[0]}: the file system "
                "does not show every host the same yet; start again, or name the checkpoint with "
                "--resume PATH"
            )


def checkpoints_to_go_back_to(cfg: Config) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoint that the run began from, if it still exists, and of all its
    own, oldest first."""
    trunk = _trunk(Path(cfg.run.dir) / METRICS_NAME)
    began_from = [] if trunk is None or not (trunk / "meta.json").is_file() else [trunk]
    paths = [*began_from, *checkpoint.list_checkpoints(checkpoints_dir(cfg))]
    return [(checkpoint.read_meta(path).step, path) for path in paths]


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
