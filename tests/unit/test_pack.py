"""Two-bit packing in the layout of transformers' `bitnet` checkpoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitscale.quant.pack import pack_2bit, unpack_2bit

pytestmark = pytest.mark.unit


def random_codes(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(0, 17), st.integers(0, 1000))
def test_round_trip(quarter: int, columns: int, seed: int) -> None:
    codes_FD = random_codes(4 * quarter, columns, seed)
    packed = pack_2bit(codes_FD)
    assert (packed.dtype, packed.shape) == (torch.uint8, (quarter, columns))
    unpacked = unpack_2bit(packed)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes_FD)


def test_layout_of_every_bit() -> None:
    """Bits 2i, 2i+1 of packed[r, c] hold code[r + i R, c] + 1, low bits first."""
    codes_FD = random_codes(12, 5, seed=3)
    packed = pack_2bit(codes_FD)
    for r in range(3):
        for c in range(5):
            for i in range(4):
                assert (int(packed[r, c]) >> 2 * i) & 3 == int(codes_FD[r + 3 * i, c]) + 1


def test_golden_bytes() -> None:
    codes_FD = torch.tensor([[-1, 1], [0, 1], [1, 1], [1, -1]], dtype=torch.int8)
    assert pack_2bit(codes_FD).tolist() == [[0b10_10_01_00, 0b00_10_10_10]]


def test_every_byte_is_a_code_or_an_error() -> None:
    for byte in range(256):
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if any((byte >> shift) & 3 == 3 for shift in (0, 2, 4, 6)):
            with pytest.raises(ValueError, match="bit pattern 3: damaged, or not ternary"):
                unpack_2bit(packed)
        else:
            assert torch.equal(pack_2bit(unpack_2bit(packed)), packed)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_rows_must_be_a_multiple_of_4(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows are not a multiple of 4"):
        pack_2bit(torch.zeros(rows, 2, dtype=torch.int8))


@pytest.mark.parametrize("code", [-128, -2, 2, 3, 127])
def test_codes_must_be_ternary(code: int) -> None:
    codes_FD = torch.zeros(4, 2, dtype=torch.int8)
    codes_FD[2, 1] = code
    with pytest.raises(ValueError, match=r"codes outside \{-1, 0, 1\}"):
        pack_2bit(codes_FD)
