"""Configuration: composition, overrides, hash, derived values, and the committed files."""

import json
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitscale.config import (
    Config,
    ModelConfig,
    config_hash,
    load_config,
    num_kv_heads,
    num_steps,
    packs_codes,
    parse_config,
    point_step,
    span_steps,
    stop_step,
    to_tree,
    to_yaml,
    tokens_per_step,
    transition_step,
)
from bitscale.errors import ConfigError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted(
    path
    for folder in ("configs", "configs/recipes", "configs/recipes/trilm")
    for path in (ROOT / folder).glob("*.yaml")
)  # configs/shared holds parts of them
MakeConfig = Callable[..., Config]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- Composition ---


def test_base_files_lie_below_in_order(tmp_path: Path, tiny_config_file: Path) -> None:
    write(tmp_path / "sub/wide.yaml", "model: {d_model: 48, d_ff: 96}\n")
    write(tmp_path / "long.yaml", f"base: {tiny_config_file}\ntrain: {{steps: 500}}\n")
    path = write(
        tmp_path / "sub/mine.yaml",
        "base: [../long.yaml, wide.yaml]\nmodel: {d_ff: 80}\noptim: {lr: 1e-4}\n",
    )
    cfg = load_config(path, ["model.num_layers=3", "model.num_layers=4"])
    assert (cfg.model.num_heads, cfg.train.steps) == (4, 500)  # from below
    assert cfg.model.d_model == 48  # the second base over the first
    assert (cfg.model.d_ff, cfg.optim.lr) == (80, 1e-4)  # the file over its bases
    assert cfg.model.num_layers == 4  # the last override over all


def test_lists_are_replaced_whole(make_config: MakeConfig) -> None:
    cfg = make_config("data.corpora=[{path: a}, {path: b, weight: 2.0}]")
    assert [(c.path, c.weight) for c in cfg.data.corpora] == [("a", 1.0), ("b", 2.0)]


def test_a_unit_replaces_the_other_units_below(tmp_path: Path, make_config: MakeConfig) -> None:
    assert make_config("transition.at.step=7").transition.at.model_dump(exclude_none=True) == {
        "step": 7
    }
    cfg = make_config("train.tokens=1281", "optim.warmup.fraction=0.5")
    assert (cfg.train.steps, cfg.train.tokens) == (None, 1281)
    assert (cfg.optim.warmup.steps, cfg.optim.warmup.fraction) == (None, 0.5)
    assert make_config("transition.at=null").transition.at is None
    assert make_config("transition.at={tokens: 0}").transition.at.tokens == 0
    assert make_config("train.stop_step=5").train.steps == 100  # not a unit


def test_references_are_resolved_after_merging(tmp_path: Path, tiny_config_file: Path) -> None:
    path = write(
        tmp_path / "refers.yaml",
        f"base: {tiny_config_file}\n"
        "run: {dir: 'runs/lr-${optim.lr}'}\nlog: {every: '${train.steps}'}\n",
    )
    assert load_config(path).log.every == 100
    assert load_config(path, ["optim.lr=0.5"]).run.dir == "runs/lr-0.5"


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-4", ".3e-3"])
def test_exponents_are_numbers(text: str, make_config: MakeConfig) -> None:
    """Plain YAML 1.1 reads 3e-4 as text."""
    assert make_config(f"optim.lr={text}").optim.lr == 3e-4


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_bare_off_is_a_policy(text: str, make_config: MakeConfig) -> None:
    """YAML 1.1 reads it as false."""
    cfg = make_config(f"transition.weight_decay={text}")
    assert cfg.transition.weight_decay == "off"
    assert to_tree(cfg)["transition"]["weight_decay"] == "off"


