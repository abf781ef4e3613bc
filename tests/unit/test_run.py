"""What a run is made of: corpora, vocabulary, identity, and where it continues."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitscale import __version__, run
from bitscale.checkpoint import Meta
from bitscale.config import Config, load_config, to_tree
from bitscale.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]
WHERE = Path("runs/a/checkpoints/step-00000010")


@pytest.fixture
def cfg(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> Config:
    return make_config(f"data.corpora=[{{path: {corpus}}}]", f"run.dir={tmp_path / 'run'}")


# --- Corpora and vocabulary ---


def test_corpora_must_share_a_tokenizer(
    make_config: MakeConfig, make_corpus: Callable[..., Path], corpus: Path
) -> None:
    same = make_corpus(1, tokenizer=corpus / "tokenizer.model")
    cfg = make_config(f"data.corpora=[{{path: {corpus}}}, {{path: {same}}}]")
    assert [c.directory for c in run.load_corpora(cfg)] == [corpus, same]

    other = make_corpus(2)
    cfg = make_config(f"data.corpora=[{{path: {corpus}}}, {{path: {same}}}, {{path: {other}}}]")
    with pytest.raises(DataError) as error:
        run.load_corpora(cfg)
    assert f"{other} and {corpus}" in str(error.value)
    assert "different tokenizers; prepare one with the other's (--tokenizer PATH)" in str(
        error.value
    )


def test_a_missing_corpus_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a prepared corpus.*bitscale prepare"):
        run.load_corpora(make_config("data.corpora=[{path: nowhere}]"))


def test_vocabulary_comes_from_the_tokenizer_or_is_padded(make_config: MakeConfig) -> None:
    assert run.resolve_vocab(make_config(), 300).model.vocab_size == 300
    padded = make_config("model.vocab_size=512")
    assert run.resolve_vocab(padded, 300).model.vocab_size == 512
    assert run.resolve_vocab(padded, 512) == padded
    with pytest.raises(ConfigError) as error:
        run.resolve_vocab(padded, 513)
    assert "model.vocab_size=512 is smaller than the tokenizer's 513" in str(error.value)
    assert "null" in str(error.value)


# --- Identity ---


def identity_with(cfg: Config, *overrides: str, folder: Path) -> dict[str, str]:
    """Identity of `cfg` with overrides, as a later session would compute it."""
    run_dir = folder / "again"
    path = folder / "config.yaml"
    run.write_config(
        cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(run_dir)})})
    )
    path = run_dir / "config.yaml"
    changed = load_config(path, overrides)
    return run.identity(changed, run.load_corpora(changed))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.num_layers=3", "model.num_layers"),
        ("model.rope_scaling={type: linear, factor: 2.0}", "model.rope_scaling"),
        ("quant.weight_scale=absmedian", "quant.weight_scale"),
        ("data.seq_len=32", "data.seq_len"),
        ("data.seed=1", "data.seed"),
        ("data.reset_attention=true", "data.reset_attention"),
        ("train.global_batch_size=16", "train.global_batch_size"),
    ],
)
def test_what_decides_weights_and_tokens_is_identity(
    override: str, key: str, cfg: Config, tmp_path: Path
) -> None:
    ours = identity_with(cfg, override, folder=tmp_path)
    theirs = identity_with(cfg, folder=tmp_path)
    assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} == {key}


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_size=2",
        "train.steps=500",
        "train.dtype=bf16",
        "engine.zero_stage=3",
        "optim.lr=1.0",
        "transition.at.step=3",
        "log.every=1",
        "checkpoint.every=7",
    ],
)
def test_the_rest_is_free_to_change(override: str, cfg: Config, tmp_path: Path) -> None:
    ours = identity_with(cfg, override, folder=tmp_path)
    assert ours == identity_with(cfg, folder=tmp_path)


def test_text_weights_and_tokenizer_are_identity(
    cfg: Config, corpus: Path, make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    same_tokenizer, other = make_corpus(1, tokenizer=corpus / "tokenizer.model"), make_corpus(2)
    theirs = identity_with(cfg, folder=tmp_path)

    def differing(corpora: str) -> set[str]:
        ours = identity_with(cfg, f"data.corpora={corpora}", folder=tmp_path)
        return {key for key in ours if ours[key] != theirs[key]}

    assert differing(f"[{{path: {corpus}}}]") == set()
    assert differing(f"[{{path: {same_tokenizer}}}]") == {"data.corpora"}
    assert differing(f"[{{path: {corpus}, weight: 2.0}}]") == {"data.corpora"}
    assert differing(f"[{{path: {other}}}]") == {"data.corpora", "tokenizer"}


def test_a_copied_corpus_is_the_same_corpus(cfg: Config, corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in corpus.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    ours = identity_with(cfg, f"data.corpora=[{{path: {moved}}}]", folder=tmp_path)
    assert ours == identity_with(cfg, folder=tmp_path)


OURS = {"model.num_layers": "3", "data.seed": "1", "tokenizer": "abc", "model.bias": "true"}
THEIRS = {"model.num_layers": "2", "data.seed": "1", "tokenizer": "abc"}


def test_equal_identities_have_no_differences() -> None:
    assert run.check_identity(OURS, dict(OURS), WHERE, []) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "key", "values"),
    [
        ({"data.seed": "1"}, {"data.seed": "0"}, "data.seed", "1 here and 0 in"),
        ({"model.bias": "true"}, {}, "model.bias", "true here and unset in"),
        ({}, {"model.bias": "true"}, "model.bias", "unset here and true in"),
        ({"tokenizer": "abc"}, {"tokenizer": "xyz"}, "tokenizer", "abc here and xyz in"),
    ],
)
def test_a_difference_names_both_sides_and_the_option(
    ours: dict[str, str], theirs: dict[str, str], key: str, values: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        run.check_identity(ours, theirs, WHERE, [])
    assert str(error.value) == (
        f"{key} is {values} {WHERE}; use the checkpoint's, or pass --allow-change {key} to go on"
    )
    assert len(run.check_identity(ours, theirs, WHERE, [key])) == 1


def test_allowed_by_key_or_by_section() -> None:
    with pytest.raises(CheckpointError, match=r"--allow-change model\.bias"):
        run.check_identity(OURS, THEIRS, WHERE, [])
    with pytest.raises(CheckpointError, match=r"--allow-change model\.num_layers"):
        run.check_identity(OURS, THEIRS, WHERE, ["model.bias", "data", "num_layers"])
    both = [
        f"model.bias is true here and unset in {WHERE}",
        f"model.num_layers is 3 here and 2 in {WHERE}",
    ]
    assert run.check_identity(OURS, THEIRS, WHERE, ["model.bias", "model.num_layers"]) == both
    assert run.check_identity(OURS, THEIRS, WHERE, ["model"]) == both


# --- Where a run continues ---


def add_checkpoint(run_dir: Path, step: int, *, whole: bool = True, latest: bool = False) -> Path:
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    if whole:
        (path / "meta.json").write_text("{}")
    if latest:
        (path.parent / "latest").write_text(path.name + "\n")
    return path


def add_metrics(run_dir: Path, event: str, **fields: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    line = {"kind": "event", "step": 0, "event": event, **fields}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_fresh_directory_starts_fresh(cfg: Config) -> None:
    assert run.find_resume(cfg, None) is None
    assert run.find_resume(cfg, "auto") is None
    Path(cfg.run.dir).mkdir()
    run.checkpoints_dir(cfg).mkdir()
    assert run.find_resume(cfg, None) is None
    assert run.find_resume(cfg, "auto") is None


def test_auto_takes_the_latest_that_is_whole(cfg: Config) -> None:
    run_dir = Path(cfg.run.dir)
    first = add_checkpoint(run_dir, 5)
    second = add_checkpoint(run_dir, 10)
    add_checkpoint(run_dir, 15, whole=False)
    assert run.find_resume(cfg, "auto") == second  # no pointer yet
    (run_dir / "checkpoints/latest").write_text(first.name + "\n")
    assert run.find_resume(cfg, "auto") == first  # the pointer decides


def test_auto_with_a_pointer_to_nothing(cfg: Config) -> None:
    run_dir = Path(cfg.run.dir)
    add_checkpoint(run_dir, 5)
    add_checkpoint(run_dir, 10, whole=False, latest=True)
    with pytest.raises(CheckpointError) as error:
        run.find_resume(cfg, "auto")
    assert "latest names 'step-00000010', which is missing or incomplete" in str(error.value)
    assert "'step-00000005'" in str(error.value)


def test_a_run_is_never_overwritten(cfg: Config, tmp_path: Path) -> None:
    run_dir = Path(cfg.run.dir)
    elsewhere = add_checkpoint(tmp_path / "trunk", 20)
    message = f"run.dir={cfg.run.dir!r} already holds a run; continue it with --resume auto"
    add_metrics(run_dir, "start")
    for resume in (None, str(elsewhere)):
        with pytest.raises(ConfigError) as error:
            run.find_resume(cfg, resume)
        assert message in str(error.value)
    (run_dir / "metrics.jsonl").unlink()
    add_checkpoint(run_dir, 5)
    for resume in (None, str(elsewhere)):
        with pytest.raises(ConfigError) as error:
            run.find_resume(cfg, resume)
        assert message in str(error.value)


def test_killed_before_the_first_checkpoint(cfg: Config, tmp_path: Path) -> None:
    """A fresh run starts again; a branch goes back to its trunk."""
    run_dir = Path(cfg.run.dir)
    add_metrics(run_dir, "start")
    assert run.find_resume(cfg, "auto") is None
    trunk = add_checkpoint(tmp_path / "trunk", 20)
    add_metrics(run_dir, "resume", checkpoint=str(trunk))
    assert run.find_resume(cfg, "auto") == trunk
    assert run.find_resume(cfg, str(trunk)) == trunk
    own = add_checkpoint(run_dir, 25)
    assert run.find_resume(cfg, "auto") == own


def test_killed_before_the_first_line(cfg: Config, tmp_path: Path) -> None:
    """The same command goes on from the same trunk: nothing else knows of it."""
    trunk = add_checkpoint(tmp_path / "trunk", 20)
    run_dir = Path(cfg.run.dir)
    run_dir.mkdir()
    for torn in ("", '{"kind": "event", "st'):
        (run_dir / "metrics.jsonl").write_text(torn)
        assert run.find_resume(cfg, str(trunk)) == trunk
        assert run.find_resume(cfg, None) is None


def test_resume_from_a_path(cfg: Config, tmp_path: Path) -> None:
    trunk = tmp_path / "trunk"
    first = add_checkpoint(trunk, 20)
    second = add_checkpoint(trunk, 40, latest=True)
    assert run.find_resume(cfg, str(first)) == first
    assert run.find_resume(cfg, str(trunk)) == second
    assert run.find_resume(cfg, str(trunk / "checkpoints")) == second


def test_resume_from_an_earlier_checkpoint_of_the_same_run(cfg: Config) -> None:
    run_dir = Path(cfg.run.dir)
    add_metrics(run_dir, "start")
    first = add_checkpoint(run_dir, 5)
    add_checkpoint(run_dir, 10, latest=True)
    assert run.find_resume(cfg, str(first)) == first


@pytest.mark.parametrize("name", ["superseded-step-00000010", "step-00000010.bak"])
def test_resume_from_what_the_run_has_kept_aside(cfg: Config, name: str) -> None:
    run_dir = Path(cfg.run.dir)
    add_metrics(run_dir, "start")
    aside = add_checkpoint(run_dir, 10).rename(run_dir / "checkpoints" / name)
    add_checkpoint(run_dir, 5, latest=True)
    with pytest.raises(ConfigError) as error:
        run.find_resume(cfg, str(aside))
    assert f"{name} is no checkpoint in force of run.dir" in str(error.value)
    assert "rename it step-NNNNNNNN" in str(error.value)


@pytest.mark.parametrize("resume", ["nowhere", "."])
def test_resume_from_no_checkpoint(
    resume: str, cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here; name a run directory"):
        run.find_resume(cfg, resume)


# --- Directory and provenance ---


def test_configuration_is_written_beside_the_metrics(cfg: Config) -> None:
    run.write_config(cfg)
    run.write_config(cfg)
    files = sorted(path.name for path in Path(cfg.run.dir).iterdir())
    assert files == ["config.yaml"]
    assert load_config(Path(cfg.run.dir) / "config.yaml") == cfg


def test_a_directory_that_cannot_be_made(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir='.*/file/run' is not writable"):
        run.write_config(make_config(f"run.dir={tmp_path}/file/run"))


def test_versions_name_what_can_change_numbers() -> None:
    versions = run.versions()
    assert versions["bitscale"] == __version__
    assert {"python", "torch", "deepspeed", "megatron-core", "numpy"} <= versions.keys()
    assert all(versions.values())


# --- Another optimizer, or SubLN from the transition on ---


def meta_of(cfg: Config, step: int, lambda_weight: float = 0.0) -> Meta:
    model = json.dumps(cfg.model.sub_norm)
    return Meta(
        step=step,
        tokens=0,
        lambda_weight=lambda_weight,
        lambda_activation=lambda_weight,
        config=to_tree(cfg),
        config_hash="",
        identity={"model.sub_norm": model, "model.d_model": "64"},
        shapes={},
        world_size=1,
        versions={},
    )


def test_another_optimizer_names_both_sides(make_config: MakeConfig) -> None:
    trunk, lion = make_config(), make_config("optim.name=lion", "transition.at.step=7")
    meta, where = meta_of(trunk, step=7), Path("trunk/step-7")
    assert run.check_optimizer(trunk, meta, where, ()) == []
    with pytest.raises(CheckpointError) as error:
        run.check_optimizer(lion, meta, where, ["model"])
    for part in ('"lion" here', '"adamw" in trunk/step-7', "--allow-change optim.name", "fresh"):
        assert part in str(error.value)
    for allowed in ("optim", "optim.name"):
        (difference,) = run.check_optimizer(lion, meta, where, [allowed])
        assert "its moments are left behind" in difference
    # A reset at that very step discards them anyway; a step later it would not.
    reset = make_config(
        "optim.name=lion", "transition.at.step=7", "transition.optimizer_state=reset"
    )
    assert run.check_optimizer(reset, meta, where, ())
    with pytest.raises(CheckpointError):
        run.check_optimizer(reset, meta_of(trunk, step=8), where, ())


def test_a_checkpoint_from_before_there_was_a_choice_is_adamws(make_config: MakeConfig) -> None:
    cfg = make_config()
    meta = meta_of(cfg, step=7)
    del meta.config["optim"]["name"]
    assert run.check_optimizer(cfg, meta, Path("old"), ()) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "step", "lambda_weight", "waits"),
    [
        ("transition", "false", 7, 0.0, True),
        ("transition", "false", 6, 0.0, True),
        ("false", "transition", 7, 0.0, True),
        ("transition", "false", 8, 0.0, False),  # it should have begun
        ("transition", "false", 7, 1.0, False),  # a ternary run without it
        ("true", "false", 7, 0.0, False),
        ("true", "transition", 7, 0.0, False),
    ],
)
def test_a_sub_norm_that_waits_makes_no_other_model(
    ours: str, theirs: str, step: int, lambda_weight: float, waits: bool, make_config: MakeConfig
) -> None:
    cfg = make_config(f"model.sub_norm={ours}", "transition.at.step=7")
    meta = meta_of(make_config(f"model.sub_norm={theirs}"), step, lambda_weight)
    assert run.sub_norms_wait(cfg, meta) is waits
    here = {"model.sub_norm": json.dumps(cfg.model.sub_norm), "model.d_model": "64"}
    assert (run.identity_for(cfg, meta) == here) is waits


@pytest.mark.parametrize(
    ("theirs", "step", "lambda_weight", "ramp", "is_refused"),
    [
        ("null", 7, 0.0, "none", False),  # at that very step
        ("null", 8, 0.0, "none", True),
        ("null", 8, 0.0, "linear", True),
        ("null", 8, 1.0, "none", False),  # imported, and ternary
        ("{step: 7}", 8, 0.0, "linear", False),  # the first step of a ramp has λ = 0
        ("{step: 9}", 9, 0.0, "linear", True),
        ("{step: 7}", 9, 0.25, "linear", False),
    ],
)
def test_a_fork_must_not_have_missed_its_transition(
    theirs: str,
    step: int,
    lambda_weight: float,
    ramp: str,
    is_refused: bool,
    make_config: MakeConfig,
) -> None:
    """Its λ would jump, and the policy for the optimizer's state never act."""
    over = f"transition.ramp.over.steps={4 if ramp == 'linear' else 0}"
    cfg = make_config("transition.at.step=7", f"transition.ramp.shape={ramp}", over)
    meta = meta_of(make_config(f"transition.at={theirs}"), step, lambda_weight)
    trunk: Any = SimpleNamespace(path=Path("trunk"), meta=meta)
    if not is_refused:
        assert run.compare(cfg, meta.identity, trunk, ()).differences == []
        return
    with pytest.raises(CheckpointError) as error:
        run.compare(cfg, meta.identity, trunk, ())
    assert str(error.value) == (
        f"transition.at is step 7 here and step {step} or later in trunk; use the checkpoint's, "
        "or pass --allow-change transition.at to go on"
    )
    (difference,) = run.compare(cfg, meta.identity, trunk, ["transition.at"]).differences
    assert "transition.at is step 7" in difference


