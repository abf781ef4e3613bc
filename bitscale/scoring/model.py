"""A model for scoring: at the precision that it was trained last, on one rank or shared by several.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bitscale.config.checks import check_tensor_parallel
from bitscale.convert import LoadedModel, ModelSource, load_model, open_source
from bitscale.convert.loaded import DTYPES
from bitscale.data.batches import EvaluationBatch
from bitscale.data.tokenizer import Tokenizer, load_tokenizer
from bitscale.errors import CheckpointError, ConfigError, DataError
from bitscale.mesh import Mesh, init_mesh, share_model, single_process_mesh, under_launcher
from bitscale.model.bitlinear import PackedBitLinear, prepare_weights, set_strength
from bitscale.model.collectives import shard_of
from bitscale.model.decoder import Decoder
from bitscale.model.layers import ranks_of

T = TypeVar("T")


class Continuation(NamedTuple):
    """Tokens whose probability is asked for, after others."""

    context_ids: list[int]  # at least one
    target_ids: list[int]


class LogLikelihood(NamedTuple):
    nats: float  # log p(targets | context), at most 0
    is_greedy: bool  # whether each target is the likeliest token


@dataclass(frozen=True)
class ScoredModel:
    """A decoder ready for forward passes on this rank's device."""

    path: Path
    model: Decoder
    source: ModelSource  # what is known of it
    mesh: Mesh
    seq_len: int  # tokens that it reads at most

    @torch.no_grad()
    def token_losses(self, batch: EvaluationBatch) -> Tensor:
        """Nats [B, S] of a held-out batch, 0 at padding (a collective of the model's ranks)."""
        device, documents = self.mesh.device, batch.document_ids_BS
        losses: Tensor = self.model(
            batch.input_ids_BS.to(device),
            batch.target_ids_BS.to(device),
            None if documents is None else documents.to(device),
            reduction="none",
        )
        return losses

    def log_likelihoods(
        self,
        wanted: Sequence[Continuation],
        *,
        batch_size: int,
        on_batch: Callable[[int], object] = lambda num_rows: None,
    ) -> list[LogLikelihood]:
        """Of each of `wanted`, on every rank (a collective of all ranks, which share the work).

        A context that does not fit into the model's sequence loses its beginning. Continuations
        that differ in their last token only share a forward pass. `on_batch` is called with the
        number of `wanted` that each pass of this rank has finished.
        """
        rows = [self._row(each) for each in wanted]
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            by_input.setdefault(tuple(row[:-1]), []).append(index)
        # Long ones first: what does not fit into memory fails at once, and the ETA is an upper one.
        inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
        own: dict[int, LogLikelihood] = {}
        for batch in self._own_batches(inputs, batch_size):
            logits_BSV = self._logits(batch)
            done = 0
            for logits_SV, ids in zip(logits_BSV, batch, strict=True):
                for index in by_input[ids]:
                    targets = wanted[index].target_ids
                    own[index] = _score(logits_SV[: len(ids)], targets)
                    done += 1
            on_batch(done)
        found = {i: s for part in self.mesh.gather_objects(own) for i, s in part.items()}
        return [found[index] for index in range(len(wanted))]

    def _own_batches(self, items: Sequence[T], size: int) -> list[Sequence[T]]:
        """This rank's share of `items`, in batches; ranks that share the model have the same."""
        starts = range(0, len(items), size)[self.mesh.dp_rank :: self.mesh.dp_size]
        return [items[start : start + size] for start in starts]

    def _row(self, wanted: Continuation) -> list[int]:
        """Context and targets, of which the model reads all but the last token."""
        if len(wanted.target_ids) > self.seq_len:
            raise DataError(
                f"a continuation of {len(wanted.target_ids)} tokens does not fit into sequences of "
                f"{self.seq_len} tokens; let {self.path} read longer ones (--seq-len; it was "
                f"trained on {self.source.seq_len}), or leave the task out"
            )
        return (wanted.context_ids + wanted.target_ids)[-(self.seq_len + 1) :]

    @torch.no_grad()
    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """fp32 [B, S, V] of rows of different lengths, padded behind their ends."""
        longest = max(map(len, rows))
        # What follows a token cannot change it: attention is causal, and quantizers are per token.
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        return self.model.logits(torch.tensor(padded, device=self.mesh.device))

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        is_finished: Callable[[list[int]], bool],
        batch_size: int,
    ) -> list[list[int]]:
        """The likeliest token, again and again, after each of `prompts`: the new tokens (a
        collective of all ranks, which share the work).

        A row ends when `is_finished(new tokens)`, or after `max_new_tokens`, or when the model's
        sequence is full; a long prompt loses its beginning. Without a cache of keys and values:
        the cost grows with the square of the length.
        """
        room = max(1, self.seq_len - max_new_tokens)
        own: dict[int, list[int]] = {}
        for batch in self._own_batches(range(len(prompts)), batch_size):
            rows = {index: prompts[index][-room:] for index in batch}
            own |= {index: [] for index in batch}
            while rows:
                logits_BSV = self._logits(list(rows.values()))
                for logits_SV, (index, ids) in zip(logits_BSV, list(rows.items()), strict=True):
                    token = int(logits_SV[len(ids) - 1].argmax())
                    own[index].append(token)
                    rows[index] = [*ids, token]
                    full = len(own[index]) == max_new_tokens or len(ids) == self.seq_len
                    if full or is_finished(own[index]):
                        del rows[index]
        found = {i: ids for part in self.mesh.gather_objects(own) for i, ids in part.items()}
        return [found[index] for index in range(len(prompts))]