def test_configuration_is_frozen(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config().train.steps = 3


# --- Resolved form and hash ---

FULL = (
    "transition.ramp={shape: paper, over: {tokens: 999}}",
    "transition.activation_ramp={shape: linear, over: {steps: 3}}",
    "model.rope_scaling={type: llama3, factor: 8.0}",
    "engine.deepspeed={zero_optimization: {overlap_comm: true}, a: null, b: 1e-8}",
    "train.tokens=20000",
    "optim.horizon.steps=739328",
    "optim.eps=1e-12",
)


def read_back(cfg: Config, folder: Path) -> Config:
    return load_config(write(folder / "resolved.yaml", to_yaml(cfg)))


def test_resolved_yaml_reads_back_to_an_equal_config(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for cfg in (make_config(), make_config(*FULL), make_config("transition.at=null")):
        assert read_back(cfg, tmp_path) == cfg
        assert parse_config(to_tree(cfg), where="tree") == cfg
        assert json.loads(json.dumps(to_tree(cfg))) == to_tree(cfg)


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="${", exclude_categories=["Cs"])))
def test_any_text_reads_back(
    text: str, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = {**to_tree(make_config()), "run": {"dir": text}}
    cfg = parse_config(tree, where="tree")
    assert read_back(cfg, tmp_path_factory.getbasetemp()) == cfg


@pytest.mark.parametrize("text", ["1e3", "-1.5E+7", "1_0e2", ".5e-3", "null", "true", "0x1F", ""])
def test_text_that_looks_like_a_number_reads_back(
    text: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    cfg = parse_config({**to_tree(make_config()), "run": {"dir": text}}, where="tree")
    assert read_back(cfg, tmp_path).run.dir == text


@settings(max_examples=40, deadline=None)
@given(value=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_number_reads_back(
    value: float, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = to_tree(make_config())
    cfg = parse_config({**tree, "optim": {**tree["optim"], "lr": value}}, where="tree")
    assert read_back(cfg, tmp_path_factory.getbasetemp()).optim.lr == value


def changed(value: Any, key: str) -> Any:
    """Another valid value for the leaf `key` of the full tree."""
    special = {
        "model.num_heads": 8,
        "model.num_kv_heads": 1,
        "model.norm_affine": False,
        "model.mlp": "relu2",
        "model.head_bits": 8,
        "model.rope_scaling.type": "linear",
        "quant.preset": "absmedian",
        "quant.kernel": "auto",
        "quant.weight_scale": "absmedian",
        "quant.activation_bits": 16,
        "train.dtype": "bf16",
        "train.activation_checkpointing": "selective",
        "parallel.pipeline_schedule": "dualpipev",
        "train.global_batch_size": 12,
        "train.steps": 101,
        "train.stop_step": 51,
        "optim.name": "lion",
        "optim.schedule": "linear",
        "transition.ramp.shape": "cosine",
        "transition.activation_ramp.shape": "paper",
        "transition.optimizer_state": "reset",
        "transition.lr": "rewarm",
        "transition.weight_decay": "off",
        "transition.guard.action": "skip_batch",
        "engine.device": "cpu",
        "engine.packed_codes": True,
        "engine.code_packing": "base3",
        "engine.zero_stage": 2,
        "model.d_model": 64,
        "model.norm": "layernorm",
    }
    if key in special:
        return special[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.9
    return "x" if value is None else value + "x"


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(tree))
    node = copy
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return copy


def test_hash_changes_with_every_key_that_can_change_results(make_config: MakeConfig) -> None:
    """And with no other: where it is written, how often it logs and saves, who watches."""
    tree = to_tree(make_config(*FULL[:4], "train.stop_step=50"))
    before = config_hash(parse_config(tree, where="tree"))
    ignored, seen = set(), 0
    for path, value in leaves(tree):
        key = ".".join(map(str, path))
        other = replaced(tree, path, changed(value, key))
        if key == "parallel.sequence_parallel":
            other["parallel"]["tp"] = 2
        if key == "transition.guard.action":
            other["checkpoint"]["every"] = 5
        if key in ("engine.packed_codes", "engine.code_packing"):
            other["engine"]["ternary_gather"] = True
        if key == "parallel.pipeline_schedule":
            other["parallel"]["pp"], other["model"]["num_layers"] = 2, 4
        after = parse_config(other, where=key)
        seen += 1
        if config_hash(after) == before:
            ignored.add(key)
    assert seen > 60
    free = ("run", "log", "checkpoint", "watch")
    assert {key for key in ignored if key.split(".")[0] not in free} == {"train.stop_step"}
    assert {key.split(".")[0] for key in ignored} == {*free, "train"}
    paths = [path for path, _ in leaves(tree) if path[0] in free]
    assert len(ignored) == len(paths) + 1


# --- Derived values ---


def test_budget_in_tokens_is_rounded_up_to_steps(make_config: MakeConfig) -> None:
    assert tokens_per_step(make_config()) == 8 * 16
    assert num_steps(make_config("train.tokens=12800")) == 100
    assert num_steps(make_config("train.tokens=12801")) == 101
    assert num_steps(make_config()) == 100


def test_points_and_spans_agree_in_every_unit(make_config: MakeConfig) -> None:
    for at in ("step=40", "tokens=5120", "fraction=0.4"):
        assert transition_step(make_config(f"transition.at.{at}")) == 40
    for warmup in ("steps=40", "tokens=5120", "fraction=0.4"):
        cfg = make_config(f"optim.warmup.{warmup}")
        assert span_steps(cfg.optim.warmup, cfg) == 40
    cfg = make_config()
    assert point_step(cfg.transition.weight_decay_off_at, cfg) == 67  # 2/3, rounded
    assert transition_step(make_config("transition.at=null")) is None


def test_codes_are_kept_packed_where_that_is_wanted_or_memory_is(make_config: MakeConfig) -> None:
    on = "engine.ternary_gather=true"
    assert not packs_codes(make_config("engine.zero_stage=3"))
    assert packs_codes(make_config(on, "engine.zero_stage=3"))
    assert not packs_codes(make_config(on, "engine.zero_stage=3", "engine.packed_codes=false"))
    assert not packs_codes(make_config(on))
    assert packs_codes(make_config(on, "engine.packed_codes=true"))


def test_session_end_and_kv_heads(make_config: MakeConfig) -> None:
    assert stop_step(make_config()) == 100
    assert stop_step(make_config("train.stop_step=30")) == 30
    assert num_kv_heads(make_config()) == 2
    assert num_kv_heads(make_config("model.num_kv_heads=null")) == 4


# --- Committed files ---


STATED = re.compile(r"^# parameters: ([\d.]+)([KMBT])(?: with the vocabulary of ([\d,]+))?$", re.M)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: f"{p.parent.stem}/{p.stem}")
def test_committed_configuration(
    path: Path, count_parameters: Callable[[ModelConfig, int], int]
) -> None:
    cfg = load_config(path)
    if (stated := STATED.search(path.read_text(encoding="utf-8"))) is None:
        return
    figure, unit, vocabulary = stated.groups()
    vocab_size = int(vocabulary.replace(",", "")) if vocabulary else cfg.model.vocab_size
    assert vocab_size is not None, "state the vocabulary behind the number of parameters"
    count = (
        count_parameters(cfg.model, vocab_size) / {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]
    )
    assert f"{count:.{len(figure.partition('.')[2])}f}" == figure


def test_every_size_states_its_parameters() -> None:
    stating = {path.stem for path in CONFIG_FILES if STATED.search(path.read_text())}
    assert stating >= {"debug", "tiny-1m", "small-10m", "125m", "350m", "olmo-1b", "3b", "7b"}
    assert stating >= {"13b", "70b"}


def test_every_recipe_says_what_is_verbatim_and_what_is_ours() -> None:
    recipes = [path for path in CONFIG_FILES if path.parent.name == "recipes"]
    assert {path.stem for path in recipes} >= {
        *("continual-qat", "continual-qat-small", "reloaded-lm", "trilm", "bitnet-2b4t"),
        *("falcon-edge", "paretoq-split"),
    }
    described = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for path in recipes:
        head = path.read_text(encoding="utf-8").split("\nbase:")[0]
        assert all(word in head for word in ("Verbatim:", "Our choice:")), path.stem
        assert f"`{path.stem}`" in described, path.stem


def test_trilm_has_a_pair_of_rates_for_each_of_nine_sizes() -> None:
    """Peaks x 1e4, before half way and after."""
    recipes = ROOT / "configs/recipes"
    pairs = {}
    for path in [recipes / "trilm.yaml", *recipes.glob("trilm/*.yaml")]:
        optim = load_config(path).optim
        assert (optim.schedule, optim.trilm_drop_at) == ("trilm", 0.5)
        pairs[path.stem] = (
            round(optim.lr * 1e4, 6),
            round(optim.lr * optim.trilm_lr_ratio * 1e4, 6),
        )
    assert pairs == {
        "99m": (24, 15),
        "trilm": (24, 15),
        "390m": (18, 12),
        "560m": (16, 11),
        "830m": (15, 10),
        "1.1b": (13, 9),
        "1.5b": (12, 8),
        "2.4b": (12, 8),
        "3.9b": (12, 8),
    }


def test_reference_of_keys_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools/document_config.py"))
    committed = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert committed == tool["render"](), "run python tools/document_config.py"


def test_every_key_has_a_meaning() -> None:
    tool = runpy.run_path(str(ROOT / "tools/document_config.py"))
    for model in ["Config", *Config.model_json_schema()["$defs"]]:
        assert [key for key, text in tool["meanings"](model).items() if not text] == [], model


def test_token_counts_may_be_written_as_powers_of_ten(make_config: MakeConfig) -> None:
    cfg = make_config("train.tokens=1e6", "transition.at.tokens=2.5e5")
    assert cfg.train.tokens == 1_000_000 and isinstance(cfg.train.tokens, int)
    assert cfg.transition.at is not None and cfg.transition.at.tokens == 250_000
    with pytest.raises(ConfigError, match=r"train\.tokens=1000\.5: "):
        make_config("train.tokens=1000.5")
