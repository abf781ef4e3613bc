"""bitscale.torchrun beside stand-ins of torchrun's main thread that hang, wait, or work."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

# The functions that the main thread is in belong to modules named as those of torch's rendezvous.
_PROGRAM = """
import subprocess, sys, threading, time
from bitscale import torchrun

locked = threading.Lock()
locked.acquire()

def rank(seconds):
    return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])

def rendezvous(code):
    made = {"__name__": "torch.distributed.elastic.rendezvous.any", "time": time, "locked": locked}
    exec(f"def call():\\n {code}", made)
    return made["call"]

stuck = rendezvous("locked.acquire(timeout=1.2)")
short = rendezvous("time.sleep(0.05)")
threading.Thread(target=torchrun.watch, args=(0.4, 0.02), daemon=True).start()
"""


def start(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"{_PROGRAM}{program}\nprint('went on')"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_lost_in_the_rendezvous_with_a_rank_that_ended() -> None:
    """It ends with 1, says why, and has ended the other rank."""
    process = start("dead, alive = rank(0), rank(600)\nprint(alive.pid, flush=True)\nstuck()")
    said, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert "torchrun has not heard from the store of its rendezvous" in error
    assert "continue with --resume auto" in error
    (pid,) = said.split()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_lost_in_the_rendezvous_after_the_last_rank() -> None:
    """As it is when the agent has seen the end of all, and tells the store so."""
    process = start("rank(0.2).wait()\nstuck()")
    said, error = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "ranks of this host have ended" in error


def test_all_else_goes_on() -> None:
    programs = {
        "not in the rendezvous": "dead = rank(0)\nlocked.acquire(timeout=1.2)",
        "waits for hosts": "dead = rank(0)\nfor _ in range(25): short()",
        "waits for the head": "stuck()",
        "ranks train": "alive = rank(600)\nstuck()\nalive.kill()",
    }
    processes = {name: start(program) for name, program in programs.items()}
    for name, process in processes.items():
        said, error = process.communicate(timeout=60)
        assert (process.returncode, said, error) == (0, "went on\n", ""), name
