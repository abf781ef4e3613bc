"""DeepSpeed's universal checkpoints, as its ds_to_universal.py converts them.

    zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt   whole parameters, whatever the layout was;
                                                  of ZeRO-3 flat, of others in their shape
    zero/PARAMETER/step.pt                        Adam's count (not of ZeRO-3)
    zero/optimizer_state.pt
    *mp_rank_*_model_states.pt                    names, shapes, steps, client state

A tied weight is there a second time, taken from the 16-bit model: only names that the optimizer
had are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitscale.errors import CheckpointError
from bitscale.names_in_files import is_plain
from bitscale.sources.foreign import Shape, Tensors
from bitscale.sources.pickles import load_tensors
from bitscale.sources.zero import HARMLESS, as_deepspeed_says

_FILES = {"master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


def is_universal(path: Path) -> bool:
    """Whether `path` is a directory that ds_to_universal.py wrote."""
    return (path / "zero").is_dir()


def open_universal(path: Path) -> Tensors:
    """The state in such a directory. CheckpointError if it is damaged or incomplete."""
    models = [load_tensors(f, f, HARMLESS) for f in sorted(path.glob("*_model_states.pt"))]
    if not models:
        raise CheckpointError(
            f"{path}: no *_model_states.pt beside zero/; it names the parameters: copy it there"
        )

    def read(name: str, kind: str) -> Tensor:
        file = path / "zero" / name / _FILES[kind]
        if not file.is_file():
            raise CheckpointError(
                f"{file}: missing; the conversion was interrupted, or the optimizer was not "
                "Adam: convert again, or continue from the weights alone"
            )
        found = load_tensors(file, file, HARMLESS)
        tensor: Tensor = (found["param"] if isinstance(found, dict) else found).detach()
        return tensor.view(shapes[name]) if tensor.ndim < len(shapes[name]) else tensor

    shapes: dict[str, Shape] = {}
    try:
        for model in models:
            for group in model["param_shapes"]:
                shapes |= {name: tuple(shape) for name, shape in group.items()}
        for name in shapes:
            if not is_plain(name):
                raise CheckpointError(
                    f"{path}: names a parameter {name!a}, which leads out of the checkpoint; do "
                    "not use a checkpoint of unknown origin"
                )
            shapes[name] = _shape(path, name, shapes[name])
        step = int(models[0]["global_steps"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not laid out as DeepSpeed 0.19 writes universal checkpoints ({error!r}); "
            "convert again with this version's ds_to_universal.py"
        ) from error
    found = Tensors(
        path=path,
        format="DeepSpeed universal",
        shapes=shapes,
        read=read,
        step=step,
        adam_steps=_adam_steps(path, shapes),
        stated={},
        world_size=len(models),
    )
    return as_deepspeed_says(found, models[0])


def _shape(path: Path, name: str, here: Shape) -> Shape:
    """Of the whole parameter; `here` is that of one tensor-parallel rank's part."""
    file = path / "zero" / name / _FILES["master"]
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; convert again with ds_to_universal.py")
    found = load_tensors(file, file, HARMLESS)
    return tuple(found["param"].shape) if isinstance(found, dict) else here


def _adam_steps(path: Path, names: Mapping[str, Shape]) -> dict[str, int]:
    common: int | None = None
    steps = {}
    for name in names:
        file = path / "zero" / name / "step.pt"
        if file.is_file():
            steps[name] = int(load_tensors(file, file))
            continue
        if common is None:
            common = _common_step(path / "zero" / "optimizer_state.pt")
        steps[name] = common
    return steps


def _common_step(file: Path) -> int:
    """Adam's count where each parameter does not have its own."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; convert again with ds_to_universal.py")
    state: Mapping[str, Any] = load_tensors(file, file, HARMLESS)
    adam = state.get("optimizer_state_dict", {}).get("state", {})
    for found in (*adam.values(), *state.get("param_groups", ())):
        if "step" in found:
            return int(found["step"])
    raise CheckpointError(f"{file}: does not say how many steps Adam has done; convert again")