@pytest.mark.parametrize(
    ("ours", "step", "lambda_weight", "is_refused"),
    [
        ("{step: 7}", 9, 0.25, False),  # its own ramp: steps 7 and 8 are done
        ("{step: 7}", 9, 0.75, True),
        ("{step: 8}", 9, 0.25, False),  # a step later, at which λ is .25 again
        ("{step: 20}", 12, 1.0, True),
        ("null", 12, 1.0, True),
        ("{step: 0}", 0, 1.0, True),  # an imported ternary model, and a ramp
        ("null", 0, 1.0, True),
        ("null", 0, 0.0, False),
    ],
)
def test_strength_must_not_fall(
    ours: str, step: int, lambda_weight: float, is_refused: bool, make_config: MakeConfig
) -> None:
    """A longer run with the same `transition.at.fraction` would be 16 bit for a while again, and
    the policy for the optimizer's state act twice."""
    ramp = ("transition.ramp.shape=linear", "transition.ramp.over.steps=4")
    cfg = make_config(f"transition.at={ours}", *ramp)
    meta = meta_of(make_config("transition.at.step=3"), step, lambda_weight)
    before: Any = SimpleNamespace(path=Path("before"), meta=meta)
    if not is_refused:
        assert run.compare(cfg, meta.identity, before, ()).differences == []
        return
    here = ours if ours == "null" else ours.strip("{}").replace(":", "")
    message = f"transition.at is {here} here and step {step} or earlier in before; use"
    with pytest.raises(CheckpointError, match=message):
        run.compare(cfg, meta.identity, before, ())
    assert len(run.compare(cfg, meta.identity, before, ["transition.at"]).differences) == 1
