"""Configuration: every message, and the limits on both sides of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitscale.config import Config, check_world_size, load_config, parse_config
from bitscale.errors import ConfigError

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- Messages: what is wrong with one key ---

KEY_ERRORS = {
    "unknown section": (
        ["modle.d_model=64"],
        ["unknown key 'modle'", "did you mean 'model'?"],
    ),
    "unknown key": (
        ["train.stesp=3"],
        ["unknown key 'train.stesp'", "did you mean 'train.steps'?"],
    ),
    "unknown key, deep": (
        ["transition.at.frction=0.5"],
        ["unknown key 'transition.at.frction'", "did you mean 'transition.at.fraction'?"],
    ),
    "unknown key in a list": (
        ["data.corpora=[{path: x, wieght: 2.0}]"],
        ["'data.corpora.0.wieght'", "did you mean 'data.corpora.0.weight'?"],
    ),
    "unknown key hides what it misspells": (
        ["model.rope_scaling={typ: linear, factor: 2.0}"],
        ["'model.rope_scaling.typ'", "did you mean 'model.rope_scaling.type'?", "(and 1 more)"],
    ),
    "unknown key like no other": (
        ["log.zzzzzz=1"],
        ["unknown key 'log.zzzzzz'", "this section has: every, telemetry_every, tensorboard"],
    ),
    "empty key": (["=3"], ["unknown key ''", "this section has: run, model, data"]),
    "missing in a list": (["data.corpora=[{weight: 2.0}]"], ["data.corpora.0.path is missing"]),
    "null": (["run.dir=null"], ["run.dir=null", "valid string"]),
    "text for a number": (["optim.lr=fast"], ['optim.lr="fast"', "valid number"]),
    "quoted number": (["optim.lr='3e-4'"], ['optim.lr="3e-4"', "valid number"]),
    "float for an integer": (["model.d_model=64.0"], ["model.d_model=64.0", "valid integer"]),
    "number for a switch": (["model.bias=1"], ["model.bias=1", "valid boolean"]),
    "number for text": (["run.dir=7"], ["run.dir=7", "valid string"]),
    "number for a section": (["model=7"], ["model=7", "object"]),
    "element of a list": (["data.corpora.0.path=x"], ["data.corpora=", "valid array"]),
    "not one of the names": (["train.dtype=fp16"], ['train.dtype="fp16"', "'bf16' or 'fp32'"]),
    "not one of the numbers": (["engine.zero_stage=4"], ["engine.zero_stage=4", "0, 1, 2 or 3"]),
    "zero": (["model.num_layers=0"], ["model.num_layers=0", "greater than 0"]),
    "negative": (["optim.weight_decay=-0.1"], ["optim.weight_decay=-0.1", "greater than or equal"]),
    "infinite": (["optim.lr=.inf"], ["optim.lr=", "number"]),
    "fraction above 1": (
        ["transition.at.fraction=1.5"],
        ["transition.at.fraction=1.5", "equal to 1"],
    ),
    "beta of 1": (["optim.betas=[0.9, 1.0]"], ["optim.betas.1=1.0", "less than 1"]),
    "three betas": (["optim.betas=[0.9, 0.9, 0.9]"], ["optim.betas=", "at most 2 items"]),
    "rope factor below 1": (
        ["model.rope_scaling={type: linear, factor: 0.5}"],
        ["model.rope_scaling.factor=0.5", "greater than or equal to 1"],
    ),
    "no corpus": (["data.corpora=[]"], ["data.corpora=[]", "at least 1 item"]),
    "two units of a point": (
        ["transition.at={step: 3, fraction: 0.5}"],
        ["transition.at=", "exactly one of step, tokens, fraction"],
    ),
    "no unit of a span": (
        ["transition.lr_rewarm={}"],
        ["transition.lr_rewarm=", "exactly one of steps, tokens, fraction"],
    ),
    "two budgets": (
        ["train={steps: 3, tokens: 5, global_batch_size: 8, micro_batch_size: 4}"],
        ["train=", "exactly one of steps, tokens"],
    ),
    "no budget": (["train.steps=null"], ["train=", "exactly one of steps, tokens"]),
    "not an override": (["train.steps"], ["'train.steps'", "section.key=value"]),
    "not YAML": (["optim.betas=[1"], ["override 'optim.betas=[1'", "expected ',' or ']'"]),
    "reference to nothing": (["run.dir=${nope}"], ["run.dir", "'nope' not found"]),
}

# --- Messages: impossible combinations ---

COMBINATION_ERRORS = {
    "heads do not divide the width": (
        ["model.num_heads=5"],
        ["model.d_model=32", "model.num_heads=5", "change one of them"],
    ),
    "odd head width": (["model.num_heads=32"], ["model.num_heads=32", "odd head size", "even"]),
    "broken group": (
        ["model.num_kv_heads=3"],
        ["model.num_heads=4", "model.num_kv_heads=3", "whole groups"],
    ),
    "more kv heads than heads": (["model.num_kv_heads=8"], ["model.num_kv_heads=8"]),
    "SubLN beside layernorm": (
        ["model.norm=layernorm", "model.sub_norm=true"],
        ["model.sub_norm=true", "model.norm='rmsnorm'"],
    ),
    "more inputs than are summed exactly": (
        ["quant.preset=int4", "model.d_ff=16640"],
        ["quant.preset='int4'", "up to 16384 inputs", "model.d_ff gives it 16640"],
    ),
    "bf16 at stage 0": (
        ["train.dtype=bf16", "engine.zero_stage=0"],
        ["engine.zero_stage=0", "train.dtype='bf16'", "use engine.zero_stage=1"],
    ),
    "compiled blocks at stage 3": (
        ["train.compile=true", "engine.zero_stage=3"],
        ["train.compile=true", "engine.zero_stage=3", "use engine.zero_stage=1 or 2"],
    ),
    "compiled blocks shared by ranks": (
        ["train.compile=true", "parallel.tp=2"],
        ["train.compile=true", "parallel.tp=2", "use engine.zero_stage=1 or 2 with parallel.tp=1"],
    ),
    "raw zero stage": (
        ["engine.deepspeed.zero_optimization.stage=2"],
        ["engine.deepspeed.zero_optimization.stage", "set engine.zero_stage instead"],
    ),
    "ternary gather without shares of masters": (
        ["engine.ternary_gather=true", "engine.zero_stage=0", "train.dtype=fp32"],
        ["engine.zero_stage=0", "whole masters on every rank", "zero_stage=1, 2 or 3"],
    ),
    "packed codes that nobody packs": (
        ["engine.packed_codes=true"],
        ["engine.packed_codes=true", "engine.ternary_gather=false", "set ternary_gather=true"],
    ),
    "packing of codes that nobody sends": (
        ["engine.code_packing=base3"],
        ["engine.code_packing='base3'", "engine.ternary_gather=false", "set ternary_gather=true"],
    ),
    "ternary gather of shares in main memory": (
        [
            *("engine.ternary_gather=true", "engine.zero_stage=3"),
            "engine.deepspeed.zero_optimization.offload_param={device: nvme}",
        ],
        ["zero_optimization.offload_param={", "own share", "leave offload_param out"],
    ),
    "ternary gather of medians": (
        ["engine.ternary_gather=true", "quant.preset=absmedian"],
        ["engine.ternary_gather=true", "quant.preset='absmedian'", "use quant.preset=b158"],
    ),
    "ternary gather of several scales a matrix": (
        ["engine.ternary_gather=true", "quant={preset: b158, granularity: row}"],
        ["quant.preset='b158'", "without overrides"],
    ),
    "ternary gather in fp32 stages": (
        ["engine.ternary_gather=true", "parallel.pp=2", "train.dtype=fp32"],
        ["parallel.pp=2", "train.dtype='fp32'", "equally many parameter groups", "dtype=bf16"],
    ),
    "ternary gather and offloaded masters": (
        [
            "engine.ternary_gather=true",
            "engine.deepspeed.zero_optimization.offload_optimizer={device: cpu}",
        ],
        ["zero_optimization.offload_optimizer={", "leave offload_optimizer out"],
    ),
    "warm-up too long": (["optim.warmup.steps=101"], ["optim.warmup is 101 steps", "run of 100"]),
    "warm-up and decay too long": (
        ["optim.schedule=wsd", "optim.decay.fraction=0.95"],
        ["optim.warmup (10 steps)", "optim.decay (95 steps)", "100 steps", "shorten one"],
    ),
    "stop beyond the end": (["train.stop_step=101"], ["train.stop_step=101", "run of 100 steps"]),
    "transition at the end": (
        ["transition.at.step=100"],
        ["transition.at is step 100", "100 steps", "transition.at=null"],
    ),
    "length without a ramp": (
        ["transition.ramp.over.steps=5"],
        ["transition.ramp.over is 5 steps", "transition.ramp.shape='none'", "set over to 0"],
    ),
    "ramp without a length": (
        ["transition.ramp.shape=paper"],
        ["transition.ramp.shape='paper'", "transition.ramp.over > 0"],
    ),
    "activation ramp without a length": (
        ["transition.activation_ramp.shape=linear"],
        ["transition.activation_ramp.shape='linear'", "transition.activation_ramp.over > 0"],
    ),
    "warm-up beyond the horizon": (
        ["optim.schedule=cosine", "optim.warmup={steps: 10}", "optim.horizon={steps: 9}"],
        ["optim.warmup is 10 steps", "optim.horizon of 9", "lengthen the horizon"],
    ),
    "ramp beyond the end": (
        ["transition.ramp={shape: linear, over: {steps: 60}}"],
        ["transition.ramp ends at step 100", "last step is 99", "shorten it or start earlier"],
    ),
    "fused decay after a cosine": (
        ["transition.lr=decay", "optim.schedule=cosine"],
        ["transition.lr='decay'", "constant or wsd", "'cosine'"],
    ),
    "tensor parallel ranks and heads": (
        ["parallel.tp=3"],
        ["parallel.tp=3", "does not divide model.num_heads=4", "use tp=1"],
    ),
    "tensor parallel ranks and key/value heads": (
        [
            "parallel.tp=6",
            "model.num_heads=12",
            "model.num_kv_heads=4",
            "model.d_model=48",
            "model.d_ff=96",
        ],
        ["parallel.tp=6", "the 4 key/value heads", "use tp=2"],
    ),
    "sequence parallel without tensor parallel": (
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel=true", "parallel.tp=1", "raise tp"],
    ),
    "sequence parallel and an odd sequence": (
        ["parallel.sequence_parallel=true", "parallel.tp=2", "data.seq_len=15"],
        ["data.seq_len=15", "parallel.tp=2", "does not divide"],
    ),
    "more stages than layers": (
        ["parallel.pp=5"],
        ["parallel.pp=5", "model.num_layers=2", "at most as many"],
    ),
    "more stages than layers, two a rank": (
        ["parallel.pp=2", "parallel.pipeline_schedule=dualpipev"],
        ["pipeline_schedule='dualpipev' makes 4 stages", "model.num_layers=2", "at most as many"],
    ),
    "schedule without a pipeline": (
        ["parallel.pipeline_schedule=dualpipev"],
        ["pipeline_schedule='dualpipev'", "parallel.pp=1", "raise pp"],
    ),
    "activation checkpointing as a boolean": (
        ["train.activation_checkpointing=true"],
        ["train.activation_checkpointing=true", "'none', 'selective' or 'full'"],
    ),
    "pipeline with ZeRO-3": (
        ["parallel.pp=2", "engine.zero_stage=3"],
        ["parallel.pp=2", "engine.zero_stage=3", "use engine.zero_stage=1"],
    ),
    "pipeline with ZeRO-0": (
        ["parallel.pp=2", "engine.zero_stage=0", "train.dtype=fp32"],
        ["parallel.pp=2", "engine.zero_stage=0", "clips wrongly", "use engine.zero_stage=1"],
    ),
    "pipeline with ZeRO-2": (
        ["parallel.pp=2", "engine.zero_stage=2"],
        ["parallel.pp=2", "engine.zero_stage=2", "use engine.zero_stage=1"],
    ),
    "fused decay inside a decay": (
        ["transition.lr=decay", "optim.schedule=wsd", "optim.decay.fraction=0.8"],
        [
            "transition.at is step 40",
            "optim.decay already begins at step 20",
            "shorten optim.decay",
        ],
    ),
}


def assert_tells(error: pytest.ExceptionInfo[ConfigError], fragments: list[str]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert [text for text in fragments if text not in message] == [], message


@pytest.mark.parametrize("case", [*KEY_ERRORS, *COMBINATION_ERRORS])
def test_message(case: str, make_config: MakeConfig) -> None:
    overrides, fragments = {**KEY_ERRORS, **COMBINATION_ERRORS}[case]
    with pytest.raises(ConfigError) as error:
        make_config(*overrides)
    assert_tells(error, fragments)


DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.clip",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "data_types": "train.dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "pipeline": "parallel.pp",
}


@pytest.mark.parametrize("key", DERIVED_DEEPSPEED_KEYS)
def test_raw_deepspeed_keys_cannot_contradict_ours(key: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(f"engine.deepspeed.{key}=1")
    derived_from = f"is derived from {DERIVED_DEEPSPEED_KEYS[key]}"
    assert_tells(error, [f"engine.deepspeed.{key} {derived_from}", "set that instead"])


def test_limits_are_inclusive(make_config: MakeConfig) -> None:
    """The last values before each of the messages above."""
    make_config("optim.warmup.steps=100")
    make_config("optim.schedule=wsd", "optim.decay.steps=90")
    make_config("train.stop_step=100")
    make_config("transition.at.step=99")
    make_config("transition.ramp={shape: linear, over: {steps: 59}}")
    make_config("transition.lr=decay", "optim.schedule=wsd", "optim.decay.steps=60")
    make_config("model.num_kv_heads=4")
    make_config("model.num_heads=16", "model.num_kv_heads=1")


@pytest.mark.parametrize(
    ("batch", "ranks", "fragments"),
    [
        (8, 4, ["train.global_batch_size=8", "train.micro_batch_size=4", "world_size=4", "of 16,"]),
        (20, 2, ["train.global_batch_size=20", "world_size=2", "16 or 24"]),
        (8, 3, ["world_size=3", "of 12,", "another number of ranks"]),
        (8, 0, ["world_size=0", "use 1 or more"]),
    ],
)
def test_world_size_must_divide_the_batch(
    batch: int, ranks: int, fragments: list[str], make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError) as error:
        check_world_size(make_config(f"train.global_batch_size={batch}"), ranks)
    assert_tells(error, fragments)


def test_layout_must_divide_the_ranks(make_config: MakeConfig) -> None:
    cfg = make_config("parallel.tp=2", "parallel.pp=2", "train.global_batch_size=16")
    with pytest.raises(ConfigError) as error:
        check_world_size(cfg, 6)
    assert_tells(error, ["parallel.tp=2 x parallel.pp=2", "world_size=6", "launch 4 ranks"])
    for ranks in (4, 8, 16):
        check_world_size(cfg, ranks)


def test_dualpipev_needs_micro_batches_for_both_stages_of_a_rank(make_config: MakeConfig) -> None:
    pipeline = ("parallel={pp: 2, pipeline_schedule: dualpipev}", "model.num_layers=4")
    sizes = ("train.micro_batch_size=2", "train.global_batch_size=12")
    check_world_size(make_config(*pipeline, *sizes), 2)
    with pytest.raises(ConfigError) as error:
        check_world_size(make_config(*pipeline, *sizes), 4)
    assert_tells(error, ["needs 4 micro-batches", "gives 3", "a global batch of 16", "1f1b"])


def test_world_size_that_fits(make_config: MakeConfig) -> None:
    for ranks in (1, 2, 4):
        check_world_size(make_config("train.global_batch_size=16"), ranks)


# --- Messages: files ---


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["run is missing", "run=VALUE", "(and 4 more)"]),
        ("- 1\n", ["expected sections"]),
        ("3\n", ["not readable as YAML"]),
        ("run:\n\tdir: x\n", ["not readable as YAML", "line 2"]),
        ("run: {dir: a}\nrun: {dir: b}\n", ["not readable as YAML", "duplicate key run"]),
        ("run: {dir: !!binary aGVsbG8=}\n", ["bytes"]),
        ("modle: {d_model: 4}\n", ["unknown key 'modle'", "did you mean 'model'?"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml", "no such configuration file"]),
        ("base: 3\n", ["base=3", "expected a file name"]),
        ("base: [[a.yaml]]\n", ["base=", "expected a file name"]),
        ("base: bad.yaml\n", ["bad.yaml", "goes round in a circle"]),
        ("base: ../x/../x/bad.yaml\n", ["goes round in a circle"]),
        ("base: middle.yaml\n", ["goes round in a circle"]),
    ],
)
def test_bad_file(text: str, fragments: list[str], tmp_path: Path) -> None:
    write(tmp_path / "x/middle.yaml", "base: [bad.yaml]\n")
    path = write(tmp_path / "x/bad.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert_tells(error, ["yaml", *fragments])


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a directory; name a YAML file"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not readable as YAML"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize("tree", [None, [1], "text"])
def test_a_stored_tree_must_have_sections(tree: object) -> None:
    with pytest.raises(ConfigError, match=r"meta\.json: expected sections \(run, model, data"):
        parse_config(tree, where="meta.json")
