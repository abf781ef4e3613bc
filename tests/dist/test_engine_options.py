"""What must not change the training (activation checkpointing), what is read from scattered
weights (telemetry), and what an engine refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_runs import (
    NO_PERSISTENCE,
    TERNARY_STEP,
    Curve,
    make_batches,
    make_engine,
    odd_config,
    tiny_config,
    train,
    train_step,
    whole_state,
)
from world import World

from bitscale.config import Checkpointing, Config
from bitscale.errors import ConfigError, KernelUnavailable
from bitscale.mesh import Mesh
from bitscale.quant.reference import ternarize
from bitscale.telemetry import TernaryTelemetry
from bitscale.train import train as train_command

pytestmark = pytest.mark.dist


def train_with_each(mesh: Mesh, cfg: Config, corpus: Path) -> list[Curve]:
    """Without activation checkpointing, and with both kinds."""
    curves = []
    for kind in get_args(Checkpointing):
        changed = cfg.train.model_copy(update={"activation_checkpointing": kind})
        curves.append(train(mesh, cfg.model_copy(update={"train": changed}), corpus))
    return curves


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_activation_checkpointing_changes_nothing(
    world_of: Callable[[int], World], corpus_prefix: Path, stage: int, dtype: str
) -> None:
    """Bitwise, through the transition: λ is not advanced by the second forward pass."""
    deepspeed = NO_PERSISTENCE if stage == 3 else {}
    cfg = tiny_config(stage, dtype, engine={"deepspeed": deepspeed}, train={"micro_batch_size": 2})
    for kept, *others in world_of(2).run(train_with_each, cfg, corpus_prefix):
        for recomputed in others:
            assert recomputed.losses == kept.losses
            assert recomputed.grad_norms == kept.grad_norms
            for step, state in kept.states.items():
                for name, whole in state.items():
                    ours = recomputed.states[step][name]
                    assert torch.equal(ours.master, whole.master), (step, name)
                    assert torch.equal(ours.exp_avg_sq, whole.exp_avg_sq), (step, name)


def train_on_kernels(mesh: Mesh, cfg: Config, corpus: Path) -> list[Curve] | str:
    """With the specification, the CPU's kernels, and whole-number gradients of 24 bits on both."""
    curves = []
    try:
        for bits in (None, 24):
            for kernel in ("reference", "cpu"):
                changed = cfg.quant.model_copy(update={"kernel": kernel, "gradient_bits": bits})
                curves.append(train(mesh, cfg.model_copy(update={"quant": changed}), corpus))
    except KernelUnavailable as error:
        return str(error)
    return curves


def test_kernels_change_only_rounding(
    world_of: Callable[[int], World], corpus_prefix: Path
) -> None:
    cfg = tiny_config(1, "fp32", model={"sub_norm": True})
    for curves in world_of(2).run(train_on_kernels, cfg, corpus_prefix):
        if isinstance(curves, str):
            pytest.skip(curves)  # a processor without exact int8 products
        plain = curves[0].losses
        for curve in curves[1:]:
            # λ < 1: the products are PyTorch's, on codes that are equal.
            assert curve.losses[:TERNARY_STEP] == plain[:TERNARY_STEP]
            differences = [abs(a - b) for a, b in zip(curve.losses, plain, strict=True)]
            assert max(differences) < 1e-3, differences
        # Integer products are exact in any order; the norms' gradients are not.
        pairs = zip(curves[2].losses, curves[3].losses, strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5


def build_triton(mesh: Mesh, cfg: Config) -> str:
    with pytest.raises(KernelUnavailable) as error:
        make_engine(cfg, mesh)
    return str(error.value)


def test_kernels_that_do_not_run_here_are_an_error_at_the_start(
    world_of: Callable[[int], World],
) -> None:
    cfg = tiny_config(1, "fp32", quant={"kernel": "triton"})
    for message in world_of(2).run(build_triton, cfg):
        assert message.startswith("quant.kernel='triton' needs an NVIDIA GPU and the tensors are")


def check_telemetry(mesh: Mesh, cfg: Config, corpus: Path) -> bool:
    """Two readings, five steps apart, against codes computed from the gathered masters.

    Whether codes have flipped in some layer (rank 0 computes, the others only take part).
    """
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.rank, mesh.world_size)
    telemetry = TernaryTelemetry(engine.module)
    shapes = engine.parameter_shapes()
    before: dict[str, torch.Tensor] = {}
    some_flipped = False
    for reading in range(2):
        figures = telemetry.read(engine.gathered, compute=mesh.is_main)
        assert len(figures) == (7 * cfg.model.num_layers if mesh.is_main else 0)
        state = whole_state(engine, mesh)
        for layer, figure in figures.items():
            name = f"{layer}.weight"
            weight = state[name].master.view(shapes[name])
            codes, scale = ternarize(
                weight.bfloat16() if cfg.train.dtype == "bf16" else weight, cfg.quant
            )
            assert figure["scale"] == float(scale)
            assert figure["zeros"] == int((codes == 0).sum()) / codes.numel()
            if reading == 0:
                assert figure["flipped"] is None
            else:
                flipped = int((codes != before[layer]).sum())
                assert figure["flipped"] == flipped / codes.numel()
                some_flipped |= flipped > 0
            before[layer] = codes
        for step in range(5):
            train_step(engine, batches, step, mesh)
    return some_flipped


