"""Helpers that several test groups share: a tiny configuration and tiny prepared corpora."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from bitscale.config import Config, ModelConfig, load_config

# A busy machine is no failure: no test depends on time.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

TINY_CONFIG = """\
run: {dir: runs/tiny}
model: {num_layers: 2, d_model: 32, num_heads: 4, num_kv_heads: 2, d_ff: 64}
data:
  corpora: [{path: corpus}]
  seq_len: 16
train: {steps: 100, global_batch_size: 8, micro_batch_size: 4, dtype: fp32}
optim: {lr: 3e-3, schedule: constant, warmup: {steps: 10}}
transition: {at: {fraction: 0.4}}
"""
WORDS = ["river", "tree", "moves", "holds", "under", "bright", "slow", "never", "always", "and"]


@pytest.fixture(scope="session")
def tiny_config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete configuration of 100 steps, transition at step 40, fp32, no corpus behind it."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY_CONFIG, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_config(tiny_config_file: Path) -> Callable[..., Config]:
    """make_config("section.key=value", ...) -> the tiny configuration with these overrides."""
    return lambda *overrides: load_config(tiny_config_file, overrides)


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_corpus(seed, ...) -> folder of a prepared corpus of random sentences, 300 pieces."""
    from bitscale.data.prepare import PrepareOptions, prepare
    from bitscale.data.sources import SourceOptions

    def make(seed: int = 0, tokenizer: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp("corpus")
        choose = random.Random(seed)
        paragraphs = (" ".join(choose.choices(WORDS, k=30)) for _ in range(200))
        (folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
        options = PrepareOptions(
            inputs=(str(folder / "text.txt"),),
            out=folder / "prepared",
            source=SourceOptions(section_bytes=500),
            tokenizer=tokenizer,
            vocab_size=300,
            split=(0.8, 0.1, 0.1),
            workers=1,
        )
        return prepare(options).directory

    return make


@pytest.fixture(scope="session")
def corpus(make_corpus: Callable[..., Path]) -> Path:
    """Folder of one small prepared corpus (6,000 words)."""
    return make_corpus(0)


@pytest.fixture(scope="session")
def count_parameters() -> Callable[[ModelConfig, int], int]:
    """Parameters of a decoder by formula: the committed sizes and the code are both held to it."""

    def count(m: ModelConfig, vocab_size: int) -> int:
        head, kv_heads = m.d_model // m.num_heads, m.num_kv_heads or m.num_heads
        num_up = 1 if m.mlp == "relu2" else 2
        norm = m.d_model if m.norm_affine else 0
        attention = 2 * m.d_model**2 + 2 * m.d_model * head * kv_heads
        mlp = (num_up + 1) * m.d_model * m.d_ff
        layer = attention + mlp + 2 * norm
        layer += (m.d_model + m.d_ff) * m.sub_norm
        if m.qk_norm:
            layer += (m.d_model + head * kv_heads) if m.qk_norm == "width" else 2 * head
        if m.bias:
            layer += m.d_model + 2 * head * kv_heads  # q, k, v
            layer += m.d_model * (m.bias != "qkv")
            layer += (m.d_model + num_up * m.d_ff) * (m.bias is True)
        return m.num_layers * layer + norm + vocab_size * m.d_model * (2 - m.tie_embeddings)

    return count
