"""`bitscale doctor --hostfile` on hosts that are network namespaces, sound ones and broken ones."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import netns_hosts

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PORT = 29517
# On the host whose clock is wrong: Python starts with this, so that time.time() is 30 s ahead.
AHEAD = "import time\n_now = time.time\ntime.time = lambda: _now() + 30\n"
CONFIG = """\
run: {{dir: {folder}/runs/a}}
model: {{num_layers: 2, d_model: 64, num_heads: 4, d_ff: 128, vocab_size: 8192}}
data: {{corpora: [{{path: {folder}/corpus}}], seq_len: 16}}
train: {{steps: 10, global_batch_size: 12, micro_batch_size: 4}}
optim: {{lr: 1e-3}}
transition: {{at: {{fraction: 0.4}}}}
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    reason = netns_hosts.why_not()
    if reason:
        pytest.skip(reason)
    with netns_hosts.make_hosts(2, tmp_path_factory.mktemp("hosts")) as made:
        (made.folder / "shared" / "corpus").mkdir(parents=True)
        (made.folder / "first-on-path").mkdir()
        yield made


def doctor(hosts: Any, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `bitscale doctor` on the head."""
    python_path = f"{hosts.folder}/first-on-path:{ROOT}"
    command = [sys.executable, "-m", "bitscale.cli.main", "doctor", "--port", PORT, "--json"]
    done = subprocess.run(
        hosts.command(netns_hosts.HEAD, [*command, *arguments]),
        env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def states(said: dict[str, Any], name: str) -> dict[str, str]:
    return {check["host"]: check["state"] for check in said["checks"] if check["name"] == name}


def value(said: dict[str, Any], name: str, host: str) -> str:
    (found,) = [c for c in said["checks"] if (c["name"], c["host"]) == (name, host)]
    return f"{found['value']} -> {found['remedy']}"


def test_two_sound_hosts_and_a_real_all_reduce(hosts: Any) -> None:
    shared = hosts.folder / "shared"
    code, said = doctor(hosts, "--hostfile", hosts.hostfile(1), "--run-dir", shared)
    assert code == 0, said["checks"]
    assert said["ok"]
    for name in ("ssh", "clock", "shared directory", "interface", "torch"):
        assert states(said, name) == {"node1": "ok", "node2": "ok"}, name
    assert states(said, "same on all hosts") == {"": "ok"}
    assert "node1 (10.77.0.2:29517)" in value(said, "master port", "")
    assert "2 ranks on 2 hosts, gloo" in value(said, "all-reduce", "")
    assert "node1 to node2: " in value(said, "slowest link", "")
    ranks = said["network"]["ranks"]
    assert {rank: ranks[rank]["host"] for rank in ranks} == {"0": "node1", "1": "node2"}
    assert all(figures["latency_seconds"] > 0 for figures in ranks.values())
    assert list(shared.iterdir()) == [shared / "corpus"]


def test_each_fault_is_found_on_the_host_that_has_it(hosts: Any, tmp_path: Path) -> None:
    """An unknown host, a taken port, and a node with another disk, clock and numpy, all at once."""
    shared, first = hosts.folder / "shared", hosts.folder / "first-on-path"
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    info = tmp_path / "numpy-1.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.20.0\n")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=shared))
    hosts.execute("node2", "mount", "-t", "tmpfs", "-o", "size=1m", "none", shared)
    hosts.execute("node2", "mount", "--bind", tmp_path, first)
    listen = f"import socket, time; s = socket.create_server(('', {PORT})); time.sleep(600)"
    holder = hosts.start(
        "node1", [sys.executable, "-c", listen], tmp_path / "log", dict(os.environ)
    )
    try:
        hostfile = hosts.hostfile(1, ["node1", "node2", "node9"])
        options = ["--config", config, "--no-network", "--share-seconds", 2]
        code, said = doctor(hosts, "--hostfile", hostfile, *options)
    finally:
        holder.kill()
        holder.wait()
        hosts.execute("node2", "umount", first)
        hosts.execute("node2", "umount", shared)
    assert code == 1
    assert states(said, "ssh") == {"node1": "ok", "node2": "ok", "node9": "fail"}
    assert "Could not resolve hostname node9" in value(said, "ssh", "node9")
    assert states(said, "packages") == {"node1": "ok", "node2": "fail"}
    assert states(said, "same numpy") == {"": "fail"}
    assert "1.20.0 on node2" in value(said, "same numpy", "")
    assert states(said, "clock") == {"node1": "ok", "node2": "fail"}
    assert value(said, "clock", "node2").startswith("+30.0")
    assert states(said, "shared directory") == {"node1": "fail", "node2": "fail"}
    assert "is tmpfs here and not the one of node1" in value(said, "shared directory", "node2")
    assert states(said, "data") == {"node1": "ok", "node2": "fail"}
    assert value(said, "config", "").startswith("fits a world of 3")
    assert states(said, "run disk")["node2"] == "fail"
    assert "checkpoints need" in value(said, "run disk", "node2")
    assert "29517 on node1: Address already in use" in value(said, "master port", "node1")


def test_a_host_that_is_cut_off_is_a_row_and_not_a_hang(hosts: Any) -> None:
    hosts.link("node2", "down")
    try:
        code, said = doctor(
            hosts, "--hostfile", hosts.hostfile(1), "--no-network", "--answer-seconds", 8
        )
    finally:
        hosts.link("node2", "up")
    assert code == 1
    assert states(said, "ssh") == {"node1": "ok", "node2": "fail"}
    assert "ssh node2 true" in value(said, "ssh", "node2")
    assert states(said, "torch") == {"node1": "ok"}
