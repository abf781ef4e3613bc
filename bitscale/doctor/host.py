"""The examination of the host that this process runs on."""

from __future__ import annotations

import platform
from pathlib import Path

from bitscale.doctor import software, system
from bitscale.doctor.check import Report
from bitscale.doctor.gpus import examine_gpus


def examine_host(
    *, quick: bool = False, run_dir: Path | None = None, needed_bytes: int = 0
) -> Report:
    """All checks that need nobody else.

    `quick` imports no torch and compiles nothing: for a health check once a minute.
    """
    gpu_checks, gpu_facts, num_gpus = examine_gpus()
    answered = [
        software.python(),
        software.source(),
        software.packages(),
        *([] if quick else [software.torch_build(num_gpus)]),
        (gpu_checks, gpu_facts),
        *([] if quick else [(software.compiler(), {})]),
        system.cores(),
        (system.memory(), {}),
        (system.limits(), {}),
        *([] if run_dir is None else [(system.run_disk(run_dir, needed_bytes), {})]),
    ]
    checks = [check for found, _ in answered for check in found]
    facts = {name: value for _, found in answered for name, value in found.items()}
    return Report(platform.node(), checks, facts)
