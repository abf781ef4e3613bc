"""A run of one process is reachable by nobody: what listens, listens on loopback."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import environment, train_command

pytestmark = pytest.mark.e2e

LISTEN = "0A"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# A network of its own, in which this host's name means an address that others could reach: gloo
# would listen there if it were not told otherwise.
ISOLATE = """\
set -e
ip link set lo up
ip link add eth0 type veth peer name eth1
ip address add 10.9.9.9/24 dev eth0
ip link set eth0 up
ip link set eth1 up
hostname reachable
printf '127.0.0.1 localhost\\n10.9.9.9 reachable\\n' >"$1"
mount --bind "$1" /etc/hosts
shift
exec "$@"
"""


def why_not() -> str:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip", path=PATH) is None:
        return "network namespaces need Linux, root and iproute2"
    probe = "ip link add x type veth peer name y"
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": PATH})
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else ""


def listening(pid: int) -> set[str]:
    """Local addresses (hexadecimal, as the kernel prints them) that listen in `pid`'s network."""
    found = set()
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        fields = (line.split() for line in lines)
        found |= {local.partition(":")[0] for _, local, _, state, *_ in fields if state == LISTEN}
    return found


def network_of(pid: int | str) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()


def test_a_single_process_listens_on_loopback_only(config_file: Path, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    train = train_command(
        "plain", config_file, f"run.dir={tmp_path / 'run'}", "train.stop_step=6",
        "log.tensorboard=true",
    )  # fmt: skip
    isolate = ["unshare", "--net", "--uts", "--mount", "bash", "-c", ISOLATE, "isolate"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*isolate, str(tmp_path / "hosts"), *train],
            env=environment() | {"PATH": f"{Path(sys.executable).parent}:{PATH}"},
            stdout=output, stderr=output,
        )  # fmt: skip
        seen: set[str] = set()
        deadline = time.monotonic() + 240
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            # Not there yet: the network is still this machine's. Gone already: it has ended.
            with contextlib.suppress(OSError):
                if network_of(process.pid) != network_of("self"):
                    seen |= listening(process.pid)
            time.sleep(0.03)
    assert process.returncode == 0, log.read_text()
    assert seen == {"0100007F"}  # 127.0.0.1: gloo
