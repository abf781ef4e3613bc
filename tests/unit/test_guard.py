"""Amendments as pure functions, what the guard sees, and what it decides."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitscale.config import (
    Amendment,
    Config,
    amendments_tree,
    batch_index,
    parse_amendments,
    ramp_progress,
)
from bitscale.errors import CheckpointError, ConfigError, LossSpike, NonFiniteLoss
from bitscale.guard import (
    AMENDMENTS_NAME,
    Fault,
    Watch,
    complete_record,
    decide,
    error_for,
    load_amendments,
    write_amendments,
)
from bitscale.quant.schedule import Strength, quant_strength
from bitscale.recorder import METRICS_NAME, Recorder, TrainRecord, read_lines

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]
NAN = Fault(55, "loss is nan and the gradient norm 1 at step 55", is_finite=False)
RAMP = ("transition.at.step=40", "transition.ramp.shape=linear", "transition.ramp.over.steps=20")
SLOWER = (*RAMP, "transition.guard.action=rollback_slower", "checkpoint.every=10")
SKIP = ("transition.guard.action=skip_batch", "checkpoint.every=10")


def slower(from_step: int, factor: float = 2.0, number: int = 1) -> Amendment:
    return Amendment(
        number=number,
        action="rollback_slower",
        detected_step=from_step + 5,
        reason="r",
        from_step=from_step,
        slower=factor,
    )


def skip(*batches: int, number: int = 1, from_step: int = 0, detected_step: int = 5) -> Amendment:
    return Amendment(
        number=number,
        action="skip_batch",
        detected_step=detected_step,
        reason="r",
        from_step=from_step,
        skipped_batches=batches,
    )


def record(step: int, loss: float, grad_norm: float = 1.0) -> TrainRecord:
    return TrainRecord(step, step * 100, loss, 3e-4, 0.1, 0.0, 0.0, grad_norm)


def checkpoints(*steps: int) -> list[tuple[int, Path]]:
    return [(step, Path(f"step-{step:08d}")) for step in steps]


# --- Amendments ---


def test_the_rest_of_the_ramp_takes_so_many_times_as_long(make_config: MakeConfig) -> None:
    cfg = make_config(*RAMP)
    amendments = (slower(50, 3.0),)
    values = [quant_strength(step, cfg, amendments).weight for step in (45, 50, 51, 53, 80)]
    assert values == pytest.approx([5 / 20, 10 / 20, (10 + 1 / 3) / 20, 11 / 20, 1])
    assert quant_strength(79, cfg, amendments).weight < 1  # 10 + 3 · 10 steps after 40
    # What lies before is as planned, to the bit: checkpoints from there stay valid.
    for step in range(51):
        assert quant_strength(step, cfg, amendments) == quant_strength(step, cfg)


def test_slower_ramps_multiply_in_any_order() -> None:
    two = (slower(50, 2.0), slower(45, 3.0, number=2))
    assert ramp_progress(60, 40, two) == pytest.approx(5 + 5 / 3 + 10 / 6)
    assert ramp_progress(60, 40, two[::-1]) == ramp_progress(60, 40, two)
    assert ramp_progress(60, 40, (slower(30),)) == 10  # made before the ramp begins
    assert ramp_progress(60, 40, ()) == 20


@given(st.sets(st.integers(0, 60), max_size=12), st.integers(0, 60))
def test_batches_are_those_that_are_not_skipped(skipped: set[int], step: int) -> None:
    rest = [batch for batch in range(200) if batch not in skipped]
    amendments = [skip(batch, number=i + 1) for i, batch in enumerate(skipped)]
    assert batch_index(step, amendments) == rest[step]


def test_amendments_read_back(tmp_path: Path) -> None:
    amendments = (skip(7, 8), slower(50, number=2))
    write_amendments(tmp_path, amendments)
    assert load_amendments(tmp_path, None) == amendments
    assert parse_amendments(amendments_tree(amendments), "x") == amendments
    assert [path.name for path in tmp_path.iterdir()] == [AMENDMENTS_NAME]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "amendments.json: not JSON"),
        ('[{"number": "1"}]', "not a list of amendments (0.number: Input should be a valid int"),
        ("{}", "not a list of amendments (the list: Input should be a valid array"),
        (json.dumps(amendments_tree((skip(1, number=2),))), "are not numbered 1, 2, ...; restore"),
    ],
)
def test_damaged_amendments(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / AMENDMENTS_NAME).write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_amendments(tmp_path, None)
    assert message in str(error.value)


def test_the_run_remembers_what_its_checkpoint_does_not(tmp_path: Path) -> None:
    """Killed right after a rollback, the checkpoint gone back to is older than the amendment."""
    first, second = skip(7), skip(9, number=2)

    def reader(*made: Amendment) -> Any:
        return SimpleNamespace(
            path=Path("ck"), meta=SimpleNamespace(amendments=amendments_tree(made))
        )

    assert load_amendments(tmp_path, reader(first)) == (first,)  # a fork goes on with them
    write_amendments(tmp_path, (first, second))
    assert load_amendments(tmp_path, reader(first)) == (first, second)
    assert load_amendments(tmp_path, reader()) == (first, second)
    with pytest.raises(CheckpointError, match="does not begin with the 1 amendments that ck was"):
        load_amendments(tmp_path, reader(skip(8)))


def test_only_a_rollback_of_its_own_is_recorded_after_a_kill(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """A fork's first line must say where it began from: `--resume auto` looks for it there."""
    cfg = make_config(f"run.dir={tmp_path}")
    recorder = Recorder(tmp_path, enabled=True, resume_step=0, num_steps=9, tensorboard=False)

    def recorded() -> list[int]:
        return [line["number"] for _, _, line in read_lines(tmp_path / METRICS_NAME)]

    inherited, own, next_own = skip(7), skip(9, number=2), skip(11, number=3)
    complete_record(cfg, recorder, ())
    complete_record(cfg, recorder, (inherited,))
    assert recorded() == []
    for made in ((inherited, own), (inherited, own, next_own)):
        write_amendments(tmp_path, made)
        for _ in range(2):  # the second time it is there
            complete_record(cfg, recorder, made)
    recorder.close()
    assert recorded() == [2, 3]


