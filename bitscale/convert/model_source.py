"""A model as every writer of `bitscale/convert` sees it: one tensor at a time, from any source.

Shapes: F outputs, D inputs of a linear layer.

Names and shapes are ours and logical (names.py has other people's). A tied head is not listed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitscale.checkpoint import ANY, Reader
from bitscale.config import (
    Config,
    ModelConfig,
    QuantConfig,
    parse_amendments,
    parse_config,
    quant_spec,
)
from bitscale.config.spec import CodeSpec, QuantSpec, kernel_measure
from bitscale.convert.loaded import DTYPES, decoder_on_meta
from bitscale.data.corpus import load_corpus
from bitscale.errors import CheckpointError, DataError
from bitscale.model.bitlinear import bit_linears
from bitscale.model.norms import is_sub_norm
from bitscale.quant.kernels import get_kernels
from bitscale.quant.learned import initial_scale
from bitscale.quant.quantizer import Codes, dequantize
from bitscale.quant.reference import Ternary, finished_bias, ternarize
from bitscale.quant.schedule import TERNARY, Strength, quant_strength

Kind = Literal[
    "checkpoint",
    "packed",
    "compact",
    "gguf",
    "huggingface",
    "llama2c",
    "megatron",
    "deepspeed",
]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelSource:
    """What is known of a model, and its tensors when they are asked for."""

    path: Path
    kind: Kind
    form: str  # what its weights are, for people: latent, dequantized, packed 2-bit, ...
    model: ModelConfig  # vocab_size is set
    quant: QuantConfig
    dtype: Literal["bf16", "fp32"]  # in which the run computed: codes are made from it
    strength: Strength  # λ that was trained last; `TERNARY` for packed codes
    step: int  # optimizer steps done
    tokens: int  # target tokens consumed
    seq_len: int
    reset_attention: bool
    corpora: tuple[str, ...]
    config_hash: str
    tokenizer_sha256: str  # fingerprint: SHA-256 of the tokenizer's file
    tokenizer_file: Path | None  # None: not to be found any more
    eod_token: str | None  # name of the token between documents; None: as the file declares
    versions: Mapping[str, str]
    recipe: Mapping[str, Any]  # the sections of the configuration that made it; {} if unknown
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter
    ternary_names: frozenset[str]  # weights of quantized layers, whatever λ
    # [logical shape] of a parameter, in whatever floating-point dtype it is stored in.
    read: Callable[[str], Tensor]
    # Codes and scale of a quantized layer's weight, where they are stored; None: made of latents.
    read_codes: Callable[[str], Ternary] | None = None
    # Whether biases are stored with what the quantizer adds to them (quant.deadzone_bias).
    biases_finished: bool = False
    # λ at which the decoder is what a reader of this form computes; None: as trained.
    read_as: Strength | None = None
    scale_rounding: float = 2.0**-22  # largest relative error of a scale as it is stored
    post_training: bool = False  # quantized here, not in training: see `rounded_to_nearest`

    @property
    def spec(self) -> QuantSpec:
        return quant_spec(self.quant)

    @property
    def is_ternary(self) -> bool:
        """Whether codes are what the model computes with: λ = 1, and no residual."""
        return self.strength.weight == 1.0 and not self.strength.residual

    @property
    def computes(self) -> Strength:
        """λ at which the decoder is the function that a reader of this form computes."""
        return self.strength if self.read_as is None else self.read_as

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def has_latents(self) -> bool:
        return self.read_codes is None

    def latent(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """[logical shape]: the master weight, rounded to `dtype` if it is another than its own.

        Raises CheckpointError if only its codes exist, or it is not finite.
        """
        if self.read_codes is not None and name in self.ternary_names:
            raise CheckpointError(
                f"{self.path} holds the codes of {name}, not the 16-bit weights that they were "
                "made of; use the training checkpoint, or a format that holds codes"
            )
        value = self.read(name)
        if not torch.stack(value.aminmax()).isfinite().all():  # NaN is both
            raise CheckpointError(
                f"{self.path}: {name} holds NaN or infinity; use an earlier checkpoint, or a "
                "source that is whole"
            )
        # Without a copy if it can be: it may be gigabytes.
        return value if value.dtype == dtype else value.float().to(dtype)

    def weight(self, name: str) -> Tensor:
        """[logical shape] in the dtype that the run computed with."""
        return self.latent(name, DTYPES[self.dtype])

    def ternary(self, name: str) -> Ternary:
        """Codes int8 [F, D] of a quantized layer's weight, and its fp32 scale.

        Those of the last training step, to the bit; never re-quantized.
        """
        assert name in self.ternary_names, name
        if self.read_codes is not None:
            return self.read_codes(name)
        measure = kernel_measure(self.spec)
        if measure is not None:  # compiled, bit for bit the specification, 50 times as fast
            kernels = get_kernels("auto", "cpu")
            return kernels.ternarize(self.weight(name), measure, self.spec.weight.eps)
        return ternarize(self.weight(name), self.quant, alpha_F=self._alpha(name))

    def finished_bias(self, layer: str) -> Tensor | None:
        """[F] of the finished layer (a name without `.weight`), in the compute dtype, or None."""
        name = f"{layer}.bias"
        own = self.weight(name) if name in self.shapes else None
        if self.biases_finished or not self.spec.deadzone_bias:
            return own
        return finished_bias(self.weight(f"{layer}.weight"), own, self.quant)

    def rounded_to_nearest(self, quant: QuantConfig) -> "ModelSource":
        """The post-training baseline: the same weights, quantized by `quant` without training."""
        return replace(self, quant=quant, strength=TERNARY, post_training=True)

    def _alpha(self, name: str) -> Tensor | None:
        if not self.spec.learns_scale:
            return None
        alpha = f"{name.removesuffix('.weight')}.alpha"
        if alpha not in self.shapes:  # not trained: `rounded_to_nearest`
            return initial_scale(self.weight(name))
        return self.weight(alpha)


def dequantized(ternary: Ternary, dtype: torch.dtype = torch.float32) -> Tensor:
    """[F, D]: scale · codes, whatever the granularity, in fp32 and then rounded to `dtype`."""
    codes_FD, scale = ternary
    least, most = codes_FD.aminmax()
    # The scale may as well be rounded first where codes are -1, 0 and 1.
    arithmetic = dtype if least >= -1 and most <= 1 else torch.float32
    # `ModelSource.ternary` gives the factor of the codes, whatever form the quantizer's scale has.
    part = CodeSpec("absmean", scale_form="divide", arithmetic="native")
    return dequantize(Codes(codes_FD, scale.to(arithmetic)), part).to(dtype)


def refuse_unless_ternary(source: ModelSource) -> None:
    """Raise CheckpointError if codes would not be what the model computes with."""
    if source.strength.weight != 1.0:
        raise CheckpointError(
            f"{source.path} is at λ = {source.strength.weight:g}, not 1: its weights are not "
            "ternary; train past the end of the transition's ramp first"
        )
    if source.strength.residual:
        raise CheckpointError(
            f"{source.path} is at a residual of {source.strength.residual:g} x wᵀ, not 0: its "
            "outputs still contain 16-bit weights; train past the end of transition.residual first"
        )


def checkpoint_source(path: Path) -> ModelSource:
    """The model of a training checkpoint. CheckpointError for a damaged one."""
    reader = Reader(path)
    meta = reader.meta
    cfg = parse_config(meta.config, where=str(path))
    # The step that was trained last; ε follows from it, as λ does, which the checkpoint repeats.
    amendments = parse_amendments(meta.amendments, str(reader.path))
    residual = quant_strength(max(meta.step - 1, 0), cfg, amendments).residual
    model = _as_it_computes(cfg.model, meta.lambda_weight)
    shapes = {
        name: tuple(shape)
        for name, shape in meta.shapes.items()
        if model.sub_norm or not is_sub_norm(name)
    }
    tokenizer_file, eod_token = _tokenizer(cfg, path)
    return ModelSource(
        path=path,
        kind="checkpoint",
        form="fp32 masters",
        model=model,
        quant=cfg.quant,
        dtype=cfg.train.dtype,
        strength=Strength(meta.lambda_weight, meta.lambda_activation, residual),
        step=meta.step,
        tokens=meta.tokens,
        seq_len=cfg.data.seq_len,
        reset_attention=cfg.data.reset_attention,
        corpora=tuple(corpus.path for corpus in cfg.data.corpora),
        config_hash=meta.config_hash,
        tokenizer_sha256=meta.identity["tokenizer"].replace(ANY, ""),
        tokenizer_file=tokenizer_file,
        eod_token=eod_token,
        versions=meta.versions,
        recipe={key: value for key, value in meta.config.items() if key in _RECIPE},
        shapes=shapes,
        ternary_names=ternary_names(model, cfg.quant),
        read=partial(_read_master, reader, shapes),
    )


def _as_it_computes(m: ModelConfig, strength: float) -> ModelConfig:
    """A SubLN that comes in with λ is none before the transition, and an ordinary one after it."""
    if m.sub_norm != "transition" or 0.0 < strength < 1.0:
        return m
    return m.model_copy(update={"sub_norm": strength == 1.0})


# What decides the weights; the rest of a configuration says where and how fast.
_RECIPE = ("model", "data", "train", "optim", "transition", "quant")


def ternary_names(m: ModelConfig, quant: QuantConfig) -> frozenset[str]:
    """Names of the weights that the decoder quantizes."""
    layers = bit_linears(decoder_on_meta(m, quant))
    return frozenset(f"{name}.weight" for name, _ in layers)


def parameter_shapes(m: ModelConfig, quant: QuantConfig) -> dict[str, tuple[int, ...]]:
    """Logical shape of every parameter of the decoder; a tied head is not listed."""
    parameters = decoder_on_meta(m, quant).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in parameters}


def _read_master(reader: Reader, shapes: Mapping[str, tuple[int, ...]], name: str) -> Tensor:
    master: Tensor = reader.read(name, "master", 0, prod(shapes[name])).view(shapes[name])
    assert master.dtype == torch.float32
    return master


def _tokenizer(cfg: Config, checkpoint: Path) -> tuple[Path | None, str | None]:
    """File and end-of-document token: the corpus's, unless it has moved since the run; an
    imported checkpoint holds its own."""
    own = tokenizer_in(checkpoint)
    if own is not None:
        return own, None
    try:
        corpus = load_corpus(cfg.data.corpora[0].path)
    except DataError:
        return None, None
    return corpus.tokenizer_path, corpus.manifest.tokenizer.eod_token


def tokenizer_in(directory: Path) -> Path | None:
    """The tokenizer's file in a model's directory."""
    found = (directory / name for name in TOKENIZER_FILES)
    return next((file for file in found if file.is_file()), None)
