"""Codes that layers keep packed, as ranks have exchanged them."""

from typing import get_args

import pytest
import torch
from test_prepared_layers import decoder, loss_and_gradients, tokens
from torch import Tensor

from bitscale.config import Checkpointing, Packing
from bitscale.model.bitlinear import bit_linears, prepare_weights, set_strength
from bitscale.quant.packed_matrix import PackedTernary, pack_piece, packed_bytes
from bitscale.quant.schedule import TERNARY

pytestmark = pytest.mark.unit


def packed(codes_FD: Tensor, scale: Tensor, cut: int, packing: Packing) -> PackedTernary:
    """In two pieces, as of two ranks."""
    flat = codes_FD.flatten()
    parts = [flat[:cut], flat[cut:]]
    pieces = tuple(
        torch.empty(1, packed_bytes(part.numel(), packing), dtype=torch.uint8) for part in parts
    )
    for part, piece in zip(parts, pieces, strict=True):
        pack_piece(part, packing, piece[0])
    sizes = tuple(part.numel() for part in parts)
    return PackedTernary(pieces, sizes, codes_FD.shape, scale, packing)


@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
def test_packed_codes_are_the_same_pass_and_are_kept_packed(checkpointing: Checkpointing) -> None:
    """Not even the weights are read; for the backward pass nothing of a weight's size is saved."""
    model = decoder()
    model.activation_checkpointing = checkpointing
    set_strength(model, TERNARY)
    prepare_weights(model)
    wanted = loss_and_gradients(model)
    for index, (_, layer) in enumerate(bit_linears(model)):
        codes = layer.prepared.codes
        layer.weight.data = torch.full((), torch.nan).expand(layer.weight.shape)
        packing = get_args(Packing)[index % 2]
        layer.use_codes(packed(*codes, cut=index + 1, packing=packing))
        assert layer.is_prepared()
    shapes = {tuple(layer.weight.shape) for _, layer in bit_linears(model)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(*tokens())
    assert not [t for t in saved if t.dtype == torch.int8 and tuple(t.shape) in shapes]
    got = loss_and_gradients(model)
    assert all(map(torch.equal, got, wanted))
