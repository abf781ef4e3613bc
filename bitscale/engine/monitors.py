"""Weights & Biases and Comet, by DeepSpeed's monitors.

They get what metrics.jsonl gets, by step. Not through DeepSpeed's engine, which would add figures
of its own by samples, on the same axis. Access keys are read from the environment by these packages
and are no configuration: that is written beside the run and into every checkpoint.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitscale.config import LogConfig
from bitscale.errors import ConfigError

Listener = Callable[[Sequence[Mapping[str, Any]]], None]
_KINDS = ("train", "speed", "valid")


def check_monitors(log: LogConfig) -> None:
    """Raise ConfigError if a package that `log` asks for is not installed (for rank 0)."""
    for key, module, package in (
        ("wandb", "wandb", "wandb"),
        ("comet", "comet_ml", "'comet_ml>=3.41'"),
    ):
        if getattr(log, key) is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"log.{key} needs the package {module}, which is not installed on rank 0's host; "
                f"pip install {package}, or set log.{key}=null"
            )


def open_monitors(log: LogConfig) -> Listener | None:
    """What writes recorded lines to the services of `log` (on rank 0); None without any.

    Call it once the engine is there: DeepSpeed's monitors ask for the rank.
    """
    if log.wandb is None and log.comet is None:
        return None
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    sections: dict[str, Any] = {}
    if log.wandb is not None:
        sections["wandb"] = {"enabled": True, **log.wandb.model_dump()}
    if log.comet is not None:
        named = log.comet.model_dump(exclude_none=True)
        sections["comet"] = {"enabled": True, "samples_log_interval": 1, **named}
    monitor = MonitorMaster(get_monitor_config(sections))

    def write(lines: Sequence[Mapping[str, Any]]) -> None:
        monitor.write_events([event for line in lines for event in _events(line)])

    return write


def _events(line: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """(name, value, step) of every number of a line."""
    kind, step = line["kind"], line["step"]
    if kind not in _KINDS:
        return []
    return [
        (f"{kind}/{name}", value, step)
        for name, value in line.items()
        if name not in ("step", "unix_seconds") and isinstance(value, int | float)
    ]
