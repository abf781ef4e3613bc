"""TQ1_0, TQ2_0 and I2_S: gguf-py's bytes, the layouts code by code, and damage."""

import gguf
import numpy as np
import pytest
import torch
from kernel_cases import why_no_cpu_kernels
from torch import Tensor

from bitscale.quant.gguf_blocks import (
    BLOCK_BYTES,
    BlockType,
    pack_blocks,
    pack_i2_s,
    unpack_blocks,
    unpack_i2_s,
)

pytestmark = pytest.mark.unit
KERNELS = ["reference"] + ([] if why_no_cpu_kernels() else ["cpu"])
KINDS: list[BlockType] = ["tq1_0", "tq2_0"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_kind = pytest.mark.parametrize("kind", KINDS)
SCALE = torch.tensor(0.0173)


def random_codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)


@each_kernel
@each_kind
def test_bytes_are_those_of_gguf_py(kind: BlockType, kernel: str) -> None:
    """Its quantizers, on weights that are ternary already; one block is all 0."""
    codes_FD = random_codes(70, 768)
    codes_FD[3, 256:512] = 0
    weights_FD = codes_FD.float() * SCALE.half().float()
    theirs = gguf.quants.quantize(weights_FD.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    ours = pack_blocks(codes_FD, SCALE, kind, kernel=kernel)
    assert np.array_equal(ours.numpy(), theirs)
    codes, d_FB = unpack_blocks(ours, kind, kernel=kernel)
    assert torch.equal(codes, codes_FD)
    assert d_FB[3].tolist() == [float(SCALE.half()), 0.0, float(SCALE.half())]
    dequantized = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(dequantized, weights_FD.numpy())


@each_kernel
def test_layout_of_tq2_0(kernel: str) -> None:
    codes = random_codes(1, 256, seed=1)
    block = pack_blocks(codes, SCALE, "tq2_0", kernel=kernel)[0].tolist()
    for element in range(256):
        j, rest = divmod(element, 128)
        field, m = divmod(rest, 32)
        assert block[32 * j + m] >> 2 * field & 3 == int(codes[0, element]) + 1
    assert block[64:] == SCALE.half().view(1).view(torch.uint8).tolist()


@each_kernel
def test_layout_of_tq1_0(kernel: str) -> None:
    codes = random_codes(1, 256, seed=2)
    block = pack_blocks(codes, SCALE, "tq1_0", kernel=kernel)[0].tolist()
    places = [[m + 32 * n for n in range(5)] for m in range(32)]
    places += [[160 + m + 16 * n for n in range(5)] for m in range(16)]
    places += [[240 + j + 4 * n for n in range(4)] for j in range(4)]
    for byte, elements in zip(block, places, strict=False):
        trits = [int(codes[0, element]) + 1 for element in elements] + [0] * (5 - len(elements))
        value = sum(3 ** (4 - i) * trit for i, trit in enumerate(trits))
        assert byte == -(-256 * value // 243)


@each_kernel
def test_layout_of_i2_s(kernel: str) -> None:
    """x86: byte 32 k + p of line k holds code 32 g + p in its bits 6 - 2 g."""
    codes_FD = random_codes(3, 256, seed=3)
    packed = pack_i2_s(codes_FD, kernel=kernel)
    flat = codes_FD.flatten()
    for element in range(flat.numel()):
        line, rest = divmod(element, 128)
        group, p = divmod(rest, 32)
        field = int(packed[32 * line + p]) >> (6 - 2 * group) & 3
        assert field == int(flat[element]) + 1
    assert torch.equal(unpack_i2_s(packed, (3, 256), kernel=kernel), codes_FD)


@each_kernel
@each_kind
def test_damaged_blocks(kind: BlockType, kernel: str) -> None:
    packed = pack_blocks(random_codes(2, 512), SCALE, kind, kernel=kernel)
    bad_byte = {"tq1_0": 1, "tq2_0": 0b1100}[kind]  # ceil(256/243 v) is 0, 2, 3, ...
    for place in (0, 40, BLOCK_BYTES[kind] - 3, BLOCK_BYTES[kind] + 5):
        damaged = packed.clone()
        damaged[1, place] = bad_byte
        with pytest.raises(ValueError, match=f"a {kind.upper()} block holds a byte that is not"):
            unpack_blocks(damaged, kind, kernel=kernel)


@each_kernel
def test_damaged_i2_s(kernel: str) -> None:
    packed = pack_i2_s(random_codes(1, 128), kernel=kernel)
    packed[31] |= 3
    with pytest.raises(ValueError, match="I2_S tensor holds the unused bit pattern 3"):
        unpack_i2_s(packed, (1, 128), kernel=kernel)


@each_kernel
@pytest.mark.parametrize("code", [-128, -2, 2, 127])
def test_codes_must_be_ternary(code: int, kernel: str) -> None:
    for place in (0, 245, 255):
        codes = torch.zeros(1, 256, dtype=torch.int8)
        codes[0, place] = code
        for kind in KINDS:
            with pytest.raises(ValueError, match=r"codes outside \{-1, 0, 1\}"):
                pack_blocks(codes, SCALE, kind, kernel=kernel)
        with pytest.raises(ValueError, match=r"codes outside \{-1, 0, 1\}"):
            pack_i2_s(codes, kernel=kernel)


def test_columns_must_divide() -> None:
    with pytest.raises(ValueError, match="255 columns are not a multiple of 256"):
        pack_blocks(random_codes(2, 255), SCALE, "tq2_0")
    with pytest.raises(ValueError, match="64 columns are not a multiple of 128"):
        pack_i2_s(random_codes(2, 64))
