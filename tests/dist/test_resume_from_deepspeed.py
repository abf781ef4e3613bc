"""A run that plain DeepSpeed trained goes on in bitscale: same masters, moments, counts and loss."""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_fragments import same
from tiny_runs import (
    KINDS,
    Whole,
    make_batches,
    make_engine,
    micro_batches,
    odd_config,
    tiny_config,
    train_step,
    whole_state,
)
from torch import Tensor, nn
from world import World

from bitscale.config import Config
from bitscale.convert.names import to_huggingface
from bitscale.engine.fragments import fragments
from bitscale.engine.train_engine import _import_deepspeed
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh
from bitscale.model.decoder import Decoder
from bitscale.sources import ForeignSource, locate, open_state
from bitscale.sources.as_model import open_model

pytestmark = pytest.mark.dist

STEPS = 3
SLOW = 300.0  # seconds, to import and start DeepSpeed or megatron-core on a busy machine
BATCH = {"global_batch_size": 8, "micro_batch_size": 2}


class Case(NamedTuple):
    """What DeepSpeed trains, and how."""

    stage: int
    dtype: str
    model: str  # decoder: ours, tied; odd: sizes that 2 does not divide; llama: of transformers

    @property
    def folder(self) -> str:
        return "-".join(map(str, self))


# DeepSpeed's three optimizers: BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3.
CASES = [Case(1, "bf16", "decoder"), Case(2, "fp32", "llama"), Case(3, "bf16", "odd")]
CONVERTED = (CASES[0], CASES[2])


class Saved(NamedTuple):
    """What the plain run held when it saved, by our names, and the loss of its next step."""

    state: dict[str, Whole]
    next_loss: float


def config_of(case: Case) -> Config:
    """bitscale's configuration of the run: it turns ternary at its first own step."""
    make = odd_config if case.model == "odd" else tiny_config
    later = {"at": {"step": STEPS + 1}, "ramp": {"shape": "none"}}
    return make(case.stage, case.dtype, train=dict(BATCH), transition=later)


class _Llama(nn.Module):
    """transformers' Llama of the same shapes and first weights as `ours`."""

    def __init__(self, ours: Decoder, cfg: Config) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        m = cfg.model
        shape = LlamaConfig(
            vocab_size=m.vocab_size,
            num_hidden_layers=m.num_layers,
            hidden_size=m.d_model,
            num_attention_heads=m.num_heads,
            num_key_value_heads=m.num_kv_heads,
            intermediate_size=m.d_ff,
            rms_norm_eps=m.norm_eps,
            rope_theta=m.rope_theta,
            tie_word_embeddings=m.tie_embeddings,
            attn_implementation="eager",
        )
        self.module = LlamaForCausalLM(shape)  # names begin with `module.`, as a wrapper's do
        with torch.no_grad():
            own = dict(self.module.named_parameters())
            for name, weight in ours.named_parameters():
                own[to_huggingface(name)].copy_(weight)

    def forward(self, input_ids_BS: Tensor, target_ids_BS: Tensor) -> Tensor:
        logits = self.module(input_ids_BS).logits
        return F.cross_entropy(logits.float().flatten(0, 1), target_ids_BS.flatten())


def plain_runs(mesh: Mesh, root: Path, corpus: Path) -> dict[Case, Saved]:
    """Train and save every case, without anything of bitscale's engine."""
    _import_deepspeed("cpu")  # quietly, and without its compilation
    return {case: plain_run(mesh, case, root / case.folder, corpus) for case in CASES}


def plain_run(mesh: Mesh, case: Case, folder: Path, corpus: Path) -> Saved:
    import deepspeed

    cfg = config_of(case)
    model: nn.Module = Decoder(cfg.model, cfg.quant, seed=cfg.train.seed)
    if case.model == "llama":
        model = _Llama(model, cfg)
    adam = adam_of(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=deepspeed_json(case))
    batches = make_batches(cfg, corpus, mesh.rank, mesh.world_size)
    for step in range(STEPS):
        for batch in micro_batches(cfg, batches, step):
            engine.backward(engine(batch.input_ids_BS, batch.target_ids_BS))
            engine.step()
    state = state_of(engine, adam, case.stage, mesh)
    engine.save_checkpoint(str(folder), client_state={"seq_length": cfg.data.seq_len})
    losses = [
        engine(batch.input_ids_BS, batch.target_ids_BS).detach().float()
        for batch in micro_batches(cfg, batches, STEPS)
    ]
    loss = float(mesh.sum(torch.stack(losses).mean())) / mesh.world_size
    return Saved({ours(name, case): whole for name, whole in state.items()}, loss)


def ours(name: str, case: Case) -> str:
    from bitscale.convert.names import from_huggingface

    return name if case.model != "llama" else str(from_huggingface(name.removeprefix("module.")))


