"""When a supervised run goes on, with whom, and when it is given up: attempts by script."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitscale.config import load_config
from bitscale.hostfile import Host
from bitscale.supervisor import loop
from bitscale.supervisor.attempt import Bounds, Failure
from bitscale.supervisor.link import SshOptions
from bitscale.supervisor.loop import Options, Supervisor

pytestmark = pytest.mark.unit

CONFIG = """\
run: {{dir: {run_dir}}}
model: {{num_layers: 2, d_model: 32, num_heads: 2, d_ff: 64}}
data: {{corpora: [{{path: corpus}}], seq_len: 32}}
train: {{steps: 10, global_batch_size: 12, micro_batch_size: 1}}
optim: {{lr: 1e-3}}
"""
KILLED = Failure("rank", "rank 1 on b was killed", host="b", rank=1, exit_code=-9)
DONE = Failure("done", "every rank has ended with 0", exit_code=0)


class Scripted(Supervisor):
    """A supervisor whose attempts end as a list says."""

    def script(self, *ends: Failure, checkpoints: bool = False) -> "Scripted":
        self.ends = list(ends)
        self.checkpoints = checkpoints
        self.hosts_before: list[set[str]] = []
        return self

    def _attempt(self, stop_requested: Callable[[], bool]) -> Failure:
        self.hosts_before.append({h.name for h in self.options.hosts} - self.left_out)
        if self.checkpoints:
            latest = self.run_dir / "checkpoints" / "latest"
            latest.parent.mkdir(exist_ok=True)
            latest.write_text(f"step-{len(self.hosts_before):08d}\n")
        return self.ends.pop(0)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    monkeypatch.setattr(loop, "_MAX_PAUSE_SECONDS", 0.0)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(run_dir=tmp_path / "run"))
    (tmp_path / "run").mkdir()
    options = Options(
        hosts=[Host("a", 2), Host("b", 2), Host("c", 2)],
        train_arguments=[str(path)],
        ssh=SshOptions(),
        bounds=Bounds(60, 60, 60),
        max_restarts=2,
    )
    return Scripted(load_config(str(path), []), options, tmp_path / "run")


def never() -> bool:
    return False


def test_restarts_without_a_new_checkpoint_are_counted(
    supervisor: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = KILLED._replace(host="a")
    assert supervisor.script(KILLED, elsewhere, KILLED, DONE).run(never) == 1
    assert supervisor.ends == [DONE]
    assert "given up: 2 restarts brought no new checkpoint" in capsys.readouterr().out
    lines = [json.loads(line) for line in supervisor.record.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["end of attempt"] * 3 + ["end"]
    assert lines[0]["text"] == "rank 1 on b was killed" and lines[-1]["exit_code"] == 1


def test_a_new_checkpoint_begins_the_count_again(supervisor: Scripted) -> None:
    ends = [KILLED._replace(host="") for _ in range(9)]
    assert supervisor.script(*ends, DONE, checkpoints=True).run(never) == 0


def test_a_host_that_fails_twice_in_a_row_is_left_out(supervisor: Scripted) -> None:
    assert supervisor.script(KILLED, KILLED, DONE).run(never) == 0
    assert supervisor.hosts_before == [{"a", "b", "c"}, {"a", "b", "c"}, {"a", "c"}]


def test_a_host_without_which_nothing_runs_stays(supervisor: Scripted) -> None:
    supervisor.options.hosts[:] = [Host("b", 2)]
    assert supervisor.script(KILLED, KILLED, DONE).run(never) == 0
    assert supervisor.hosts_before[-1] == {"b"}


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (Failure("stopped", "every rank has saved and stopped", exit_code=75), 75),
        (Failure("stopped", "rank 1 on b did not end", exit_code=1), 1),
        (Failure("bad input", "rank 0 on a ended with exit code 2"), 2),
    ],
)
def test_what_is_not_tried_again(supervisor: Scripted, end: Failure, code: int) -> None:
    assert supervisor.script(end).run(never) == code


def test_a_signal_between_attempts_ends_it(supervisor: Scripted) -> None:
    assert supervisor.script(KILLED).run(lambda: True) == 1


def test_a_run_that_has_begun_continues_from_its_own(supervisor: Scripted) -> None:
    trunk = supervisor.options.__class__(
        **{**vars(supervisor.options), "resume": "runs/trunk", "min_hosts": 1}
    )
    supervisor.options = trunk
    assert supervisor.command()[-2:] == ["--resume", "runs/trunk"]
    metrics = supervisor.run_dir / "metrics.jsonl"
    metrics.touch()  # killed before its first line, which would say what it began from
    assert "auto" not in supervisor.command()
    metrics.write_text('{"kind": "event", "step": 0, "event": "start"}\n')
    assert supervisor.command()[-2:] == ["--resume", "auto"]
