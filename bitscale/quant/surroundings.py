"""What surrounds a pass and must not change it unseen: autocast."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, under `torch.autocast` too, which would round operands and result to 16 bit.

    int8 codes fit into bf16, and their sums do not.
    """
    device = a.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast to ask
        return a @ b
    with torch.autocast(device, enabled=False):
        return a @ b
