"""Ternary codes as bytes: two bits each (the layout of transformers' `bitnet`), and base 3."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import why_no_cpu_kernels
from torch import Tensor

from bitscale.errors import KernelUnavailable
from bitscale.quant.pack import pack_2bit, pack_base3, unpack_2bit, unpack_base3

pytestmark = pytest.mark.unit

# "reference" is the specification; "cpu" is compiled C, which must give its bytes.
KERNELS = ["reference"] + ([] if why_no_cpu_kernels() else ["cpu"])
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def random_codes(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(0, 300), st.integers(0, 1000))
def test_round_trip(quarter: int, columns: int, seed: int) -> None:
    codes_FD = random_codes(4 * quarter, columns, seed)
    for kernel in KERNELS:
        packed = pack_2bit(codes_FD, kernel=kernel)
        assert (packed.dtype, packed.shape) == (torch.uint8, (quarter, columns))
        assert torch.equal(packed, pack_2bit(codes_FD, kernel="reference"))
        unpacked = unpack_2bit(packed, kernel=kernel)
        assert unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes_FD)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(1, 700), st.integers(0, 1000))
def test_base3_round_trip(rows: int, columns: int, seed: int) -> None:
    codes_FD = random_codes(rows, columns, seed)
    for kernel in KERNELS:
        packed = pack_base3(codes_FD, kernel=kernel)
        assert (packed.dtype, packed.shape) == (torch.uint8, (rows, -(-columns // 5)))
        assert torch.equal(packed, pack_base3(codes_FD, kernel="reference"))
        unpacked = unpack_base3(packed, columns, kernel=kernel)
        assert unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes_FD)


@each_kernel
def test_layout_of_every_bit(kernel: str) -> None:
    """Bits 2i, 2i+1 of packed[r, c] hold code[r + i R, c] + 1, low bits first."""
    codes_FD = random_codes(12, 5, seed=3)
    packed = pack_2bit(codes_FD, kernel=kernel)
    for r in range(3):
        for c in range(5):
            for i in range(4):
                assert (int(packed[r, c]) >> 2 * i) & 3 == int(codes_FD[r + 3 * i, c]) + 1


@each_kernel
def test_layout_of_every_trit(kernel: str) -> None:
    """packed[r, c] = ceil(256/243 · Σ 3^(4-i) (code[r, c + i W] + 1)), beyond the row a code 0."""
    codes_FD = random_codes(6, 13, seed=4)
    packed = pack_base3(codes_FD, kernel=kernel)
    for r in range(6):
        for c in range(3):
            places = [c + 3 * i for i in range(5)]
            trits = [int(codes_FD[r, j]) + 1 if j < 13 else 1 for j in places]
            value = sum(3 ** (4 - i) * trit for i, trit in enumerate(trits))
            assert int(packed[r, c]) == -(-256 * value // 243)


@each_kernel
def test_golden_bytes(kernel: str) -> None:
    codes_FD = torch.tensor([[-1, 1], [0, 1], [1, 1], [1, -1]], dtype=torch.int8)
    assert pack_2bit(codes_FD, kernel=kernel).tolist() == [[0b10_10_01_00, 0b00_10_10_10]]
    row = torch.tensor([[1, 1, 1, 1, 1, -1, -1, -1, -1, -1]], dtype=torch.int8)
    # Every second code: 2 2 2 0 0 = 234 and 2 2 0 0 0 = 216, · 256/243 = 246.5 and 227.6.
    assert pack_base3(row, kernel=kernel).tolist() == [[247, 228]]


@each_kernel
def test_every_byte_is_a_code_or_an_error(kernel: str) -> None:
    for byte in range(256):
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if any((byte >> shift) & 3 == 3 for shift in (0, 2, 4, 6)):
            with pytest.raises(ValueError, match="bit pattern 3: damaged, or not ternary"):
                unpack_2bit(packed, kernel=kernel)
        else:
            assert torch.equal(pack_2bit(unpack_2bit(packed, kernel=kernel)), packed)


@each_kernel
def test_243_bytes_are_five_trits(kernel: str) -> None:
    written = {-(-256 * value // 243) for value in range(243)}
    for byte in range(256):
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if byte in written:
            assert torch.equal(pack_base3(unpack_base3(packed, 5, kernel=kernel)), packed)
        else:
            with pytest.raises(ValueError, match="a byte that is not five trits: damaged"):
                unpack_base3(packed, 5, kernel=kernel)
    with pytest.raises(ValueError, match="2 bytes a row, but 5 columns take 1"):
        unpack_base3(torch.zeros(1, 2, dtype=torch.uint8), 5, kernel=kernel)


@each_kernel
def test_base3_padding_is_of_zeros(kernel: str) -> None:
    """What lies beyond a row's end is checked too: nothing can hide there."""
    packed = pack_base3(torch.ones(1, 5, dtype=torch.int8), kernel=kernel)
    with pytest.raises(ValueError, match="not five trits"):
        unpack_base3(packed, 4, kernel=kernel)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_rows_must_be_a_multiple_of_4(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows are not a multiple of 4"):
        pack_2bit(torch.zeros(rows, 2, dtype=torch.int8))


@each_kernel
@pytest.mark.parametrize("code", [-128, -2, 2, 3, 127])
def test_codes_must_be_ternary(code: int, kernel: str) -> None:
    for column in (1, 70):  # in the vector loop, and after it
        codes_FD = torch.zeros(4, 71, dtype=torch.int8)
        codes_FD[2, column] = code
        for pack in (pack_2bit, pack_base3):
            with pytest.raises(ValueError, match=r"codes outside \{-1, 0, 1\}"):
                pack(codes_FD, kernel=kernel)


@each_kernel
def test_into_given_memory_and_from_views(kernel: str) -> None:
    codes_FD = random_codes(64, 65, seed=5)[::2, 1:]  # not contiguous
    out, back = torch.full((8, 64), 99, dtype=torch.uint8), torch.empty(32, 64, dtype=torch.int8)
    assert pack_2bit(codes_FD, kernel=kernel, out=out) is out
    assert unpack_2bit(out, kernel=kernel, out=back) is back
    assert torch.equal(back, codes_FD)


def test_kernels_by_name() -> None:
    with pytest.raises(KernelUnavailable, match=r"quant\.kernel='fast' does not exist"):
        pack_2bit(torch.zeros(4, 1, dtype=torch.int8), kernel="fast")
