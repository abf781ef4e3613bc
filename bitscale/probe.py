"""How much loss quantization costs a trained 16-bit model, before a step is trained with it.

The weights stay as they are; λ moves. `loss_over_strength` moves all layers together,
`loss_by_layer` turns one group of layers ternary and leaves the others in 16 bit. Differences are
between the same windows of text, so that their errors are far smaller than those of the losses.
What follows for a ramp is in proposal.py. docs/probe.md defines every figure.
"""

# Shapes: B batch, S sequence, N windows of text.

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitscale.data.batches import IGNORE_ID, EvaluationBatch, evaluation_batches
from bitscale.data.corpus import PreparedCorpus
from bitscale.errors import CheckpointError, DataError
from bitscale.model.bitlinear import bit_linears, prepare_weights, set_strength
from bitscale.model.head import Head
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

Grouping = Literal["layer", "block", "kind"]
Part = Literal["both", "weights", "activations"]


class HeldOut(NamedTuple):
    """The text that every measurement reads."""

    batches: list[EvaluationBatch]
    num_targets_N: Tensor  # fp64; of each window that has any

    @property
    def num_tokens(self) -> int:
        return int(self.num_targets_N.sum())


class Rise(NamedTuple):
    """Loss above that of the same model in 16 bit, in nats per token, and its standard error."""

    rise: float
    error: float


class Curve(NamedTuple):
    part: Part
    strengths: tuple[float, ...]  # λ
    rises: tuple[Rise, ...]


class Damage(NamedTuple):
    """What a group of layers costs when it alone is ternary."""

    group: str
    rise: float
    error: float


def read_held_out(
    corpora: Sequence[PreparedCorpus],
    *,
    split: str,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None,
    reset_attention: bool,
) -> HeldOut:
    """At least `max_tokens` target tokens (None: all) from the beginnings of the corpora's `split`,
    from each in proportion to its size. Raises DataError if none has that split."""
    shards = [corpus.shard(split) for corpus in corpora if split in corpus.splits]
    if not shards:
        raise DataError(
            f"no corpus has a {split!r} split; prepare with a share for it (--split 0.98,0.01,0.01)"
        )
    total = sum(shard.num_tokens for shard in shards)
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / total)
    batches = [
        batch
        for shard in shards
        for batch in evaluation_batches(
            shard,
            seq_len=seq_len,
            batch_size=batch_size,
            dp_rank=0,
            dp_size=1,
            max_batches=math.ceil(share * shard.num_tokens / (seq_len * batch_size)),
            reset_attention=reset_attention,
        )
    ]
    counts = torch.cat([(batch.target_ids_BS != IGNORE_ID).sum(dim=1) for batch in batches])
    return HeldOut(batches, counts[counts > 0].double())


class Prober:
    """One model and one text; `measure` is the only thing that costs time."""

    def __init__(
        self, model: nn.Module, text: HeldOut, device: torch.device, on_batch: Callable[[], object]
    ) -> None:
        """`on_batch` is called after every forward pass (progress)."""
        self._model, self._text, self._device = model.to(device).eval(), text, device
        self._on_batch = on_batch
        self.sixteen_bit_N = self.measure(lambda: set_strength(model, SIXTEEN_BIT))

    @property
    def loss(self) -> float:
        """Of the model in 16 bit, nats per token."""
        return float(self.sixteen_bit_N.sum() / self._text.num_targets_N.sum())

    @torch.no_grad()
    def measure(self, set_model: Callable[[], None]) -> Tensor:
        """fp64 [N]: nats of each window, after `set_model` has set every layer's λ."""
        set_model()
        prepare_weights(self._model)
        parts = []
        for batch in self._text.batches:
            inputs = (batch.input_ids_BS, batch.target_ids_BS, batch.document_ids_BS)
            on_device = (t if t is None else t.to(self._device) for t in inputs)
            losses_BS: Tensor = self._model(*on_device, reduction="none")
            has_targets_B = (batch.target_ids_BS != IGNORE_ID).any(dim=1)
            parts.append(losses_BS.double().sum(dim=1).cpu()[has_targets_B])
            self._on_batch()
        return torch.cat(parts)

    def rise(self, set_model: Callable[[], None]) -> Rise:
        """Against 16 bit. Raises CheckpointError if the loss is not finite."""
        difference_N = self.measure(set_model) - self.sixteen_bit_N
        num_tokens = float(self._text.num_targets_N.sum())
        rise = float(difference_N.sum()) / num_tokens
        if not math.isfinite(rise):
            raise CheckpointError(
                "the held-out loss is not finite; the checkpoint's weights are damaged or have "
                "diverged: probe an earlier checkpoint"
            )
        count = len(difference_N)
        spread = float(difference_N.std()) if count > 1 else math.inf
        return Rise(rise, spread * math.sqrt(count) / num_tokens)


def loss_over_strength(
    prober: Prober, model: nn.Module, part: Part, strengths: Sequence[float]
) -> Curve:
    """The loss at each λ of `strengths`, of all layers' weights, activations, or both."""

    def at(value: float) -> Callable[[], None]:
        weight = 0.0 if part == "activations" else value
        activation = 0.0 if part == "weights" else value
        return lambda: set_strength(model, Strength(weight, activation))

    return Curve(part, tuple(strengths), tuple(prober.rise(at(value)) for value in strengths))


def layer_groups(model: nn.Module, by: Grouping) -> dict[str, list[str]]:
    """Names of the quantized layers by group: each alone, those of a block, or of a kind, such as
    `attn.q`.

    An 8-bit head is a group of its own.
    """
    groups: dict[str, list[str]] = {}
    for name, _ in bit_linears(model):
        block, _, kind = name.partition(".attn.")
        separator = ".attn." if kind else ".mlp."
        block, _, kind = name.partition(separator)
        key = {"layer": name, "block": block, "kind": f"{separator.strip('.')}.{kind}"}[by]
        groups.setdefault(key, []).append(name)
    for name, module in model.named_modules():
        if isinstance(module, Head) and module.bits == 8:
            groups[name] = [name]
    return groups


def loss_by_layer(prober: Prober, model: nn.Module, groups: dict[str, list[str]]) -> list[Damage]:
    """Each group ternary by itself, the largest rise of the loss first."""
    modules = dict(model.named_modules())

    def alone(names: Iterable[str]) -> Callable[[], None]:
        def set_model() -> None:
            set_strength(model, SIXTEEN_BIT)
            for name in names:
                set_strength(modules[name], TERNARY)

        return set_model

    found = [Damage(group, *prober.rise(alone(names))) for group, names in groups.items()]
    return sorted(found, key=lambda damage: -damage.rise)


def num_measurements(num_strengths: int, num_parts: int, num_groups: int) -> int:
    """Passes over the text, that in 16 bit included."""
    return 1 + num_strengths * num_parts + num_groups
