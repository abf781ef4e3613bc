"""A run that plain DeepSpeed trained goes on in bitscale: same masters, moments, counts and loss."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_fragments import same
from tiny_runs import (
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
from bitscale.mesh import Mesh
from bitscale.model.decoder import Decoder
from bitscale.sources import ForeignSource, locate, open_state

pytestmark = pytest.mark.dist

STEPS = 3
BATCH = {"global_batch_size": 8, "micro_batch_size": 2}


class Case(NamedTuple):
    """What DeepSpeed trains, and how."""

    stage: int
    dtype: str
    model: str  # decoder: ours, tied; odd: sizes that 2 does not divide; llama: of transformers

    @property
    def folder(self) -> str:
        return "-".join(map(str, self))


CASES = [
    Case(1, "bf16", "decoder"),
    Case(1, "fp32", "odd"),
    Case(2, "bf16", "odd"),
    Case(2, "fp32", "llama"),
    Case(3, "bf16", "odd"),
    Case(3, "fp32", "decoder"),
]
CONVERTED = (CASES[0], CASES[4])


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
        # As a user has it who keeps the conversion only.
        (folder / "latest").unlink()
    mesh.barrier()


@pytest.fixture(scope="module")
def saved(
    world_of: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory, corpus_prefix: Path
) -> tuple[Path, dict[Case, Saved]]:
    root = tmp_path_factory.mktemp("deepspeed")
    return root, world_of(2).run(plain_runs, root, corpus_prefix)[0]


def resume_all(
    mesh: Mesh, root: Path, saved: dict[Case, Saved], corpus: Path, cases: list[Case]
) -> dict[Case, float]:
    return {case: resume(mesh, root / case.folder, case, saved[case], corpus) for case in cases}


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
    for size in (2, 1):  # at its own number of ranks, and at another
        for case, off in world_of(size).run(resume_all, root, runs, corpus_prefix, CASES)[0].items():
            assert off <= bound(case), f"{case} on {size} ranks: {off}"


def test_universal_checkpoints_go_on(
    world_of: Callable[[int], World], saved: tuple[Path, dict[Case, Saved]], corpus_prefix: Path
) -> None:
    root, runs = saved
    world_of(1).run(convert_all, root)
    for case in CONVERTED:
        assert locate(root / case.folder).name == "converted"
    offs = world_of(1).run(resume_all, root, runs, corpus_prefix, list(CONVERTED))[0]
    for case, off in offs.items():
        assert off <= bound(case), f"{case}: {off}"
