"""What the guard of a run has changed in its course, as data.

λ and the batch of a step are pure functions of (step, configuration, amendments): `ramp_progress`
and `batch_index` are where the amendments enter. docs/guard.md has the formulas.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from bitscale.config.schema import NonNegativeInt, PositiveInt, Section
from bitscale.errors import CheckpointError

GuardAction = Literal["rollback_slower", "skip_batch"]


class Amendment(Section):
    """One rollback: what was seen, where the run went back to, and what it does otherwise now."""

    number: PositiveInt  # 1, 2, ... in the order in which they were made
    action: GuardAction
    detected_step: PositiveInt  # optimizer steps done when it was seen
    reason: str  # what was seen
    from_step: NonNegativeInt  # of the checkpoint that the run went back to
    # from from_step on the ramp takes so many times as long
    slower: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    skipped_batches: tuple[NonNegativeInt, ...] = ()  # never trained on


Amendments = tuple[Amendment, ...]
_PARSER = TypeAdapter(Amendments)


def ramp_progress(step: int, start: int, amendments: Iterable[Amendment]) -> float:
    """Steps of the ramp that lie behind 0-based `step`, for a ramp that begins at `start`.

    The sum over the steps from `start` to `step` - 1 of 1 / Π slower, the product over the
    amendments that are in force at each: exactly step - start without any.
    """
    progress, position, factor = 0.0, start, 1.0
    for amendment in sorted(amendments, key=lambda a: a.from_step):
        if amendment.from_step >= step:
            break
        if amendment.from_step > position:
            progress += (amendment.from_step - position) / factor
            position = amendment.from_step
        factor *= amendment.slower
    return progress + (step - position) / factor


def batch_index(step: int, amendments: Iterable[Amendment]) -> int:
    """The batch that 0-based `step` is trained on: the step-th of those that are not skipped."""
    index = step
    for skipped in sorted({batch for a in amendments for batch in a.skipped_batches}):
        if skipped > index:
            break
        index += 1
    return index


def parse_amendments(tree: object, where: str) -> Amendments:
    """Validate a list, as JSON has it. Raises CheckpointError, naming `where`."""
    try:
        # JSON mode: lists become tuples, but "12" does not become 12 (strict).
        amendments = _PARSER.validate_json(json.dumps(tree))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the list"
        raise CheckpointError(
            f"{where}: not a list of amendments ({place}: {first['msg']}); restore it from a copy"
        ) from None
    if [a.number for a in amendments] != list(range(1, len(amendments) + 1)):
        raise CheckpointError(
            f"{where}: the amendments are not numbered 1, 2, ...; restore it from a copy"
        )
    return amendments


def amendments_tree(amendments: Amendments) -> list[dict[str, Any]]:
    """Plain JSON types, which `parse_amendments` reads back."""
    return [amendment.model_dump(mode="json") for amendment in amendments]
