"""The allow list of the variables that other hosts are given."""

import os
import shlex
import subprocess

import pytest

from bitscale.cli.main import main
from bitscale.environment import exported, is_allowed
from bitscale.errors import ConfigError

pytestmark = pytest.mark.unit


def test_secrets_and_unknown_variables_stay_here() -> None:
    environ = {
        "NCCL_SOCKET_IFNAME": "eth0",
        "PATH": "/opt/bitscale/bin:/usr/bin",
        "WANDB_API_KEY": "0123",
        "HF_TOKEN": "hf_x",
        "AWS_SECRET_ACCESS_KEY": "s",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "HOME": "/root",
        "TORCH_HUB_TOKEN": "t",  # a pattern would let it pass
        "BITSCALE_S3_PASSWORD": "p",
        "UCX_ACCESS_KEY": "u",
    }
    assert exported(environ) == {
        "NCCL_SOCKET_IFNAME": "eth0",
        "PATH": "/opt/bitscale/bin:/usr/bin",
    }


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT"])
def test_what_ranks_need_is_passed(name: str) -> None:
    assert is_allowed(name)


@pytest.mark.parametrize(
    "value", ["a;id", "$(id)", "`id`", "a b", "a\nMASTER_PORT=1", "~/x", "a'b", "a&b", "a|b", "*"]
)
def test_a_value_that_a_shell_would_read_otherwise_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        exported({"NCCL_DEBUG_FILE": value})
    assert f"NCCL_DEBUG_FILE={value!r} cannot be handed to other hosts" in str(caught.value)
    assert "unset it" in str(caught.value)


def test_a_shell_reads_every_character_that_is_let_through() -> None:
    value = "aZ09_@%+=:,./^-"
    assert exported({"NCCL_DEBUG_FILE": value}) == {"NCCL_DEBUG_FILE": value}
    assert shlex.quote(value.replace("^", "")) == value.replace("^", "")
    # As DeepSpeed's pdsh launcher writes it.
    script = f'export NCCL_DEBUG_FILE={value}; printf %s "$NCCL_DEBUG_FILE"'
    for shell in ("sh", "bash"):
        done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == value


def test_the_command_prints_an_environment_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if is_allowed(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert main(["doctor", "--print-environment"]) == 0
    assert capsys.readouterr().out == "GLOO_SOCKET_IFNAME=eth1\n"
