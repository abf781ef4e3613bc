"""What surrounds a pass and must not change it unseen: autocast, and being differentiated twice."""

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


def refuse_second_derivative() -> None:
    """For the backward pass of integer products: it takes codes for constants, so that what
    depends on the weight through them would be missing from a gradient of the gradient.

    Raises RuntimeError.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(
            "a ternary layer (λ = 1) was differentiated with create_graph=True, but integer "
            "products have a first derivative only; leave the layers that a gradient penalty goes "
            "through in 16 bit (bitlinearize's exclude), or keep λ below 1"
        )
