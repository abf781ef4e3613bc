"""Hosts on one machine: namespaces joined by a bridge, an sshd in each, one file system.

    with make_hosts(2, folder) as hosts:
        hosts.start("head", ["ssh", "node1", "hostname"], log)

A host is a process with its own network, PID, mount and host-name namespace, so that what runs on
it sees its own processes, addresses and /etc/hosts. Keys, sshd's and ssh's configuration live in
`folder` and are mounted over the machine's inside those namespaces only. The bridge has a namespace
of its own. All of it goes when the first processes do, and those when the process that made them
does.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

HEAD = "head"  # where commands start that train on other hosts
_NETWORK = "10.77.0"
_START_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1
_TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pdsh")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

# --kill-child: the first process dies with `unshare`, and all others with that.
_ISOLATE = [
    "unshare",
    *("--net", "--mount", "--uts", "--pid"),
    *("--mount-proc", "--fork", "--kill-child"),
]

# The first process of a host: what it mounts is seen by nobody else. bash also reaps orphans.
_BOOT = """\
set -e
mount -t tmpfs none /run && mkdir /run/sshd
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
hostname "$2"
ip link set lo up
echo ready && read -r address
/usr/sbin/sshd -D -e -f "$1/sshd_config" -o ListenAddress="$address" 2>>"$1/$2-sshd.log" &
wait
"""
_SSHD_CONFIG = """\
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
_SSH_CONFIG = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  LogLevel ERROR
"""


@dataclass
class Hosts:
    """Running hosts: `head` and `node1` to `nodeN`."""

    folder: Path
    names: list[str]
    ssh_port: int
    _first: dict[str, int]  # PID of each host's first process, as this machine sees it
    _switch: int

    @property
    def nodes(self) -> list[str]:
        return [name for name in self.names if name != HEAD]

    def command(self, host: str, command: Sequence[object]) -> list[str]:
        """`command` as run on `host`, in this process's working directory."""
        here = ["env", "-C", str(Path.cwd())]
        return [*_enter(self._first[host]), *here, *map(str, command)]

    def start(
        self, host: str, command: Sequence[object], log: Path, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start `command` on `host` in a session of its own, all output to the end of `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(host, command),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def execute(self, host: str, *command: object) -> str:
        """What `command` prints on `host`; CalledProcessError if it fails."""
        full = self.command(host, command)
        return subprocess.run(
            full, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def link(self, host: str, state: str) -> None:
        """Plug the cable of `host` in ("up") or out ("down")."""
        index = self.names.index(host)
        _run([*_enter(self._switch, "--net"), "ip", "link", "set", f"port{index}", state])

    def hostfile(self, slots: int, nodes: Sequence[str] | None = None) -> Path:
        path = self.folder / "hostfile"
        lines = [f"{name} slots={slots}\n" for name in nodes or self.nodes]
        path.write_text("".join(lines))
        return path


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux, openssh-server, pdsh)"
    probe = "ip link add port0 type veth peer name port1 && ip link add bridge0 type bridge"
    made = subprocess.run(
        [*_ISOLATE, "sh", "-c", probe],
        capture_output=True,
        text=True,
        env=_environment(),
    )
    return "" if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


@contextmanager
def make_hosts(num_nodes: int, folder: Path, *, ssh_port: int = 22) -> Iterator[Hosts]:
    """`head` and `num_nodes` nodes that reach each other by name over ssh, without a password.

    Each sshd listens on `ssh_port` only, of which ssh there knows nothing: it has to be told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [HEAD, *(f"node{index + 1}" for index in range(num_nodes))]
    _write_configuration(folder, names, ssh_port)
    with ExitStack() as stack:
        # A sleeping process holds the namespace of the bridge.
        sleeper = ["sh", "-c", "echo ready; exec sleep inf"]
        switch = _first_process(stack, ["unshare", "--net", *sleeper])
        in_switch = _enter(switch.pid, "--net")
        _run([*in_switch, "ip", "link", "add", "bridge", "type", "bridge"])
        _run([*in_switch, "ip", "link", "set", "bridge", "up"])
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            boot = [*_ISOLATE, "bash", "-c", _BOOT, "boot", str(folder), name]
            holder = _first_process(stack, boot)
            first[name] = _only_child(holder.pid)
            _plug_in(in_switch, first[name], index)
            assert holder.stdin is not None
            holder.stdin.write(f"{_address(index)}\n".encode())
            holder.stdin.flush()
        hosts = Hosts(folder, names, ssh_port, first, switch.pid)
        for name in names:
            _wait_for_sshd(hosts, name)
        yield hosts


def _write_configuration(folder: Path, names: list[str], ssh_port: int) -> None:
    for key in ("key", "host_key"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
    public = (folder / "host_key.pub").read_text().split()[:2]
    addresses = [(_address(index), name) for index, name in enumerate(names)]
    known = [
        f"{_known(address, ssh_port)},{_known(name, ssh_port)} {' '.join(public)}\n"
        for address, name in addresses
    ]
    (folder / "known_hosts").write_text("".join(known))
    lines = [f"{address} {name}\n" for address, name in addresses]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder, port=ssh_port))
    (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))


def _known(host: str, port: int) -> str:
    """`host` as ssh writes it into known_hosts."""
    return host if port == 22 else f"[{host}]:{port}"


def _address(index: int) -> str:
    return f"{_NETWORK}.{index + 1}"


def _first_process(stack: ExitStack, command: list[str]) -> subprocess.Popen[bytes]:
    """`command`, after it has said "ready"; killed when `stack` closes or this process ends."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError(f"{' '.join(command[:8])}: did not start")
    return process


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _plug_in(in_switch: list[str], first: int, index: int) -> None:
    port = f"port{index}"
    pair = ["type", "veth", "peer", "name", "eth0", "netns", str(first)]
    _run([*in_switch, "ip", "link", "add", port, *pair])
    _run([*in_switch, "ip", "link", "set", port, "master", "bridge", "up"])
    inside = _enter(first, "--net")
    _run([*inside, "ip", "address", "add", f"{_address(index)}/24", "dev", "eth0"])
    _run([*inside, "ip", "link", "set", "eth0", "up"])


def _wait_for_sshd(hosts: Hosts, name: str) -> None:
    log = hosts.folder / f"{name}-sshd.log"
    deadline = time.monotonic() + _START_SECONDS
    while not (log.exists() and "Server listening" in log.read_text()):
        if time.monotonic() > deadline:
            said = log.read_text() if log.exists() else "nothing"
            raise RuntimeError(f"sshd on {name} does not listen; it says: {said}")
        time.sleep(0.05)


def _enter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", "--target", str(pid), *(namespaces or _ALL_NAMESPACES)]


_ALL_NAMESPACES = ("--net", "--mount", "--uts", "--pid")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{_SBIN}"}
