"""`bitscale doctor`: the checks of one host, and the judgement over many, piece by piece."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitscale.cli.main import main
from bitscale.doctor import network, software, system
from bitscale.doctor.agent import Agent
from bitscale.doctor.check import Check, Finding, Report, has_failed
from bitscale.doctor.compare import compare_clocks, compare_directory, compare_facts, find_meeting
from bitscale.doctor.gpus import examine_gpus, parse_topology
from bitscale.doctor.hosts import Connection, HostFailure, agent_command, on_each
from bitscale.doctor.show import show
from bitscale.errors import ConfigError
from bitscale.hostfile import Host, read_hostfile

pytestmark = pytest.mark.unit

DOCTOR = [sys.executable, "-m", "bitscale.cli.main", "doctor", "--local", "--quick", "--json"]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def examine(*before: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and checks of a real `doctor --local --quick` behind a shell's `before`."""
    script = "; ".join([*before, 'exec "$@"'])
    # Not in the repository, where an editable installation leaves bitscale.egg-info in front.
    done = subprocess.run(
        ["bash", "-c", script, "bash", *DOCTOR],
        env=os.environ | environment, capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


# One host


def test_a_healthy_host_passes_quickly_without_torch() -> None:
    code = "import sys; from bitscale.cli.main import main; c = main(sys.argv[1:]); "
    code += "assert not {'torch', 'deepspeed', 'megatron', 'numpy'} & set(sys.modules); sys.exit(c)"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--local", "--quick"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 host: fit for a run" in done.stdout


def test_limits_are_those_of_the_session() -> None:
    code, checks = examine("ulimit -n 200", "ulimit -c 0")
    assert code == 0  # a warning
    assert checks["open files"]["state"] == "warn"
    assert checks["open files"]["value"] == "limit 200, below 4096"
    assert "/etc/security/limits.d" in checks["open files"]["remedy"]
    assert checks["core dumps"]["state"] == "ok"


def test_locked_memory_matters_with_infiniband(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    real = resource.getrlimit
    limited = {resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limited.get(kind) or real(kind))
    assert by_name(system.limits())["locked memory"].state == "ok"
    monkeypatch.setattr(system, "_INFINIBAND", tmp_path)
    check = by_name(system.limits())["locked memory"]
    assert (check.state, check.value) == (
        "fail",
        "limit 65,536 bytes, and this host has InfiniBand",
    )


def test_a_wrong_and_a_missing_package_fail(tmp_path: Path) -> None:
    """Another numpy is installed in front of ours, as a stray pip install --target does."""
    info = tmp_path / "numpy-1.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.20.0\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    code, checks = examine(PYTHONPATH=path)
    assert code == 1
    assert checks["packages"]["value"] == "numpy 1.20.0 is not >=1.26"
    ours = tmp_path / "bitscale-9.dist-info"
    ours.mkdir()
    metadata = "Metadata-Version: 2.1\nName: bitscale\nVersion: 9\nRequires-Dist: nonesuch>=1\n"
    (ours / "METADATA").write_text(metadata + "Requires-Dist: absent; extra == 'dev'\n")
    _, checks = examine(PYTHONPATH=path)
    assert checks["packages"]["value"] == "nonesuch is missing"


def test_a_compiler_without_headers_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert by_name(software.compiler())["compiler"].state == "ok"
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    check = by_name(software.compiler())["compiler"]
    assert check.state == "warn"
    assert "Python.h" in check.value
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_name(software.compiler())["compiler"].value == "none of cc, gcc, clang"


def test_disk_is_held_against_the_checkpoints(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"  # not made yet
    assert system.run_disk(run_dir, 1000)[0].state in ("ok", "warn")
    check = system.run_disk(run_dir, 2**60)[0]
    assert check.state == "fail"
    assert f"free at {tmp_path} (" in check.value
    assert "checkpoints need 1073741824.0 GiB" in check.value
    assert not run_dir.parent.exists()


def test_file_system_of_a_mount_and_of_a_neighbour() -> None:
    assert system.file_system(Path("/proc/self")) == "proc"
    assert system.file_system(Path("/dev/shm")) == "tmpfs"
    assert system.file_system(Path("/processes-that-are-none")) != "proc"


def test_source_fingerprint_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = software.fingerprint(tmp_path)
    (tmp_path / "a.pyc").write_text("ignored")
    assert software.fingerprint(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert software.fingerprint(tmp_path) != first
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert software.fingerprint(tmp_path) != first


# GPUs: a script that answers as nvidia-smi does; no GPU is here.

_GOOD = "{i}, NVIDIA H200, 575.57.08, 143771, 4, 0, 0, No, 700.00, 700.00, 30, 16, 16"
_QUIET = ", Not Active" * 4
_TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\t0-47
GPU1\tNV18\t X \tPHB\t0-47
GPU2\tSYS\tPHB\t X \t48-95

Legend:
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(*rows: str, refuses: str = "", topology: str = "", sleeps: int = 0) -> None:
        (tmp_path / "rows").write_text("".join(row + "\n" for row in rows))
        (tmp_path / "topology").write_text(topology)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f"#!/bin/sh\nsleep {sleeps}\n"
            f'[ "$1" = topo ] && exec cat {tmp_path}/topology\n'
            f'case "$1" in *{refuses or "nothing-of-it"}*)\n'
            "  echo 'Field \"clocks_event\" is not a valid field to query.'; exit 2 ;; esac\n"
            f"exec cat {tmp_path}/rows\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def test_healthy_gpus(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(*[_GOOD.format(i=i) + _QUIET for i in range(3)], topology=_TOPOLOGY)
    checks, facts, count = examine_gpus()
    assert count == 3
    assert facts == {"driver": "575.57.08", "gpu": "3 x NVIDIA H200, 143771 MiB"}
    assert [check.state for check in checks] == ["ok", "ok", "warn"]
    assert checks[2].value == "GPUs are joined by NV18, PHB, SYS (SYS crosses sockets)"


def test_an_older_driver_names_the_reasons_otherwise(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(_GOOD.format(i=0) + _QUIET, refuses="clocks_event_reasons")
    assert examine_gpus()[2] == 1


@pytest.mark.parametrize(
    ("row", "state", "words"),
    [
        ("0, H200, 1, 9, 4, 2, 0, No, 700, 700, 30, 16, 16" + _QUIET, "fail",
         "2 uncorrectable memory errors"),
        ("0, H200, 1, 9, 4, 0, 0, Yes, 700, 700, 30, 16, 16" + _QUIET, "fail", "no spare rows"),
        ("0, H200, 1, 9, 4, 0, 3, No, 700, 700, 30, 16, 16" + _QUIET, "fail",
         "wait to be remapped"),
        ("0, H200, 1, 9, 4, 0, 0, No, 500, 700, 30, 16, 16" + _QUIET, "warn",
         "power capped at 500 of 700 W"),
        ("0, H200, 1, 9, 4, 0, 0, No, 700, 700, 30, 8, 16" + _QUIET, "warn", "8 of 16 lanes"),
        ("0, H200, 1, 9, 9000, 0, 0, No, 700, 700, 30, 16, 16" + _QUIET, "warn",
         "9,000 MiB in use"),
        ("0, H200, 1, 9, 4, 0, 0, No, 700, 700, 93, 16, 16, Active" + _QUIET[12:], "warn",
         "held down (hw_slowdown, 93 C)"),
    ],
)  # fmt: skip
def test_an_ailing_gpu_is_named(
    nvidia_smi: Callable[..., None], row: str, state: str, words: str
) -> None:
    nvidia_smi(row)
    health = [check for check in examine_gpus()[0] if check.name == "gpu health"]
    assert [check.state for check in health] == [state]
    assert health[0].value.startswith("GPU 0: ")
    assert words in health[0].value
    assert health[0].remedy


def test_a_field_that_a_gpu_lacks_is_no_ailment(nvidia_smi: Callable[..., None]) -> None:
    unknown = ["[N/A]"] * 4
    nvidia_smi("0, RTX 4090, 1, 9, 4, [N/A], [N/A], [N/A], 450, 450, 30, 16, 16, "
               + ", ".join(unknown))  # fmt: skip
    assert [check.state for check in examine_gpus()[0]] == ["ok", "ok"]


def test_unequal_gpus_and_a_broken_driver(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(_GOOD.format(i=0) + _QUIET, _GOOD.format(i=1).replace("H200", "H100") + _QUIET)
    assert examine_gpus()[0][0].value.startswith("unequal: 2 x NVIDIA H100 and NVIDIA H200")
    nvidia_smi(refuses="index")
    check = examine_gpus()[0][0]
    assert (check.state, "not a valid field" in check.value) == ("fail", True)


def test_a_gpu_that_hangs_its_driver_is_waited_for_once(
    nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitscale.doctor.gpus._SECONDS", 0.3)
    nvidia_smi(sleeps=3)
    check = examine_gpus()[0][0]
    assert check.state == "fail"
    assert "does not answer" in check.value


def test_topology_reads_links_between_gpus_only() -> None:
    text = "        GPU0 GPU1 NIC0\nGPU0    X   PIX  SYS\nGPU1   PIX   X   SYS\nNIC0   SYS SYS X\n"
    assert set(parse_topology(text, 2)) == {"PIX"}


# Hosts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 slots=x\n", ":1: 'node1 slots=x' is not a host; write NAME slots=N"),
        ("a slots=1\n-oProxyCommand=id slots=1\n", ":2: '-oProxyCommand=id slots=1' is not a host"),
        ("a;id slots=1\n", ":1: 'a;id slots=1' is not a host"),
        ("a slots=0\n", ":1: 'a slots=0' is not a host"),
        ("a slots=1\n\n# x\na slots=2\n", ":4: host a is named twice"),
        ("# nothing\n", " names no host"),
    ],
)
def test_a_hostfile_line_that_is_none_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert words in str(caught.value)


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# head first\nnode1 slots=8\nme@10.0.0.2   slots=4 # half\n")
    assert read_hostfile(path) == [Host("node1", 8), Host("me@10.0.0.2", 4)]


HOSTS = str(Path(__file__).parents[2] / "launch" / "hostfile.example")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--local", "--hostfile", "x"], "--local is about this host"),
        (["--quick"], "add --local"),
        (["--port", "99999"], "--port 99999 is not a port"),
        (["train.steps=3"], "name it by --config"),
        (["--hostfile", "/no/such"], "--hostfile /no/such"),
        (["--ssh-only"], "name it by --hostfile"),
        (["--answer-seconds", "nan"], "--answer-seconds nan is not a time above 0"),
        (["--share-seconds", "-1"], "--share-seconds -1 is not a time above 0"),
        (["--hostfile", HOSTS, "--ssh-only", "--ssh", "no-such-ssh -v"], "has no such program"),
        (["--hostfile", HOSTS, "--ssh", "ssh 'x"], "No closing quotation; write it as for a"),
    ],
)
def test_bad_arguments_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_port_of_kubernetes_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.7:29500")
    assert main(["doctor"]) == 2
    assert "MASTER_PORT='tcp://10.0.0.7:29500' is not a port; unset it" in capsys.readouterr().err


def test_a_host_that_dies_hangs_or_chatters_is_a_failure_with_its_words() -> None:
    commands = {
        "dead": ["sh", "-c", "echo 'Permission denied (publickey).' >&2; exit 255"],
        "hung": ["sleep", "30"],
        "chatty": ["sh", "-c", "echo Welcome; echo '{}'; exec \"$@\"", "sh",
                   *agent_command(None, [], {})],
    }  # fmt: skip
    connections = [Connection(Host(name, 1), command) for name, command in commands.items()]
    dead, hung, chatty = connections
    try:
        failures = on_each(lambda c: c.ask("hello", seconds=1), [dead, hung])
        assert str(failures[0]) == "Permission denied (publickey). (exit 255)"
        assert str(failures[1]) == "no answer to 'hello' within 1 s"
        assert chatty.ask("hello", seconds=30)["python"] == sys.executable
        with pytest.raises(HostFailure, match="AttributeError"):
            chatty.ask("nonsense", seconds=30)
    finally:
        for connection in connections:
            connection.close()


def test_the_agent_ends_its_ranks_when_the_doctor_goes() -> None:
    """A rank that waits for another that never comes; the doctor is gone in the middle."""
    connection = Connection(Host("here", 1), agent_command(None, [], {}))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2",
              "BITSCALE_DOCTOR_DEVICE": "cpu", "BITSCALE_DOCTOR_LEADERS": "0"}  # fmt: skip
    agent = psutil.Process(connection._process.pid)
    with pytest.raises(HostFailure, match="no answer to 'ranks'"):
        connection.ask("ranks", seconds=3, ranks=[1], environment=shared, limit_seconds=120)
    children = agent.children(recursive=True)
    connection.close()
    gone, alive = psutil.wait_procs([agent, *children], timeout=20)
    assert (len(gone) > 0, alive) == (True, [])
    with pytest.raises(HostFailure, match="no answer to 'ranks'"):
        connection.ask("time", seconds=3)


class Told(Connection):
    """A connection to an agent in this process, of which single answers are replaced."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.host, self._agent, self._answers = Host(name, 1), Agent(), answers

    def ask(self, do: str, *, seconds: float, **arguments: Any) -> Any:
        if do in self._answers:
            answer = self._answers[do]
            return answer() if callable(answer) else answer
        return getattr(self._agent, do)(**arguments)


def test_a_skewed_clock_is_told_from_the_majority() -> None:
    hosts = [Told("a"), Told("b", time=lambda: time.time() - 3), Told("c", time=lambda: 0.0)]
    checks = {f.host: f.check for f in compare_clocks([*hosts, Told("d")])}
    assert {name: check.state for name, check in checks.items()} == {
        "a": "ok", "b": "warn", "c": "fail", "d": "ok",
    }  # fmt: skip
    assert checks["b"].value.startswith("-3.00")


def test_a_directory_that_one_host_does_not_share(tmp_path: Path) -> None:
    alone = {"tokens": {}, "kind": "ext4"}
    hosts = [
        Told("a"),
        Told("b", tokens=alone),
        Told("c", tokens={"tokens": {}, "kind": "missing"}, put_token="No such file"),
        Told("d", put_token="Read-only file system"),
    ]
    checks = {f.host: f.check for f in compare_directory(hosts, str(tmp_path / "run"), 0.1)}
    assert [checks[name].state for name in "abcd"] == ["ok", "fail", "fail", "fail"]
    assert "is ext4 here and not the one of a" in checks["b"].value
    assert checks["c"].value == f"{tmp_path} does not exist here"
    assert "cannot be written (Read-only file system)" in checks["d"].value
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_and_a_closed_one() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        findings, meeting = find_meeting([Told("a"), Told("b")], port, {})
        assert meeting is None
        assert findings[0].check.value == f"port {port} on a: Address already in use"
        assert "--port" in findings[0].check.remedy
    refused = {"error": "10.0.0.1:29500: Connection refused"}
    findings, meeting = find_meeting([Told("a"), Told("b", connect=refused)], 0, {})
    assert meeting is None
    assert findings[0] == Finding("b", findings[0].check)
    assert "a is not reached: 10.0.0.1:29500: Connection refused" in findings[0].check.value


def test_a_host_name_that_means_loopback_is_warned_of() -> None:
    way = {"address": "10.0.0.1", "interface": "eth0", "name": "b", "name_interface": "lo"}
    hosts = [Told("a"), Told("b", connect=way | {"name_address": "127.0.1.1"})]
    findings, meeting = find_meeting(hosts, 0, {})
    check = next(f.check for f in findings if f.host == "b")
    assert check.value == "the host's own name 'b' means 127.0.1.1, not eth0"
    assert "export GLOO_SOCKET_IFNAME=eth0" in check.remedy
    assert meeting is not None
    assert meeting.interfaces["b"] == "eth0"
    findings, _ = find_meeting(hosts, 0, {"GLOO_SOCKET_IFNAME": "eth0"})
    assert not has_failed(findings)
    assert all(f.check.state == "ok" for f in findings)


def test_facts_that_differ_name_the_hosts() -> None:
    facts = {"torch": "2.13.0", "driver": "575.1"}
    reports = {name: Report(name, [], dict(facts)) for name in ("a", "b", "c")}
    assert [f.check.state for f in compare_facts(reports)] == ["ok"]
    reports["b"].facts["torch"] = "2.12.0"
    del reports["c"].facts["driver"]
    torch, driver = (f.check for f in compare_facts(reports))
    assert (torch.name, torch.state) == ("same torch", "fail")
    assert torch.value == "2.13.0 on a, c; 2.12.0 on b"
    assert (driver.state, driver.value) == ("warn", "575.1 on a, b; none on c")


# The measurement


def results(compute: list[float], links: list[float]) -> dict[int, dict[str, Any]]:
    """Of one rank a host, with links of so many GB/s to the next."""
    return {
        rank: {
            "compute_seconds": seconds,
            "link": {"bytes_per_second": speed * 1e9, "latency_seconds": 1e-4},
        }
        for rank, (seconds, speed) in enumerate(zip(compute, links, strict=True))
    }


def test_the_slowest_rank_is_named() -> None:
    (check,) = network._slowest_rank(results([1, 1.1, 2.2, 1], [1] * 4), dict(enumerate("abcd")))
    assert (check.state, check.value) == (
        "warn",
        "rank 2 on c: 2.20x the time of the others' median",
    )
    (check,) = network._slowest_rank(results([1, 1.1], [1] * 2), dict(enumerate("ab")))
    assert check.state == "ok"


def test_the_host_whose_links_are_slow_is_named() -> None:
    """c is slow towards both its neighbours, b and d."""
    measured = results([1] * 4, [10, 1, 1.1, 10])
    (check,) = network._slowest_link(measured, [0, 1, 2, 3], ["a", "b", "c", "d"])
    assert check.state == "warn"
    assert check.value.startswith("b to c: 1 GB/s, 0.1 ms; the others' median is 10 GB/s")
    assert check.remedy == "check the cable, port and driver of c, or leave it out"
    measured[1]["link"]["bytes_per_second"] = measured[2]["link"]["bytes_per_second"] = 9e9
    (check,) = network._slowest_link(measured, [0, 1, 2, 3], ["a", "b", "c", "d"])
    assert check.state == "ok"


def test_a_failed_measurement_tells_the_cause_before_those_who_waited() -> None:
    errors = {
        "rank 0 on a": "exit 1: DistStoreError: Timed out after 60 seconds",
        "rank 1 on b": "exit 1: ImportError: libnccl.so.2: cannot open shared object file",
    }
    check = network._failure(errors).check
    assert check.state == "fail"
    assert check.value.startswith("rank 1 on b: exit 1: ImportError: libnccl")
    assert check.value.endswith("(and 1 more)")


# The table


def test_hosts_that_say_the_same_share_a_line() -> None:
    same = Check("python", "ok", "3.11.7")
    bad = Check("open files", "warn", "limit 200", "raise nofile")
    findings = [Finding(f"n{i}", same) for i in range(5)] + [Finding("n3", bad)]
    lines = show(findings, 5).splitlines()
    assert lines[0].split() == ["ok", "python", "all", "5", "3.11.7"]
    assert lines[1].split() == ["warn", "open", "files", "n3", "limit", "200"]
    assert lines[2].strip() == "-> raise nofile"
    assert lines[-1] == "5 hosts: fit for a run (5 ok, 1 warnings, 0 failed)"


def test_sound_checks_in_many_words_share_a_line() -> None:
    findings = [Finding(f"n{i}", Check("memory", "ok", f"{i} GiB free")) for i in range(5)]
    findings.append(Finding("n5", Check("memory", "warn", "5 GiB swapped out", "look")))
    lines = show(findings, 6).splitlines()
    assert lines[0].split()[:2] == ["ok", "memory"]
    assert "0 GiB free; the others are sound, too" in lines[0]
    assert "n0, n1, n2 +2" in lines[0]
    assert lines[1].split()[:3] == ["warn", "memory", "n5"]
