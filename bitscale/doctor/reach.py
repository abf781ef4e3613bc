"""Whether ssh reaches every host, asked before a launcher has started the ranks of some of them."""

import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bitscale.doctor.hosts import CONNECT_OPTIONS, MAX_AT_ONCE
from bitscale.errors import ConfigError
from bitscale.hostfile import Host


def require_ssh(hosts: Sequence[Host], ssh: Sequence[str], seconds: float) -> None:
    """Log in to all `hosts` at the same time; ConfigError that names those that do not let us in,
    or not within `seconds`, with ssh's own reason."""
    with ThreadPoolExecutor(min(len(hosts), MAX_AT_ONCE)) as pool:
        reasons = list(pool.map(lambda host: _why_not(host, ssh, seconds), hosts))
    failed = [(host.name, reason) for host, reason in zip(hosts, reasons, strict=True) if reason]
    if failed:
        told = "; ".join(f"{name}: {reason}" for name, reason in failed)
        raise ConfigError(
            f"{len(failed)} of {len(hosts)} hosts not reached: {told}; make '{shlex.join(ssh)} "
            f"{failed[0][0]} true' work without a question (sshd's port, key, known_hosts), or "
            "take the host out of the hostfile"
        )


def _why_not(host: Host, ssh: Sequence[str], seconds: float) -> str:
    """What keeps ssh out of `host`; empty if it gets in."""
    command = [*ssh, *CONNECT_OPTIONS, host.name, "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return f"{lines[-1][:200] if lines else 'ssh said nothing'} (exit {done.returncode})"
