"""A real Slurm over the hosts of netns_hosts.py: its controller on the head, a daemon on each node.

Partition `low` is preempted by `high`: jobs there get SIGTERM, a minute, and are queued again.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host_faults import host_environment
from netns_hosts import HEAD, Hosts

_TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")
_START_SECONDS = 60.0
# cred_expire: Slurm waits as long before it starts a job again (two minutes by default).
_CONFIGURATION = """\
ClusterName=bits
SlurmctldHost={head}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF
"""


def why_no_slurm() -> str:
    """Why there can be no Slurm here; empty if there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else ""


def slurm_environment(folder: Path) -> dict[str, str]:
    """For every command on the hosts, whoever submits; jobs get it, too."""
    env = host_environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
    return env | {"PATH": f"{env['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"}


@contextmanager
def slurm(hosts: Hosts, folder: Path) -> Iterator[dict[str, str]]:
    """Start it, with its files in `folder`; the environment to submit from the head."""
    (folder / "state").mkdir(parents=True)
    nodes = ",".join(hosts.nodes)
    text = _CONFIGURATION.format(folder=folder, head=HEAD, nodes=nodes, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env, started = slurm_environment(folder), []
    munge = ["--foreground", "--force", "--key-file", key, "--socket", "/run/munge.socket"]
    try:
        for host in hosts.names:
            own = [f"--{name}-file=/run/munge.{name}" for name in ("pid", "log", "seed")]
            started.append(hosts.start(host, ["munged", *munge, *own], folder / "munge.log", env))
        started.append(hosts.start(HEAD, ["slurmctld", "-D", "-c"], folder / "head.log", env))
        for node in hosts.nodes:
            (folder / f"spool-{node}").mkdir()
            started.append(hosts.start(node, ["slurmd", "-D"], folder / f"{node}.log", env))
        _wait_until_idle(hosts, env)
        yield env
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(hosts: Hosts, env: dict[str, str], *command: object) -> str:
    """What a Slurm command prints on the head."""
    full = hosts.command(HEAD, command)
    done = subprocess.run(full, env=env, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout.strip()


def job_fields(hosts: Hosts, env: dict[str, str], job: str) -> dict[str, str]:
    """`scontrol show job`: JobState, Restarts, ExitCode, ..."""
    words = ask(hosts, env, "scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _wait_until_idle(hosts: Hosts, env: dict[str, str]) -> None:
    deadline, said = time.monotonic() + _START_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            said = ask(hosts, env, "sinfo", "--noheader", "--partition=low", "--format=%D %t")
        except RuntimeError as error:
            said = str(error)
        if said == f"{len(hosts.nodes)} idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"Slurm has not started within {_START_SECONDS:.0f} s: {said}")
