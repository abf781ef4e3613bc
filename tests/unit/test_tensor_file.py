"""safetensors files as they are written and read: what a checksum sees, holes, dtypes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitscale.convert.tensor_file import TensorSpec, write_tensors
from bitscale.convert.tensor_reader import TensorReader
from bitscale.data.progress import ByteProgress

pytestmark = pytest.mark.unit

MIB = 2**20
ZERO = torch.zeros(())
TENSORS = {
    "a": torch.arange(7.0),
    "hole": ZERO.expand(2 * MIB + 3),  # 8 MiB, and not a multiple of the checksum's parts
    "ones": torch.ones(()).expand(5),
    "minus": torch.tensor(-0.0).expand(2, 3),  # a 0, but not of zero bytes
    "scalar": ZERO,
    "last": ZERO.expand(3, MIB),
}


def test_zeros_are_holes(tmp_path: Path) -> None:
    path, sha256 = tmp_path / "x.safetensors", hashlib.sha256()
    write(path, TENSORS, sha256)
    assert path.stat().st_size > 20 * MIB
    assert 512 * path.stat().st_blocks < MIB  # on the disk
    found = load_file(path)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), bytes_of(tensor)), name
    assert sha256.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_was_there_is_gone(tmp_path: Path) -> None:
    """A hole is not a window on an older file."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 30 * MIB)
    write(path, TENSORS)
    assert not load_file(path)["last"].any()
    assert path.stat().st_size < 21 * MIB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_read_as_they_are_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    """But 64-bit ones in fp32, so that what is finite there is finite later."""
    save_file({"w": torch.tensor([0.1, 3e38], dtype=dtype)}, tmp_path / "model.safetensors")
    stored = dtype if dtype != torch.float64 else torch.float32
    assert TensorReader(tmp_path).floating("w").dtype == stored


def write(path: Path, tensors: dict[str, Tensor], sha256: "hashlib._Hash | None" = None) -> None:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with ByteProgress("x", 0) as progress:
        write_tensors(
            path, specs, iter(tensors.items()), progress, seen=sha256.update if sha256 else None
        )


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
