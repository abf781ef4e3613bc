"""The guard of a run: sees that training goes wrong, and goes back to a checkpoint.

`Watch` finds the first bad step, `decide` says where to go back to and what to do otherwise from
there, `go_back` makes that durable. What it changes are amendments (config/amendments.py): with
the step and the configuration they determine everything, so a run that was killed repeats them.
docs/guard.md has the rules.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bitscale import checkpoint, run
from bitscale.config import (
    Amendment,
    Amendments,
    Config,
    amendments_tree,
    batch_index,
    num_steps,
    parse_amendments,
    tokens_per_step,
    transition_step,
)
from bitscale.errors import (
    BitscaleError,
    CheckpointError,
    LossSpike,
    NonFiniteLoss,
    TrainingFault,
)
from bitscale.mesh import Mesh
from bitscale.quant.schedule import TERNARY, quant_strength
from bitscale.recorder import Recorder, TrainRecord
from bitscale.sources import StateSource

AMENDMENTS_NAME = "amendments.json"
_FEWEST_LOSSES = 8  # a level from fewer is none
_REMEDY = (
    "nothing was saved since the last checkpoint: resume from it with a lower optim.lr, a longer "
    "ramp, or another data.seed"
)


class Fault(NamedTuple):
    step: int  # optimizer steps done, the bad one included
    reason: str
    is_finite: bool


class GoBack(Exception):
    """Raised on every rank at a fault that the guard does something about."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


class Watch:
    """Judges the steps of a run in order, each by the losses before it."""

    def __init__(self, cfg: Config, losses: Iterable[float]) -> None:
        """`losses`: of the steps before the first that is judged."""
        self._guard = cfg.transition.guard
        self._losses = deque(filter(math.isfinite, losses), maxlen=self._guard.window)
        # Before the transition there is no ramp to slow down.
        start = transition_step(cfg) if self._guard.action == "rollback_slower" else 0
        self._first = 0 if start is None else start

    def first_fault(self, records: Iterable[TrainRecord]) -> Fault | None:
        """The first bad step of `records`, which follow those judged before."""
        for record in records:
            loss, step = record.loss, record.step
            # A NaN gradient spoils the weights one step before the loss shows it.
            if not (math.isfinite(loss) and math.isfinite(record.grad_norm)):
                reason = f"loss is {loss:g} and the gradient norm {record.grad_norm:g}"
                return Fault(step, f"{reason} at step {step}", is_finite=False)
            if self._guard.spike is not None and step > self._first:
                level = self._level()
                if loss > level + self._guard.spike:
                    return Fault(
                        step,
                        f"loss is {loss:.4f} at step {step}, {loss - level:.3f} nats above the "
                        f"median {level:.4f} of the {len(self._losses)} steps before",
                        is_finite=True,
                    )
            self._losses.append(loss)
        return None

    def _level(self) -> float:
        """The running level, beyond every loss while there are too few to tell."""
        enough = len(self._losses) >= min(_FEWEST_LOSSES, self._guard.window)
        return median(self._losses) if enough else math.inf


def error_for(fault: Fault, remedy: str = "") -> TrainingFault:
    """What ends a run at `fault`."""
    if fault.is_finite:
        above = f"{fault.reason}, more than transition.guard.spike allows"
        return LossSpike(f"{above}; {remedy or _REMEDY}")
    return NonFiniteLoss(f"{fault.reason}; {remedy or _REMEDY}")


def decide(
    cfg: Config, fault: Fault, made: Amendments, checkpoints: Sequence[tuple[int, Path]]
) -> tuple[Amendment, Path]:
    """What to change after `fault`, and which checkpoint to go on from.

    Args:
        made: the amendments of before.
        checkpoints: (step, path) of all that the run could go back to, oldest first.

    Raises:
        TrainingFault: there is nothing left to try; the message says why.
    """
    guard = cfg.transition.guard
    if len(made) >= guard.max_retries:
        raise error_for(
            fault,
            f"the guard has gone back {len(made)} times, as often as transition.guard.max_retries "
            "allows; raise it, lower optim.lr, or change the ramp",
        )
    before = [(step, path) for step, path in checkpoints if step < fault.step]
    if not before:
        raise error_for(
            fault, "there is no checkpoint to go back to yet; lower checkpoint.every or optim.lr"
        )
    choices = [(_amendment(cfg, fault, made, step), path) for step, path in before]
    useful = [choice for choice in choices if _matters(cfg, fault, made, choice[0])]
    if not useful:
        raise error_for(
            fault,
            f"λ is the same with a slower ramp from any of the {len(before)} checkpoints on that "
            "are kept; use transition.guard.action=skip_batch, or raise checkpoint.keep_last",
        )
    # Failed again before it got past the last failure: that checkpoint was too late.
    again = bool(made) and fault.step <= made[-1].detected_step
    earlier = [choice for choice in useful if again and choice[0].from_step < made[-1].from_step]
    amendment, path = (earlier or useful)[-1]
    if amendment.slower > 1 and not _ends_ternary(cfg, (*made, amendment)):
        raise error_for(
            fault,
            f"a ramp {guard.slower:g} times slower from step {amendment.from_step} on would not "
            f"end within the run's {num_steps(cfg)} steps; lower transition.guard.slower or "
            "optim.lr, or train longer",
        )
    return amendment, path


