"""torch.compile of the decoder's blocks, each as one graph.

Only while λ is 0 or 1: a graph holds λ as a constant, and every step of a ramp would compile it
anew. The blocks of a ramp run as they do without compilation.
"""

import torch
from torch import nn

from bitscale.errors import KernelUnavailable
from bitscale.model.decoder import Block


def compile_blocks(model: nn.Module, device_type: str, *, backend: str = "inductor") -> None:
    """Compile every block of `model`, when it first runs; a graph break is an error.

    Parameters keep their names. `prepare_weights` becomes the caller's duty (TrainEngine does it).

    Raises:
        KernelUnavailable: there is no C++ compiler, without which nothing is compiled for a CPU.
    """
    if backend == "inductor" and device_type == "cpu":
        _check_compiler()
    for block in model.modules():
        if isinstance(block, Block):
            block.compiled = torch.compile(block.compute, fullgraph=True, backend=backend)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise KernelUnavailable(
            "train.compile=true generates C++ on a CPU, and no compiler was found (of $CXX, g++); "
            "install g++, or set train.compile=false"
        ) from error
