"""The Llama-family decoder.

Shapes: B batch, S sequence, D model width, V vocabulary.
Only the linear layers inside the decoder blocks are BitLinear; embeddings, norms and the head
stay in 16 bit (the head optionally in 8).
"""

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitscale.config import Checkpointing, ModelConfig, QuantConfig
from bitscale.model.bitlinear import BitLinear, bit_linears, shared_input
from bitscale.model.collectives import shard_of
from bitscale.model.head import Head, Reduction
from bitscale.model.layers import MLP, Attention, Ranks, Rotary
from bitscale.model.norms import make_norm
from bitscale.model.vocabulary import VocabParallelEmbedding, gather_vocabulary


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); post-norm: x + norm(attention(x)), ..."""

    def __init__(self, m: ModelConfig, quant: QuantConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        ranks = ranks or Ranks()
        self.attn_norm = make_norm(m, ranks.tp)
        self.attn = Attention(m, quant, ranks)
        self.mlp_norm = make_norm(m, ranks.tp)
        self.mlp = MLP(m, quant, ranks.tp)
        self.post_norm = m.post_norm
        self.compiled: Callable[..., Tensor] | None = None  # `compute`, by compile_blocks

    def forward(
        self,
        x_BSD: Tensor,
        cos_SE: Tensor,
        sin_SE: Tensor,
        mask_B1SS: Tensor | None,
        *,
        recomputes: bool = False,
    ) -> Tensor:
        """`recomputes`: selective activation checkpointing."""
        compute: Callable[..., Tensor] = self.compute
        if self.compiled is not None and cast(BitLinear, self.attn.q).strength.is_constant:
            compute = self.compiled
        return compute(x_BSD, cos_SE, sin_SE, mask_B1SS, recomputes)

    def compute(
        self,
        x_BSD: Tensor,
        cos_SE: Tensor,
        sin_SE: Tensor,
        mask_B1SS: Tensor | None,
        recomputes: bool,
    ) -> Tensor:
        readers = self.attn.readers()
        if self.post_norm:
            h = shared_input(x_BSD, None, *readers)
            y_BSD = self.attn(h, cos_SE, sin_SE, mask_B1SS, recomputes=recomputes)
            x_BSD = x_BSD + cast(Tensor, self.attn_norm(y_BSD))
            h = shared_input(x_BSD, None, *self.mlp.readers())
            return x_BSD + cast(Tensor, self.mlp_norm(self.mlp(h, recomputes=recomputes)))
        h = shared_input(x_BSD, self.attn_norm, *readers, recomputes=recomputes)
        x_BSD = x_BSD + self.attn(h, cos_SE, sin_SE, mask_B1SS, recomputes=recomputes)
        readers = self.mlp.readers()
        h = shared_input(x_BSD, self.mlp_norm, *readers, recomputes=recomputes)
        return x_BSD + cast(Tensor, self.mlp(h, recomputes=recomputes))


def run_blocks(
    blocks: Iterable[nn.Module],
    x_BSD: Tensor,
    cos_SE: Tensor,
    sin_SE: Tensor,
    mask_B1SS: Tensor | None,
    checkpointing: Checkpointing,
) -> Tensor:
    """One block after the other. λ and prepared weights are those of the step, so a forward pass
    that is computed twice gives the same bits."""
    for block in blocks:
        if checkpointing == "full":
            recomputed = checkpoint(block, x_BSD, cos_SE, sin_SE, mask_B1SS, use_reentrant=False)
            x_BSD = cast(Tensor, recomputed)
        else:
            selective = checkpointing == "selective"
            x_BSD = block(x_BSD, cos_SE, sin_SE, mask_B1SS, recomputes=selective)
    return x_BSD


class Decoder(nn.Module):
    """Token ids in, mean next-token loss (or per-token losses, or logits) out."""

    def __init__(
        self,
        m: ModelConfig,
        quant: QuantConfig,
        *,
        seed: int = 0,
        activation_checkpointing: Checkpointing = "none",
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        assert m.vocab_size is not None, "the vocabulary size is resolved before the model is built"
        ranks = ranks or Ranks()
        self.tp, self.vocab_size = ranks.tp, m.vocab_size
        self.activation_checkpointing = activation_checkpointing
        self.embed = (
            nn.Embedding(m.vocab_size, m.d_model)
            if self.tp.size == 1
            else VocabParallelEmbedding(m.vocab_size, m.d_model, self.tp)
        )
        self.rotary = Rotary(m.d_model // m.num_heads, m.rope_theta, m.rope_scaling)
        self.layers = nn.ModuleList(Block(m, quant, ranks) for _ in range(m.num_layers))
        self.norm = make_norm(m, self.tp)
        self.head = Head(m.d_model, m.vocab_size, quant, bits=m.head_bits, tp=self.tp)
        if m.tie_embeddings:
            self.head.weight = self.embed.weight
        draw_weights(self, m, seed, ((n, whole_shape(p)) for n, p in self.named_parameters()))

    def forward(
        self,
        input_ids_BS: Tensor,
        target_ids_BS: Tensor,
        document_ids_BS: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Next-token cross entropy in nats, fp32.

        `reduction` "mean" gives a scalar over the targets that are not IGNORED_TARGET; "none"
        gives [B, S] with 0 at ignored targets.
        """
        x = self._hidden(input_ids_BS, document_ids_BS)
        return cast(Tensor, self.head(x, target_ids_BS, reduction=reduction))

    def logits(self, input_ids_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
        """fp32 logits [B, S, V]; without gradient if the vocabulary is shared."""
        logits = cast(Tensor, self.head(self._hidden(input_ids_BS, document_ids_BS)))
        if self.tp.size == 1:
            return logits
        logits = gather_vocabulary(logits, self.vocab_size, self.tp)
        return logits.transpose(0, 1) if self.tp.sequence_parallel else logits

    def _hidden(self, input_ids_BS: Tensor, document_ids_BS: Tensor | None) -> Tensor:
        """What the head reads."""
        x_BSD = self.embed(input_ids_BS)
        cos_SE, sin_SE = self.rotary(input_ids_BS.shape[1], input_ids_BS.device)
        mask_B1SS = None if document_ids_BS is None else same_document_mask(document_ids_BS)
        checkpointing = self.activation_checkpointing if self.training else "none"
        x_BSD = run_blocks(self.layers, x_BSD, cos_SE, sin_SE, mask_B1SS, checkpointing)
        return cast(Tensor, self.norm(x_BSD))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the logical parameter, whatever part of it the ranks hold."""
    shard = shard_of(parameter)
    return tuple(parameter.shape) if shard is None else shard.whole


def draw_weights(
    model: nn.Module, m: ModelConfig, seed: int, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> None:
    """N(0, init_std²); projections back into the residual stream / sqrt(2 · layers) (GPT-2).

    One seeded CPU generator draws every matrix of the whole decoder, whose parameters `shapes`
    names in order; `model` may hold some of them, or parts: the same weights at every layout.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = m.init_std / math.sqrt(2 * m.num_layers)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, shape in shapes:
            parameter = own.get(name)
            if name.endswith(".bias"):
                if parameter is not None:
                    parameter.zero_()
            elif len(shape) == 2:
                back = name.endswith(("attn.o.weight", "mlp.down.weight"))
                std = residual_std if back else m.init_std
                if parameter is not None and shard_of(parameter) is None:
                    parameter.normal_(0.0, std, generator=generator)
                    continue
                whole = torch.empty(shape).normal_(0.0, std, generator=generator)
                if parameter is not None:
                    shard = shard_of(parameter)
                    assert shard is not None
                    parameter.copy_(shard.of(whole))
    for _, layer in bit_linears(model):
        layer.start_scale()


def same_document_mask(document_ids_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S]: query s sees key t if t <= s and both belong to the same document.

    Rotary positions are relative, so masking alone equals starting each document at position 0.
    """
    same_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    return same_BSS.tril()[:, None]
