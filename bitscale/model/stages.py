"""The decoder in pipeline stages: a stage is a run of its blocks, with the decoder's own names.

The first stage has the embedding as well, the last one the final norm and the head. A rank holds
one stage (1F1B), or the i-th from the front and the i-th from the back (DualPipeV). Parameters are
called what `Decoder` calls them and start from the same numbers, so checkpoints, optimizer and
telemetry need not know about stages.

Shapes: B batch, S sequence, D model width, V vocabulary.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from bitscale.config import Config, num_pipeline_stages
from bitscale.mesh import Mesh
from bitscale.model.compiled import compile_blocks
from bitscale.model.cost import blocks_per_stage
from bitscale.model.decoder import (
    Block,
    Decoder,
    draw_weights,
    run_blocks,
    same_document_mask,
    whole_shape,
)
from bitscale.model.head import Head, Reduction
from bitscale.model.layers import Ranks, Rotary, ranks_of
from bitscale.model.norms import make_norm
from bitscale.model.vocabulary import VocabParallelEmbedding


class DecoderStage(nn.Module):
    """The stages `indices` of `num_stages`, in phases, of which each has token ids or hidden states
    in, hidden states or a loss out."""

    def __init__(
        self, cfg: Config, indices: tuple[int, ...], num_stages: int, *, ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        m, quant, ranks = cfg.model, cfg.quant, ranks or Ranks()
        assert m.vocab_size is not None, "the vocabulary size is resolved before the model is built"
        self.tp = ranks.tp
        self.activation_checkpointing = cfg.train.activation_checkpointing
        self.is_first, self.is_last = 0 in indices, num_stages - 1 in indices
        counts = blocks_per_stage(m, cfg.data.seq_len, num_stages)
        # Of each phase, the numbers of its blocks in the whole decoder.
        self.blocks = [range(sum(counts[:i]), sum(counts[: i + 1])) for i in indices]
        self._is_tied = m.tie_embeddings
        ties = self.is_last and m.tie_embeddings
        self.embed = (
            None
            if not (self.is_first or ties)
            else nn.Embedding(m.vocab_size, m.d_model)
            if self.tp.size == 1
            else VocabParallelEmbedding(m.vocab_size, m.d_model, self.tp)
        )
        self.rotary = Rotary(m.d_model // m.num_heads, m.rope_theta, m.rope_scaling)
        self.layers = nn.ModuleDict(
            {str(i): Block(m, quant, ranks) for i in itertools.chain(*self.blocks)}
        )
        self.norm = make_norm(m, self.tp) if self.is_last else None
        self.head = (
            Head(m.d_model, m.vocab_size, quant, bits=m.head_bits, tp=self.tp)
            if self.is_last
            else None
        )
        if ties:
            assert self.head is not None and self.embed is not None
            self.head.weight = cast(nn.Parameter, self.embed.weight)
        # Target ids [B, S] of the batches to come, for the last stage. They do not come with the
        # inputs, and not by way of DeepSpeed's loss function: that is called outside the module,
        # where the hooks that collect bf16 gradients do not expect the head's.
        self.targets: deque[Tensor] = deque()
        draw_weights(self, m, cfg.train.seed, self._decoder_shapes(cfg))

    def _decoder_shapes(self, cfg: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the whole decoder's blocks and tables, in its order: its blocks are
        all alike, and vectors are not drawn."""
        m = cfg.model
        assert m.vocab_size is not None
        block = next(iter(self.layers.values()))
        yield "embed.weight", (m.vocab_size, m.d_model)
        for index in range(m.num_layers):
            for name, parameter in block.named_parameters():
                yield f"layers.{index}.{name}", whole_shape(parameter)
        if not m.tie_embeddings:
            yield "head.weight", (m.vocab_size, m.d_model)

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This end's copy of the matrix that the embedding and the head share, if they do.

        The first stage's is the weight; the last stage's follows it and has no optimizer.
        """
        if self.embed is None or (self.is_first and self.is_last):
            return None
        return cast(nn.Parameter, self.embed.weight) if self._is_tied else None

    def forward(
        self, inputs: Tensor | tuple[Tensor, Tensor], phase: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What DeepSpeed hands from stage to stage: ids int64 [B, S] or hidden states [B, S, D],
        with document ids int64 [B, S] beside them if attention stays within documents.

        Hidden states have [S / tp, B, D] with sequence parallelism. Returns the same, the last
        stage what `Decoder.forward` does, for the next of `targets`: the mean loss or, in
        evaluation, the losses of the tokens.
        """
        x, document_ids_BS = inputs if isinstance(inputs, tuple) else (inputs, None)
        if self.is_first and phase == 0:
            assert self.embed is not None
            x = self.embed(x)
        seq_len = x.shape[0] * self.tp.size if self.tp.sequence_parallel else x.shape[1]
        cos_SE, sin_SE = self.rotary(seq_len, x.device)
        mask_B1SS = None if document_ids_BS is None else same_document_mask(document_ids_BS)
        checkpointing = self.activation_checkpointing if self.training else "none"
        blocks = [self.layers[str(i)] for i in self.blocks[phase]]
        x = run_blocks(blocks, x, cos_SE, sin_SE, mask_B1SS, checkpointing)
        if self.head is not None and self.norm is not None and phase == len(self.blocks) - 1:
            reduction: Reduction = "mean" if self.training else "none"
            return cast(
                Tensor, self.head(self.norm(x), self.targets.popleft(), reduction=reduction)
            )
        return x if document_ids_BS is None else (x, document_ids_BS)


def make_model(cfg: Config, mesh: Mesh) -> Decoder | DecoderStage:
    """What this rank holds of the model of `cfg`.

    Raises:
        KernelUnavailable: its blocks cannot be compiled here.
    """
    model = _own_part(cfg, mesh)
    if cfg.train.compile:
        compile_blocks(model, mesh.device.type)
    return model


def _own_part(cfg: Config, mesh: Mesh) -> Decoder | DecoderStage:
    ranks = ranks_of(mesh, sequence_parallel=cfg.parallel.sequence_parallel)
    if mesh.pp_size > 1:
        num_stages = num_pipeline_stages(cfg)
        indices = (mesh.pp_rank, num_stages - 1 - mesh.pp_rank)[: num_stages // mesh.pp_size]
        return DecoderStage(cfg, indices, num_stages, ranks=ranks)
    return Decoder(
        cfg.model,
        cfg.quant,
        seed=cfg.train.seed,
        activation_checkpointing=cfg.train.activation_checkpointing,
        ranks=ranks,
    )