# --- What is seen ---


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.inf)])
def test_non_finite_is_always_seen(make_config: MakeConfig, loss: float, norm: float) -> None:
    watch = Watch(make_config(), [])
    fault = watch.first_fault([record(1, 3.0), record(2, loss, norm), record(3, math.nan)])
    assert fault is not None and (fault.step, fault.is_finite) == (2, False)
    error = error_for(fault)
    assert isinstance(error, NonFiniteLoss)
    assert f"loss is {loss:g} and the gradient norm {norm:g} at step 2; nothing was" in str(error)


def test_a_spike_is_above_the_median_of_the_window(make_config: MakeConfig) -> None:
    cfg = make_config("transition.guard.spike=0.5", "transition.guard.window=10")
    # A rise that is slower than the window never is one; a single high loss hardly moves a median.
    rise = [record(step, 3.0 + 0.05 * step) for step in range(1, 40)]
    assert Watch(cfg, []).first_fault(rise) is None
    fault = Watch(cfg, [9.9] * 100 + [3.0] * 9 + [3.4]).first_fault([record(1, 3.51)])
    assert fault is not None and fault.is_finite
    error = error_for(fault)
    assert isinstance(error, LossSpike)
    assert "loss is 3.5100 at step 1, 0.510 nats above the median 3.0000 of the 10" in str(error)
    assert Watch(cfg, [3.0] * 10).first_fault([record(1, 3.49)]) is None
    # Seven losses are too few to tell.
    assert Watch(cfg, [3.0] * 7).first_fault([record(1, 9.0)]) is None
    assert Watch(cfg, [3.0] * 8).first_fault([record(1, 9.0)]) is not None
    assert Watch(make_config(), [3.0] * 64).first_fault([record(1, 99.0)]) is None


def test_a_run_judges_the_same_in_pieces(make_config: MakeConfig) -> None:
    """However often it logs, and after a resumption with the losses of before."""
    cfg = make_config("transition.guard.spike=0.5", "transition.guard.window=10")
    records = [record(step, 3.0 + 0.2 * math.sin(step) + (step == 33)) for step in range(1, 50)]
    whole = Watch(cfg, []).first_fault(records)
    assert whole is not None and whole.step == 33
    in_pieces = Watch(cfg, [])
    assert [in_pieces.first_fault(records[i : i + 11]) for i in (0, 11, 22)] == [None, None, whole]
    resumed = Watch(cfg, [r.loss for r in records[:30]][-10:])
    assert resumed.first_fault(records[30:]) == whole


def test_a_slower_ramp_cures_no_spike_before_the_transition(make_config: MakeConfig) -> None:
    cfg = make_config(*SLOWER, "transition.guard.spike=0.5")
    watch = Watch(cfg, [3.0] * 64)
    assert watch.first_fault([record(40, 9.0)]) is None  # step 39 from 0
    assert watch.first_fault([record(41, 9.0)]) is not None


# --- What is decided ---


def test_goes_back_to_the_last_checkpoint_before(make_config: MakeConfig) -> None:
    cfg = make_config(*SKIP)
    amendment, path = decide(cfg, NAN, (), checkpoints(30, 40, 50, 60))
    assert (path.name, amendment.from_step) == ("step-00000050", 50)
    assert (amendment.number, amendment.skipped_batches, amendment.slower) == (1, (54,), 1.0)
    # One saved after the bad step itself is of a spoilt run.
    amendment, _ = decide(cfg, NAN._replace(step=50), (), checkpoints(30, 40, 50))
    assert amendment.from_step == 40