@pytest.mark.parametrize(("stage", "dtype"), [(3, "fp32"), (3, "bf16"), (1, "bf16")])
def test_telemetry_of_scattered_weights(
    world_of: Callable[[int], World], corpus_prefix: Path, stage: int, dtype: str
) -> None:
    """Also of matrices whose size is no multiple of 4, which telemetry pads to remember."""
    deepspeed = NO_PERSISTENCE if stage == 3 else {}
    cfg = odd_config(stage, dtype, engine={"deepspeed": deepspeed})
    assert world_of(2).run(check_telemetry, cfg, corpus_prefix)[0]


def build(mesh: Mesh, cfg: Config) -> str:
    with pytest.raises(ConfigError) as error:
        make_engine(cfg, mesh)
    return str(error.value)


def test_a_batch_that_the_ranks_cannot_share_is_refused(world_of: Callable[[int], World]) -> None:
    cfg = tiny_config(1, "fp32", train={"global_batch_size": 9, "micro_batch_size": 3})
    for message in world_of(2).run(build, cfg):
        assert message == (
            "train.global_batch_size=9 is not a multiple of train.micro_batch_size=3 x 2 "
            "data-parallel ranks (world_size=2); use a global batch of 6 or 12, or another number "
            "of ranks"
        )


def test_the_train_command_refuses_it_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")  # as a launcher of 3 ranks sets it
    match = r"3 data-parallel ranks \(world_size=3\); use a global batch of 6 or 9, or another"
    with pytest.raises(ConfigError, match=match):
        train_command(tiny_config(1, "fp32"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("deepspeed", "reason"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": "huge"}},
            "reduce_bucket_size Input should be a valid integer",
        ),
        (
            {"zero_optimization": {"no_such_key": 1}},
            "no_such_key Extra inputs are not permitted",
        ),
    ],
)
def test_what_deepspeed_refuses_is_a_configuration_error(
    world_of: Callable[[int], World], deepspeed: dict[str, object], reason: str
) -> None:
    cfg = tiny_config(1, "fp32", engine={"deepspeed": deepspeed})
    (message,) = world_of(1).run(build, cfg)
    assert message.startswith("DeepSpeed refuses the configuration with engine.deepspeed={'zero_")
    assert reason in message
    assert "\n" not in message


def build_for_cuda(mesh: Mesh) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cuda")
        return build(mesh, tiny_config(1, "fp32"))


def test_a_foreign_deepspeed_accelerator_is_refused(world_of: Callable[[int], World]) -> None:
    (message,) = world_of(1).run(build_for_cuda)
    assert message == (
        "environment variable DS_ACCELERATOR='cuda' but the run uses 'cpu'; unset it or set "
        "engine.device"
    )
