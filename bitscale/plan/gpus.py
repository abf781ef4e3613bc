"""Accelerators as data: what a rank computes, holds and sends at most.

Dense figures, without sparsity; bandwidths in one direction, NVLink's halved from the data sheets'
sum of both. Memory is what PyTorch reports as `total_memory`, less than the label says or more
(an H200 of "141 GB" has 140 GiB). The network is that of the maker's own eight-GPU system.
"""

from dataclasses import dataclass
from typing import Literal

from bitscale.errors import ConfigError

Arithmetic = Literal["bf16", "int8", "fp32"]


@dataclass(frozen=True)
class Gpu:
    """Peak figures of one rank."""

    name: str
    bf16_tflops: float
    int8_tflops: float  # tera-operations
    fp32_tflops: float
    memory_gib: float
    memory_gb_per_second: float  # read and written together
    node_gb_per_second: float  # sent to ranks of the same node
    network_gb_per_second: float  # sent to other nodes

    def flops_per_second(self, arithmetic: Arithmetic) -> float:
        tflops = {"bf16": self.bf16_tflops, "int8": self.int8_tflops, "fp32": self.fp32_tflops}
        return 1e12 * tflops[arithmetic]


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # nvidia.com/en-us/data-center/h200 (SXM, its dense half); DGX H200 data sheet: 400 Gb/s a
        # GPU. 139 GiB: torch on the SXM module.
        Gpu("h200", 989.5, 1979.0, 67.0, 139.0, 4800.0, 450.0, 50.0),
        # resources.nvidia.com H100 Tensor Core GPU data sheet (SXM); DGX H100: 400 Gb/s a GPU.
        Gpu("h100", 989.5, 1979.0, 67.0, 79.1, 3350.0, 450.0, 50.0),
        # NVIDIA A100 80GB data sheet (SXM); DGX A100: eight HDR adapters of 200 Gb/s for eight
        # GPUs, as in Selene (arXiv:2104.04473, section 5).
        Gpu("a100-80", 312.0, 624.0, 19.5, 79.1, 2039.0, 300.0, 25.0),
        # HGX B200 at 1,000 W: glennklockwood.com/garden/processors/B200; memory of the module as
        # nvidia-smi shows it: docs.vultr.com/inference-cookbook (HGX B200); DGX B200: 400 Gb/s.
        Gpu("b200", 2250.0, 4500.0, 80.0, 178.0, 8000.0, 900.0, 50.0),
        # One core of the machine that the tests run on (AMD EPYC 9005, 2.6 GHz): two 512-bit
        # multiply-adds a cycle, twice as many in bf16 and four times in int8 (Software
        # Optimization Guide for the AMD Zen5 Microarchitecture, 58455). Memory is half of the
        # machine's; its bandwidth and both links are round guesses.
        Gpu("cpu", 0.333, 0.666, 0.166, 11.0, 20.0, 2.0, 1.0),
    )
}


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for one that is not in the table."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name!r} is not in the table; use one of {', '.join(GPUS)}")
    return GPUS[name]
