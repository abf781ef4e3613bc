"""Which hosts take part: the hostfile, and how many of its hosts a run can be split over."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitscale.config import Config, check_world_size
from bitscale.errors import ConfigError

# DeepSpeed's format: a name, then slots=N; # begins a comment.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>[1-9][0-9]*)")

# What a rank on another host gets of this one's environment. Anything else (tokens, passwords,
# addresses of the login node) stays here.
_SENT_NAMES = {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DS_ACCELERATOR", "HOME", "LANG", "TMPDIR"}
_SENT_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "TRITON_", "UCX_", "FI_")


@dataclass(frozen=True)
class Host:
    name: str  # as ssh knows it
    slots: int  # ranks that run there


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile as `deepspeed --hostfile` reads it.

    Raises ConfigError for a file that cannot be read, a line that is none, or a host named twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hostfile {path}: {error}; give a file of NAME slots=N lines"
        ) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{path}:{number}: {text!r} is not a host; write NAME slots=N, for example "
                "'node1 slots=8'"
            )
        if any(host.name == found["name"] for host in hosts):
            raise ConfigError(
                f"{path}:{number}: host {found['name']} is named twice; give it one line with all "
                "its slots"
            )
        hosts.append(Host(found["name"], int(found["slots"])))
    if not hosts:
        raise ConfigError(f"{path} names no host; write NAME slots=N lines")
    return hosts


def largest_fit(cfg: Config, hosts: Sequence[Host]) -> list[Host]:
    """The most of `hosts`, from the first on, whose ranks the model and the global batch divide
    over; empty if no number of them does. The batch stays as it is: with fewer ranks each
    accumulates over more micro-batches."""
    for count in range(len(hosts), 0, -1):
        chosen = list(hosts[:count])
        if not why_unfit(cfg, chosen):
            return chosen
    return []


def why_unfit(cfg: Config, hosts: Sequence[Host]) -> str:
    """What keeps `cfg` from running on all of `hosts`; empty if nothing does."""
    try:
        check_world_size(cfg, sum(host.slots for host in hosts))
    except ConfigError as error:
        return str(error)
    return ""


def sent_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The part of `environment` (this process's) that ranks on other hosts are given."""
    source = os.environ if environment is None else environment
    return {
        name: value
        for name, value in source.items()
        if name in _SENT_NAMES or name.startswith(_SENT_PREFIXES)
    }


def rank_variables(
    hosts: Sequence[Host], address: str, port: int
) -> dict[str, list[dict[str, str]]]:
    """By host, what each of its ranks finds in its environment: its number, the meeting point."""
    world_size = sum(host.slots for host in hosts)
    variables: dict[str, list[dict[str, str]]] = {}
    first = 0
    for host in hosts:
        variables[host.name] = [
            {
                "RANK": str(first + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(host.slots),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            for local in range(host.slots)
        ]
        first += host.slots
    return variables
