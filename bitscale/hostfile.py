"""The hosts of a hostfile, in DeepSpeed's format."""

import re
from dataclasses import dataclass
from pathlib import Path

from bitscale.errors import ConfigError

# A name, then slots=N. The name becomes part of a command line: nothing in it may look like an
# option or mean anything to a shell.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._:@-]*)\s+slots=(?P<slots>[1-9][0-9]*)")


@dataclass(frozen=True)
class Host:
    name: str  # as ssh knows it
    slots: int  # ranks that run there


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile as `deepspeed --hostfile` reads it; # begins a comment.

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
                f"{path}:{number}: {text[:60]!r} is not a host; write NAME slots=N, for example "
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