def _score(logits_SV: Tensor, target_ids: list[int]) -> LogLikelihood:
    """Of the last positions' predictions."""
    if not target_ids:
        return LogLikelihood(0.0, True)
    logits_TV = logits_SV[-len(target_ids) :]
    targets_T = torch.tensor(target_ids, device=logits_TV.device)
    nats = F.cross_entropy(logits_TV, targets_T, reduction="none").double().sum()
    return LogLikelihood(-float(nats), bool((logits_TV.argmax(dim=-1) == targets_T).all()))


def open_ranks(device: str, tp: int) -> Mesh:
    """The ranks of this launch (one without a launcher); they share models by `tp`.

    Raises ConfigError if there are not as many, or not a multiple.
    """
    mesh = init_mesh(device) if under_launcher() else single_process_mesh(device)
    if tp < 1 or mesh.world_size % tp:
        raise ConfigError(
            f"--tp {tp} needs a multiple of {max(tp, 1)} ranks, and this launch has "
            f"{mesh.world_size}; start it with torchrun --nproc-per-node {max(tp, 1)}, or leave "
            "--tp out"
        )
    return mesh


def open_model(path: Path, mesh: Mesh, tp: int = 1, seq_len: int | None = None) -> ScoredModel:
    """The model of `path` as it computed in its last step, on this rank or shared by `tp` of them.

    `seq_len`: tokens that it reads at most; None: as in training.

    Raises CheckpointError if there is none, or if it is packed and `tp` > 1; ConfigError if its
    shape does not divide.
    """
    source = open_source(path)
    loaded = load_model(path)
    model = loaded.model
    if tp > 1:
        model, mesh = _shared(path, loaded, source, mesh, tp)
    model = model.to(mesh.device).eval()
    prepare_weights(model)
    return ScoredModel(path, model, source, mesh, seq_len or source.seq_len)


def _shared(
    path: Path, loaded: LoadedModel, source: ModelSource, mesh: Mesh, tp: int
) -> tuple[Decoder, Mesh]:
    """This rank's part of the decoder, and the mesh with the groups that share it."""
    m = source.model
    check_tensor_parallel(m, tp)
    if any(isinstance(layer, PackedBitLinear) for layer in loaded.model.modules()):
        raise CheckpointError(
            f"{path} holds packed codes, which ranks do not share; use its training checkpoint, "
            "which computes the same, or leave --tp out"
        )
    if loaded.strength.residual:
        raise CheckpointError(
            f"{path} is at a residual of {loaded.strength.residual:g} x wᵀ, which ranks do not "
            "share; leave --tp out"
        )
    mesh = share_model(mesh, tp, m.num_kv_heads or m.num_heads)
    model = Decoder(m, source.quant, ranks=ranks_of(mesh, sequence_parallel=False))
    model = model.to(DTYPES[source.dtype])
    whole = loaded.model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            parameter.copy_(whole[name] if shard is None else shard.of(whole[name]))
    set_strength(model, loaded.strength)
    return model, mesh


def open_tokenizer(source: ModelSource, given: Path | None = None) -> Tokenizer:
    """The tokenizer that the model was trained with; `given` if it has moved since.

    Raises DataError if it is not to be found, or is another one.
    """
    file = given or source.tokenizer_file
    if file is None:
        raise DataError(
            f"{source.path}: the tokenizer is not where it was in training; name it with "
            "--tokenizer PATH"
        )
    tokenizer = load_tokenizer(file, source.eod_token)
    if source.tokenizer_sha256 and tokenizer.fingerprint != source.tokenizer_sha256:
        raise DataError(
            f"{tokenizer.path} is not the tokenizer that {source.path} was trained with (its "
            "SHA-256 differs); name that one with --tokenizer PATH"
        )
    return tokenizer