def _amendment(cfg: Config, fault: Fault, made: Amendments, from_step: int) -> Amendment:
    guard = cfg.transition.guard
    assert guard.action != "stop"
    slower = guard.slower
    skipped: tuple[int, ...] = ()
    if guard.action == "skip_batch":
        # Batches of before the checkpoint are in its weights already.
        first = max(from_step, fault.step - guard.skip_batches)
        slower, skipped = 1.0, tuple(batch_index(s, made) for s in range(first, fault.step))
    return Amendment(
        number=len(made) + 1,
        action=guard.action,
        detected_step=fault.step,
        reason=fault.reason,
        from_step=from_step,
        slower=slower,
        skipped_batches=skipped,
    )


def _matters(cfg: Config, fault: Fault, made: Amendments, amendment: Amendment) -> bool:
    """Whether anything that led to `fault` is otherwise with `amendment`."""
    if amendment.skipped_batches:
        return True
    return any(
        quant_strength(step, cfg, made) != quant_strength(step, cfg, (*made, amendment))
        for step in range(amendment.from_step, fault.step)
    )


def _ends_ternary(cfg: Config, amendments: Amendments) -> bool:
    return quant_strength(num_steps(cfg) - 1, cfg, amendments) == TERNARY


def go_back(
    cfg: Config, mesh: Mesh, recorder: Recorder, fault: Fault, made: Amendments
) -> tuple[Amendment, Path]:
    """Decide on rank 0, and make it durable there; a collective that returns, or raises, the same
    on every rank.

    A kill in between leaves a run that comes to the same fault and the same decision again, or
    one that has made it: the checkpoint is put in force first, then the amendment is written.
    """
    decision: tuple[Amendment, Path] | BitscaleError | None = None
    if mesh.is_main:
        try:
            decision = _go_back(cfg, recorder, fault, made)
        except BitscaleError as error:
            decision = error
        except OSError as error:
            decision = CheckpointError(
                f"{cfg.run.dir}: could not go back after {fault.reason}: {error}; make the "
                "directory writable and resume"
            )
    decision = mesh.gather_objects(decision)[0]
    if isinstance(decision, BitscaleError):
        raise decision
    assert decision is not None
    return decision


def _go_back(
    cfg: Config, recorder: Recorder, fault: Fault, made: Amendments
) -> tuple[Amendment, Path]:
    recorder.flush()
    amendment, path = decide(cfg, fault, made, run.checkpoints_to_go_back_to(cfg))
    checkpoint.rewind(run.checkpoints_dir(cfg), path)
    write_amendments(Path(cfg.run.dir), (*made, amendment))
    recorder.rewind(amendment.from_step)
    record(cfg, recorder, amendment)
    return amendment, path


def record(cfg: Config, recorder: Recorder, amendment: Amendment) -> None:
    """The rollback as an event at the step that the run went back to."""
    step = amendment.from_step
    recorder.event(step, step * tokens_per_step(cfg), "rollback", **amendment.model_dump())
    recorder.flush()


def complete_record(cfg: Config, recorder: Recorder, amendments: Amendments) -> None:
    """Record the last rollback of a run that was killed just before that.

    Those that it has inherited from a trunk are none of its own: no file holds them. Nor may they
    come before its first event, which says what it began from.
    """
    if not amendments or not (Path(cfg.run.dir) / AMENDMENTS_NAME).is_file():
        return
    last = recorder.last_rollback()
    if any(last.get(key) != value for key, value in amendments_tree(amendments)[-1].items()):
        record(cfg, recorder, amendments[-1])


def load_amendments(run_dir: Path, reader: StateSource | None) -> Amendments:
    """The amendments in force: the run's, which begin with those of the checkpoint to resume from.

    Raises CheckpointError if the two contradict each other.
    """
    inherited: Amendments = ()
    if reader is not None and reader.meta.amendments:
        inherited = parse_amendments(reader.meta.amendments, f"{reader.path}/meta.json")
    path = run_dir / AMENDMENTS_NAME
    if not path.is_file():
        return inherited
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore it from a copy") from None
    own = parse_amendments(tree, str(path))
    if own[: len(inherited)] != inherited:
        assert reader is not None
        raise CheckpointError(
            f"{path} does not begin with the {len(inherited)} amendments that {reader.path} was "
            "trained with; restore it, or delete it to go on with the checkpoint's alone"
        )
    return own


def write_amendments(run_dir: Path, amendments: Amendments) -> None:
    """Replace the run's amendments atomically and durably."""
    staging = run_dir / f".{AMENDMENTS_NAME}.partial"
    with staging.open("w", encoding="utf-8") as file:
        file.write(json.dumps(amendments_tree(amendments), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    staging.replace(run_dir / AMENDMENTS_NAME)
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