def test_skips_the_batches_that_the_step_had(make_config: MakeConfig) -> None:
    cfg = make_config(*SKIP, "transition.guard.skip_batches=3")
    before = (skip(10, 53, from_step=50, detected_step=54),)
    amendment, _ = decide(cfg, NAN, before, checkpoints(40, 50))
    assert amendment.skipped_batches == (54, 55, 56)  # of steps 52, 53, 54
    # Not those of before the checkpoint: its weights have read them.
    amendment, _ = decide(cfg, NAN._replace(step=52), (), checkpoints(40, 50))
    assert amendment.skipped_batches == (50, 51)


def test_goes_back_further_if_that_was_not_enough(make_config: MakeConfig) -> None:
    cfg = make_config(*SKIP)
    first, _ = decide(cfg, NAN, (), checkpoints(30, 40, 50))
    second, _ = decide(cfg, NAN, (first,), checkpoints(30, 40, 50))
    assert (first.from_step, second.from_step) == (50, 40)
    assert (first.skipped_batches, second.skipped_batches) == ((54,), (55,))
    # Past the old place it is another matter.
    later, _ = decide(cfg, NAN._replace(step=57), (first,), checkpoints(30, 40, 50))
    assert later.from_step == 50
    # With nothing older, the same again.
    same, _ = decide(cfg, NAN, (first,), checkpoints(50))
    assert same.from_step == 50


def test_a_slower_ramp_must_change_something(make_config: MakeConfig) -> None:
    cfg = make_config(*SLOWER)
    # The step after the checkpoint has the same λ: one checkpoint further back.
    amendment, _ = decide(cfg, NAN._replace(step=51), (), checkpoints(30, 40, 50))
    assert (amendment.from_step, amendment.slower) == (40, 2.0)
    amendment, _ = decide(cfg, NAN._replace(step=52), (), checkpoints(30, 40, 50))
    assert amendment.from_step == 50
    # λ has been 1 for long.
    with pytest.raises(NonFiniteLoss, match="λ is the same with a slower ramp from any of the 2"):
        decide(cfg, NAN._replace(step=80), (), checkpoints(60, 70))
    amendment, _ = decide(cfg, NAN._replace(step=70), (), checkpoints(50, 60))
    assert amendment.from_step == 50
    # The last step, 99, must have λ = 1: 10 steps of the ramp are left at step 50.
    for factor, ends in ((4.8, True), (5.0, False)):
        cfg = make_config(*SLOWER, f"transition.guard.slower={factor}")
        if ends:
            decide(cfg, NAN, (), checkpoints(50))
            continue
        with pytest.raises(NonFiniteLoss, match="would not end within the run's 100 steps"):
            decide(cfg, NAN, (), checkpoints(50))


@pytest.mark.parametrize(
    ("overrides", "step", "made", "steps", "message"),
    [
        (SKIP, 55, 3, (50,), "the guard has gone back 3 times, as often as transition.guard.max"),
        (SKIP, 5, 0, (), "there is no checkpoint to go back to yet; lower checkpoint.every"),
        (SKIP, 5, 0, (5, 10), "there is no checkpoint to go back to yet"),
        (
            (*SLOWER, "transition.guard.slower=4.1"),
            *(55, 0, (45,)),
            "a ramp 4.1 times slower from step 45 on would not end within the run's 100 steps",
        ),
    ],
)
def test_gives_up_and_says_why(
    make_config: MakeConfig,
    overrides: tuple[str, ...],
    step: int,
    made: int,
    steps: tuple[int, ...],
    message: str,
) -> None:
    before = tuple(skip(i, number=i + 1) for i in range(made))
    with pytest.raises(NonFiniteLoss) as error:
        decide(make_config(*overrides), NAN._replace(step=step), before, checkpoints(*steps))
    assert str(error.value).startswith(NAN.reason + "; ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("transition.guard.action=skip_batch", "checkpoint.every=0"),
            "action='skip_batch' goes back to a checkpoint, and checkpoint.every=0 saves none",
        ),
        (
            ("transition.guard.action=rollback_slower", "transition.at=null", "checkpoint.every=5"),
            "action='rollback_slower' needs a ramp to slow down; set transition.at",
        ),
        (
            (*SLOWER, "transition.ramp={shape: none, over: {steps: 0}}"),
            "needs a ramp to slow down",
        ),
        (("transition.guard.slower=1.0",), "transition.guard.slower=1.0: Input should be greater"),
        (("transition.guard.spike=0.0",), "transition.guard.spike=0.0: Input should be greater"),
    ],
)
def test_what_cannot_be_configured(
    make_config: MakeConfig, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(*overrides)
    assert message in str(error.value)


def test_strength_without_amendments_is_what_it_was(make_config: MakeConfig) -> None:
    cfg = make_config(*RAMP)
    assert quant_strength(47, cfg) == Strength(7 / 20, 7 / 20)