def adam_of(model: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))


def deepspeed_json(case: Case) -> dict[str, Any]:
    """A user's: DeepSpeed's defaults but for what CPU and stage need."""
    config = {
        "train_batch_size": BATCH["global_batch_size"],
        "train_micro_batch_size_per_gpu": BATCH["micro_batch_size"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # The one combination that takes DeepSpeed's BF16_Optimizer.
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    return config | (fp32_sums if (case.stage, case.dtype) == (1, "bf16") else {})


def state_of(engine: Any, adam: torch.optim.AdamW, stage: int, mesh: Mesh) -> dict[str, Whole]:
    """Out of the running engine's memory, not out of files (a collective)."""
    model = engine.module
    running = SimpleNamespace(
        fragments=lambda: fragments(model, engine.optimizer, adam, stage=stage, mesh=mesh),
        parameter_shapes=lambda: {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()
        },
    )
    return whole_state(running, mesh)


def resume(mesh: Mesh, path: Path, case: Case, saved: Saved, corpus: Path) -> float:
    """Restore `path` into bitscale's engine; how far the first loss is off the plain run's."""
    cfg = config_of(case)
    source = open_state(locate(path), cfg)
    assert isinstance(source, ForeignSource) and source.has_optimizer_state
    assert source.meta.step == STEPS
    assert source.meta.identity == {
        "train.global_batch_size": "8",
        "data.seq_len": "16",
        "data.position": "24 sequences",
    }
    engine = make_engine(cfg, mesh)
    source.restore(engine.fragments(), engine.parameter_shapes())
    engine.publish_masters()
    state = whole_state(engine, mesh)
    assert state.keys() == saved.state.keys()
    differing = [name for name in state if not same(state[name], saved.state[name])]
    assert not differing, f"{path}: {differing}"
    batches = make_batches(cfg, corpus, mesh.rank, mesh.world_size)
    loss, _ = train_step(engine, batches, STEPS, mesh)
    return abs(loss - saved.next_loss)


def convert(mesh: Mesh, folder: Path) -> None:
    """DeepSpeed's own conversion, in this process."""
    from deepspeed.checkpoint.ds_to_universal import main

    if mesh.is_main:
        main(
            argparse.Namespace(
                input_folder=str(locate(folder)),
                output_folder=str(folder / "converted"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    mesh.barrier()


@pytest.fixture(scope="module")
def saved(
    world_of: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory, corpus_prefix: Path
) -> tuple[Path, dict[Case, Saved]]:
    root = tmp_path_factory.mktemp("deepspeed")
    return root, world_of(2).run(plain_runs, root, corpus_prefix, seconds=SLOW)[0]


def resume_all(
    mesh: Mesh, root: Path, saved: dict[Case, Saved], corpus: Path, cases: list[Case]
) -> dict[Case, float]:
    return {case: resume(mesh, root / case.folder, case, saved[case], corpus) for case in cases}


def resume_converted(
    mesh: Mesh, root: Path, saved: dict[Case, Saved], corpus: Path
) -> dict[Case, float]:
    return {
        case: resume(mesh, root / case.folder / "converted", case, saved[case], corpus)
        for case in CONVERTED
    }


def convert_all(mesh: Mesh, root: Path) -> None:
    for case in CONVERTED:
        convert(mesh, root / case.folder)


# The same weights on the same micro-batches: our forward pass and DeepSpeed's run the same module,
# but for transformers' Llama, whose norm, rotation and attention round elsewhere.
def bound(case: Case) -> float:
    return 2e-6 if case.model == "llama" else 1e-6


def test_native_checkpoints_go_on(
    world_of: Callable[[int], World], saved: tuple[Path, dict[Case, Saved]], corpus_prefix: Path
) -> None:
    root, runs = saved
    offs = world_of(2).run(resume_all, root, runs, corpus_prefix, CASES)[0]
    for case, off in offs.items():
        assert off <= bound(case), f"{case}: {off}"


def test_universal_checkpoints_go_on(
    world_of: Callable[[int], World], saved: tuple[Path, dict[Case, Saved]], corpus_prefix: Path
) -> None:
    """On another number of ranks."""
    root, runs = saved
    world_of(1).run(convert_all, root)
    offs = world_of(1).run(resume_converted, root, runs, corpus_prefix)[0]
    for case, off in offs.items():
        assert off <= bound(case), f"{case}: {off}"


def test_they_are_models_to_convert(
    world_of: Callable[[int], World], saved: tuple[Path, dict[Case, Saved]]
) -> None:
    root, runs = saved
    folders = {root / case.folder: case for case in CASES}
    for path, case in folders.items():
        source = open_model(path, config_of(case))
        assert (source.kind, source.dtype, source.step) == ("deepspeed", case.dtype, STEPS)
        assert source.shapes.keys() == runs[case].state.keys()
        for name, (master, *_) in runs[case].state.items():
            assert torch.equal(source.latent(name).flatten(), master.flatten()), name


# --- Damage and refusals, on copies of what DeepSpeed wrote ---


def copied(root: Path, case: Case, out: Path) -> Path:
    """The tag directory of a case, to be damaged."""
    shutil.copytree(locate(root / case.folder), out)
    return out


def refusal(path: Path, case: Case) -> str:
    with pytest.raises(CheckpointError) as error:
        source = open_state(path, config_of(case))
        for name, shape in source.meta.shapes.items():
            for kind in KINDS:
                source.read(name, kind, 0, torch.Size(shape).numel())
    return str(error.value)


ZERO1, ZERO2, ZERO3 = CASES
RANK1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def test_incomplete_checkpoints_are_refused(
    saved: tuple[Path, dict[Case, Saved]], tmp_path: Path
) -> None:
    root, _ = saved
    path = copied(root, ZERO2, tmp_path / "rank")
    (path / RANK1).unlink()
    assert refusal(path, ZERO2) == (
        f"{path}: 1 optimizer files instead of 2; use a complete checkpoint"
    )
    path = copied(root, ZERO1, tmp_path / "model")
    (path / "mp_rank_00_model_states.pt").unlink()
    assert "mp_rank_00_model_states.pt: missing; it names the parameters" in refusal(path, ZERO1)

    path = copied(root, ZERO3, tmp_path / "truncated")
    file = path / f"bf16_{RANK1}"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refusal(path, ZERO3)
    assert message.startswith(f"{file}: not a readable torch.save file (")
    assert "truncated or foreign: use another checkpoint" in message

    path = copied(root, ZERO2, tmp_path / "stage0")
    for file in path.glob("*_optim_states.pt"):
        file.unlink()
    assert "no *_optim_states.pt, so of ZeRO stage 0" in refusal(path, ZERO2)

    path = copied(root, ZERO2, tmp_path / "tensor-parallel")
    (path / RANK1).rename(path / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    message = refusal(path, ZERO2)
    assert "is of tensor-parallel rank 1; convert the checkpoint with DeepSpeed's ds_to" in message


def test_another_optimizer_is_refused(
    saved: tuple[Path, dict[Case, Saved]], tmp_path: Path
) -> None:
    root, _ = saved
    path = copied(root, ZERO1, tmp_path / "lion")
    for file in path.glob("*_optim_states.pt"):
        state = torch.load(file, weights_only=False)
        for kept in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            del kept["exp_avg_sq"]
        torch.save(state, file)
    assert "keeps step, exp_avg, not exp_avg_sq: it is not Adam" in refusal(path, ZERO1)


def test_a_pickle_with_code_is_refused_and_does_not_run(
    saved: tuple[Path, dict[Case, Saved]], tmp_path: Path
) -> None:
    root, _ = saved
    path, marker = copied(root, ZERO1, tmp_path / "evil"), tmp_path / "marker"
    file = path / f"bf16_{RANK1}"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"more": Payload(marker)}, file)
    message = refusal(path, ZERO1)
    assert message.startswith(f"{file}: refused, its pickle names ")
    assert "system, which is code, not a tensor; nothing of it was run" in message
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # it was live


class Payload:
    """Pickled, a call of os.system; the plainest of attacks."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_another_model_is_refused_by_shape_and_then_by_name(
    saved: tuple[Path, dict[Case, Saved]],
) -> None:
    root, _ = saved
    for case, changes, wanted in (
        (
            ZERO1,
            {"d_ff": 64},
            "layers.0.mlp.gate.weight has shape [48, 32] there and [64, 32] here "
            "(layers.0.mlp.gate.weight); set the model section to the checkpoint's",
        ),
        (
            ZERO2,
            {"vocab_size": 64},
            "model.embed_tokens.weight has shape [61, 32] there and [64, 32] here (embed.weight); "
            "set the model section to the checkpoint's (model.vocab_size=61",
        ),
        (
            ZERO2,
            {"num_layers": 1},
            "not the model of this configuration: missing none; unexpected "
            "module.model.layers.1.self_attn.q_proj.weight, ",
        ),
        (
            ZERO1,
            {"qk_norm": True, "tie_embeddings": False},
            "missing layers.0.attn.q_norm.weight, layers.0.attn.k_norm.weight, "
            "layers.1.attn.q_norm.weight, layers.1.attn.k_norm.weight, head.weight; "
            "unexpected none; set the model section",
        ),
    ):
        cfg = config_of(case)
        other = cfg.model_copy(update={"model": cfg.model.model_copy(update=changes)})
        with pytest.raises(CheckpointError) as error:
            open_state(locate(root / case.folder), other)
        assert wanted in str(error.value)
