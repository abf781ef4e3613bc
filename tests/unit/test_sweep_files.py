"""Sweep files: arithmetic, cells, what they share, and what is said of a wrong one."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bitscale.config import Config, config_hash, num_steps, transition_step
from bitscale.errors import ConfigError
from bitscale.model import cost
from bitscale.sweep.campaign import plan
from bitscale.sweep.expand import Cell, expand
from bitscale.sweep.expression import evaluate
from bitscale.sweep.spec import read_seeds, read_sweep
from bitscale.sweep.trunks import Beginnings, Fork, plan_runs

pytestmark = pytest.mark.unit

BASE = """\
run: {dir: cell}
model: {num_layers: 2, d_model: 32, num_heads: 4, d_ff: "= 3 * model.d_model", vocab_size: 64}
data: {corpora: [{path: corpus}], seq_len: 16}
train: {steps: 100, global_batch_size: 8, micro_batch_size: 4, dtype: fp32}
optim: {lr: "= 0.32 / model.d_model", schedule: wsd, warmup: {steps: 10}}
transition: {ramp: {shape: linear, over: {steps: 5}}}
"""
JUMP = {"transition.ramp.shape": "none", "transition.ramp.over.steps": 0}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")

    def make(**content: object) -> Path:
        path = tmp_path / "try.yaml"
        path.write_text(
            yaml.safe_dump({"base": "base.yaml"} | content, sort_keys=False), encoding="utf-8"
        )
        return path

    return make


def cells(path: Path) -> dict[tuple[str, int], Cell]:
    return {(cell.label, cell.seed): cell for cell in expand(read_sweep(path))}


# Arithmetic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("= 20 * parameters", 2000),
        ("=parameters // 3 % 10", 3),
        ("= -2 ** 2 + 7 / 2", -0.5),
        ("= sqrt(64) * max(1, 2, model.d_model)", 8.0 * 32),
        ("= multiple(100, 64) + round(2.5) + ceil(0.1) + floor(0.9)", 128 + 2 + 1),
        ("= log2(8) + log(exp(1)) - min(1, 2)", 3.0),
    ],
)
def test_arithmetic(text: str, value: float) -> None:
    found = evaluate(text, {"parameters": 100, "model.d_model": 32}.__getitem__)
    assert found == pytest.approx(value) and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "= __import__('os').system('true')",
        "= (lambda: 1)()",
        "= [1][0]",
        "= 'a' * 9",
        "= model.d_model.__class__.mro()",
        "= sqrt.__self__",
        "= 1 if 2 else 3",
        "= round(number=2)",
        "= True",
        "= 9 ** 9 ** 9",
        "= 1e30 * 10",
        "= 1 / 0",
        "= (-1) ** 0.5",
        "= sqrt(1, 2)",
        "= 1 +",
        "= " + "1 + " * 200 + "1",
    ],
)
def test_nothing_but_arithmetic(text: str) -> None:
    with pytest.raises(ConfigError, match="expression"):
        evaluate(text, {"model.d_model": 1.0}.__getitem__)


# Cells


def test_cells_are_the_product(write: Write) -> None:
    path = write(
        arms={"a": {"transition.at": None}, "b": {"transition.at.fraction": 0.5}},
        grid={"optim.weight_decay": [0.0, 0.1]},
        seeds={"values": [3, 5]},
    )
    found = cells(path)
    labels = ["a weight_decay=0", "a weight_decay=0.1", "b weight_decay=0", "b weight_decay=0.1"]
    assert list(found) == [(label, seed) for label in labels for seed in (3, 5)]
    cell = found["b weight_decay=0", 5]
    assert (cell.cfg.train.seed, cell.cfg.data.seed, cell.cfg.optim.weight_decay) == (5, 5, 0.0)
    assert cell.values == {"transition.at.fraction": 0.5, "optim.weight_decay": 0.0}
    assert found["a weight_decay=0", 3].values["transition.at.fraction"] is None
    assert len({cell.key for cell in found.values()}) == 8


def test_values_are_derived_in_any_order(write: Write) -> None:
    path = write(
        set={"train.steps": None, "train.tokens": "= 10 * parameters"},
        arms={
            "small": {},
            "wide": {
                "model.d_model": "= 2 * base.model.d_model",
                "train.tokens": "= 10 * base.parameters + seed",
            },
        },
        seeds={"values": [7]},
    )
    small, wide = (cell.cfg for cell in expand(read_sweep(path)))
    assert (small.model.d_ff, wide.model.d_model, wide.model.d_ff) == (96, 64, 192)
    assert (small.optim.lr, wide.optim.lr) == (0.01, 0.005)
    assert small.train.tokens == 10 * cost.parameters(small.model).total
    assert wide.train.tokens == small.train.tokens + 7


def test_threads_are_one_unless_asked_for(write: Write) -> None:
    path = write(arms={"a": {}, "b": {"engine.num_threads": 2}})
    assert [cell.cfg.engine.num_threads for cell in expand(read_sweep(path))] == [1, 2]


def test_random_points_are_the_same_whatever_else_is_drawn(write: Write) -> None:
    keys = {"optim.weight_decay": {"log_uniform": [0.01, 1.0]}}
    few = cells(write(random={"count": 2, "seed": 1, "keys": keys}))
    more = {"optim.clip": {"choice": [0.5, 1.0]}, "data.seq_len": {"integer": [8, 9]}} | keys
    many = cells(write(random={"count": 30, "seed": 1, "keys": more}))
    for key, cell in few.items():
        assert cell.cfg.optim.weight_decay == many[key].cfg.optim.weight_decay
    drawn = [cell.cfg for cell in many.values()]
    assert all(0.01 <= cfg.optim.weight_decay <= 1 for cfg in drawn)
    assert len({cfg.optim.weight_decay for cfg in drawn}) == 30
    assert {cfg.data.seq_len for cfg in drawn} == {8, 9}
    other = cells(write(random={"count": 1, "seed": 2, "keys": keys}))
    assert other["draw-000", 0].cfg != few["draw-000", 0].cfg


def test_settings_that_cannot_act_make_no_other_cell(write: Write) -> None:
    path = write(
        set={"transition.at.fraction": 0.5},
        arms={
            "jump": JUMP,
            "jump too": {**JUMP, "transition.lr_rewarm.steps": 9},
            "rewarm": {**JUMP, "transition.lr": "rewarm"},
            "sixteen": {"transition.at": None},
            "sixteen too": {"transition.at": None, "transition.optimizer_state": "reset"},
        },
    )
    keys = [cell.key for cell in expand(read_sweep(path))]
    assert keys[0] == keys[1] != keys[2] and keys[3] == keys[4]


# What is wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arm": {}}, "unknown key 'arm'; did you mean 'arms'?"),
        ({"grid": {"optim.lr": []}}, "optim.lr has no values"),
        ({"arms": {"a": {"optim.lrr": 1e-3}}}, "cell 'a', seed 0: unknown key 'optim.lrr'"),
        ({"arms": {"a": {"optim.lr": "= 2 * optim.lr"}}}, "goes round in a circle"),
        ({"arms": {"a": {"optim.lr": "= width"}}}, "'width' is no configuration key"),
        ({"arms": {"a": {"optim.lr": "= train.tokens"}}}, "train.tokens is None, no number"),
        ({"arms": {"a": {"engine.device": "tpu"}}}, "cell 'a', seed 0: engine.device"),
        ({"set": {"train.stop_step": 9}}, "train.stop_step=9 would leave the cell unfinished"),
        ({"grid": {"optim.lr": [1e-3, 0.001]}}, "two cells are named 'lr=0.001'"),
        ({"random": {"count": 1, "keys": {"optim.lr": {}}}}, "exactly one of uniform"),
        ({"random": {"count": 1, "keys": {"optim.lr": {"log_uniform": [0, 1]}}}}, "above 0"),
        ({"random": {"count": 1, "keys": {"optim.lr": {"choice": []}}}}, "choice has no values"),
        ({"random": {"count": 1, "keys": {"data.seed": {"integer": [5, 3]}}}}, "[5, 3]: the smal"),
        ({"random": {"count": 1, "keys": {"optim.lr": {"uniform": [1, 0]}}}}, "comes first"),
        ({"random": {"count": 2, "keys": {}}}, "random.keys"),
        ({"seeds": {"values": []}}, "give one seed or more, each once"),
        ({"seeds": {"values": [1, 2, 1]}}, "give one seed or more, each once"),
        ({"grid": {"optim.clip": [*range(101)], "optim.eps": [*range(100)]}}, "10,000 cells"),
    ],
)
def test_a_wrong_file_is_told_with_file_and_cell(
    content: dict[str, object], message: str, write: Write
) -> None:
    path = write(**content)
    with pytest.raises(ConfigError) as caught:
        expand(read_sweep(path))
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"contrast": {"nobody": 1.0}, "predicted": "negative"}, "names the cell 'nobody'"),
        ({"predicted": "negative"}, "exactly one of contrast, best"),
        ({"contrast": {"a": 1.0}, "predicted": "zero"}, "predicted: zero needs a margin above 0"),
        ({"best": ["a"], "predicted": "negative"}, "best needs `of: KEY` and a range"),
        ({"contrast": {"a": 1.0}, "predicted": [0, 1]}, "a contrast needs predicted: negative"),
    ],
)
def test_a_wrong_claim(claim: dict[str, object], message: str, write: Write) -> None:
    whole = {"id": "x", "text": "x", "source": "x"} | claim
    with pytest.raises(ConfigError) as caught:
        expand(read_sweep(write(arms={"a": {}}, claims=[whole])))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", (5,)), ("5-9", (5, 6, 7, 8, 9)), ("0-1,7, 12", (0, 1, 7, 12)), ("2,0", (2, 0))],
)
def test_seeds_of_the_command_line(text: str, seeds: tuple[int, ...], write: Write) -> None:
    path = write(seeds={"values": [0, 1], "keys": ["train.seed"]})
    found = read_sweep(path, seeds=read_seeds(text))
    assert found.spec.seeds.values == seeds and found.spec.seeds.keys == ("train.seed",)
    assert [cell.cfg.train.seed for cell in expand(found)] == list(seeds)


@pytest.mark.parametrize("text", ["a", "-1", "1-", "1--3", "3-1", "1,1", "0-3,2", "1,,2", "²"])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        read_seeds(text)


def test_two_files_of_one_name(write: Write, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base.yaml").write_text(BASE, encoding="utf-8")
    twin = tmp_path / "other" / path.name
    twin.write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="two sweeps are named 'try'"):
        plan([path, twin], [], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no sweep file here"):
        plan([tmp_path / "empty"], [], tmp_path / "out")


# What is shared


SWITCHES = {
    "sixteen": {"transition.at": None},
    "early": {"transition.at.step": 20},
    "late": {"transition.at.step": 60},
}


def test_forks_share_the_16_bit_cell(write: Write) -> None:
    found = cells(write(arms=SWITCHES, seeds={"values": [0, 1]}))
    runs = {run.key: run for run in plan_runs(list(found.values()))}
    assert len(runs) == 6
    for seed in (0, 1):
        trunk = found["sixteen", seed].key
        assert runs[trunk].save_at == (20, 60) and runs[trunk].fork is None
        assert runs[found["early", seed].key].fork == Fork(trunk, 20)
        assert runs[found["late", seed].key].fork == Fork(trunk, 60)
    # The trunk of the first seed first, and its forks before the second seed.
    assert next(iter(runs)) == found["sixteen", 0].key and list(runs)[3] == found["sixteen", 1].key


def test_a_trunk_that_nobody_asked_for_ends_at_its_last_fork(write: Write) -> None:
    arms = {name: keys for name, keys in SWITCHES.items() if name != "sixteen"}
    found = list(cells(write(arms=arms)).values())
    trunk, *forks = plan_runs(found)
    assert trunk.key not in {cell.key for cell in found} and len(forks) == 2
    assert (trunk.last_step, trunk.save_at) == (60, (20, 60))
    assert transition_step(trunk.cfg) is None and num_steps(trunk.cfg) == 100
    # What a guard remembers is not in a trunk's checkpoint.
    guarded = cells(write(arms=SWITCHES, set={"transition.guard.spike": 0.5}))
    assert [run.fork for run in plan_runs(list(guarded.values()))] == [None] * 3
    # One alone has nothing to share, nor has ternary from scratch.
    alone = cells(write(arms={"a": {"transition.at.step": 20}, "b": {"transition.at.step": 0}}))
    assert [run.fork for run in plan_runs(list(alone.values()))] == [None, None]


def test_what_decides_the_first_steps_decides_who_shares(
    make_config: Callable[..., Config],
) -> None:
    off_at = ("transition.weight_decay=off_at", "transition.weight_decay_off_at.step=45")
    fixed = ("optim.schedule=wsd", "optim.decay.steps=20", "transition.at.step=50", *off_at)
    base, equal = make_config(*fixed), Beginnings().equal
    for change in (
        "train.steps=200",
        "quant.preset=absmedian",
        "transition.optimizer_state=reset",
        "transition.lr=rewarm",
        "train.eval_every=10",
        "log.every=3",
    ):
        assert equal(base, make_config(*fixed, change), 50), change
    for change in (
        "train.seed=1",
        "data.seed=1",
        "optim.lr=1e-3",
        "optim.decay.steps=70",
        "train.global_batch_size=4",
        "model.d_ff=96",
        "model.sub_norm=transition",
        "quant.norm=layernorm",
        "quant.preset=paretoq",
        "quant.gradient_bits=16",
        "quant.kernel=auto",
        "optim.clip=0.5",
        "optim.betas=[0.9, 0.99]",
        "optim.eps=1e-6",
        "engine.num_threads=2",
        "transition.weight_decay_off_at.step=40",
    ):
        assert not equal(base, make_config(*fixed, change), 50), change
    later = make_config(*fixed, "transition.weight_decay_off_at.step=49")
    assert equal(base, later, 45) and not equal(base, later, 46)


def test_longer_runs_and_other_quantizers_share(write: Write) -> None:
    """The learning rate is constant up to step 80 of 100."""
    arms = SWITCHES | {
        "long": {"transition.at.step": 60, "train.steps": 300},
        "median": {"transition.at.step": 20, "quant.preset": "absmedian"},
        "too late": {"transition.at.step": 90, "train.steps": 300},
    }
    found = cells(write(arms=arms))
    runs = {run.key: run for run in plan_runs(list(found.values()))}
    forks = {label: runs[cell.key].fork for (label, _), cell in found.items()}
    trunk = found["sixteen", 0].key
    assert {label for label, fork in forks.items() if fork and fork.trunk == trunk} == {
        *("early", "late", "median")
    }
    # At step 90 the 16-bit cell's learning rate has begun to fall, the long runs' has not: these
    # share a trunk of their own, which nobody asked for.
    own = forks["too late"]
    assert own is not None and own.step == 90 and forks["long"] == Fork(own.trunk, 60)
    assert runs[own.trunk].last_step == 90 and config_hash(runs[own.trunk].cfg) == own.trunk
    del arms["too late"]
    found = cells(write(arms=arms))
    runs = {run.key: run for run in plan_runs(list(found.values()))}
    assert runs[found["long", 0].key].fork == Fork(trunk, 60)


def test_all_committed_sweeps_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    campaign = plan([root / "configs" / "sweeps"], [], tmp_path)
    assert len(campaign.sweeps) == 8
    for sweep in campaign.sweeps:
        assert sweep.spec.claims and len(set(sweep.spec.seeds.values)) >= 5, sweep.name
    for cell in campaign.cells:
        counts = cost.parameters(cell.cfg.model)
        assert counts.matrices > 0.7 * counts.total, cell.label
    # Cells that several sweeps name are one run.
    assert len(campaign.runs) < 0.8 * len(campaign.cells)
    paths = [root / "configs/sweeps/transition-point.yaml"]
    shared = root / "configs/sweeps/shared"
    scaled = plan(paths, [], tmp_path, shared / "h200.yaml")
    assert min(cost.parameters(cell.cfg.model).total for cell in scaled.cells) > 5e6
    steady = plan(paths, [], tmp_path, shared / "steady.yaml", read_seeds("5-9"))
    assert {cell.seed for cell in steady.cells} == {5, 6, 7, 8, 9}
    assert not {run.key for run in steady.runs} & {run.key for run in campaign.runs}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale",), "'--scale' needs a value"),
        (("--seeds", "3"), "unknown argument '--seeds'"),
        (("--scale", "h300"), "unknown scale 'h300'"),
    ],
)
def test_reproduce_says_how_it_is_used(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "bitscale").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bitscale").chmod(0o755)
    script = Path(__file__).parents[2] / "launch" / "reproduce.sh"
    done = subprocess.run(
        ["/bin/bash", str(script), *arguments],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr
    assert "usage: launch/reproduce.sh [--scale small|steady|h200]" in done.stderr
