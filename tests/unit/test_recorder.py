"""The run recorder: what is written reads back to the bit, and resuming rewrites history."""

import json
import math
from pathlib import Path

import pytest

from bitscale.errors import DataError
from bitscale.recorder import (
    Recorder,
    SpeedRecord,
    TrainRecord,
    ValidRecord,
    format_count,
    format_duration,
    format_gib,
    format_share,
    progress_line,
    read_lines,
)

pytestmark = pytest.mark.unit

SPEED = SpeedRecord(2, 21_400.0, 0.38, 0.73, 133.0, {"data/corpus": 0.25})


def open_recorder(
    run_dir: Path, *, resume_step: int | None = None, tensorboard: bool = False
) -> Recorder:
    return Recorder(
        run_dir, enabled=True, resume_step=resume_step, num_steps=10, tensorboard=tensorboard
    )


def record(step: int, loss: float = 3.0) -> TrainRecord:
    return TrainRecord(step, step * 100, loss, 3e-4, 0.1, 0.25, 0.5, 0.83)


def lines(run_dir: Path) -> list[dict[str, object]]:
    return [line for _, _, line in read_lines(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("loss", [0.1 + 0.2, 1e-45, -0.0, math.inf, -math.inf])
def test_floats_read_back_exactly(tmp_path: Path, loss: float) -> None:
    recorder = open_recorder(tmp_path)
    recorder.train([record(1, loss)])
    recorder.close()
    (line,) = lines(tmp_path)
    assert line == {"kind": "train", **record(1, loss)._asdict()}
    assert math.copysign(1, line["loss"]) == math.copysign(1, loss)  # type: ignore[arg-type]


def test_nan_stays_readable(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.train([record(1, math.nan)])
    recorder.close()
    assert math.isnan(lines(tmp_path)[0]["loss"])  # type: ignore[arg-type]


def test_every_kind_of_line(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.event(0, 0, "start", config_hash="abc")
    recorder.train([record(1), record(2)])
    recorder.speed(SPEED)
    recorder.valid(ValidRecord(2, 200, 3.1, 22.2, 1.4))
    recorder.telemetry(2, {"layers.0.q": {"zeros": 0.31, "flipped": None, "scale": 0.02}})
    recorder.close()
    recorder.close()  # a second call does nothing
    found = lines(tmp_path)
    assert [line["kind"] for line in found] == [
        *("event", "train", "train", "speed", "valid", "telemetry")
    ]
    assert found[0]["config_hash"] == "abc" and found[0]["num_steps"] == 10
    assert found[3]["epochs"] == {"data/corpus": 0.25}
    assert found[5]["layers"] == {"layers.0.q": {"zeros": 0.31, "flipped": None, "scale": 0.02}}


def test_lines_are_in_the_file_before_close(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.train([record(1)])
    assert len(lines(tmp_path)) == 1  # a killed process loses nothing
    recorder.close()


def test_resuming_drops_later_lines_and_the_transition_that_comes_again(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    for step in range(1, 6):
        recorder.train([record(step)])
        recorder.event(step, step * 100, "transition" if step == 3 else "checkpoint")
    recorder.close()
    resumed = open_recorder(tmp_path, resume_step=3)
    resumed.train([record(4, 9.0)])
    resumed.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found if line["kind"] == "train"] == [1, 2, 3, 4]
    assert found[-1]["loss"] == 9.0
    assert [line["step"] for line in found if line["kind"] == "event"] == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.train([record(1), record(2)])
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [line["step"] for line in lines(tmp_path)] == [1]
    open_recorder(tmp_path, resume_step=2).close()
    assert path.read_bytes().endswith(b"}\n")


def test_a_malformed_line_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnot json\n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object.*remove that line"):
        open_recorder(tmp_path, resume_step=2)


def test_a_fresh_run_refuses_an_existing_file(tmp_path: Path) -> None:
    open_recorder(tmp_path).close()
    with pytest.raises(DataError, match=r"already exists; resume that run or choose another"):
        open_recorder(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(DataError) as error:
        recorder.train([record(1)])
    assert str(error.value) == (
        "/dev/full: cannot be written (No space left on device); make room or mend the file "
        "system, then continue with --resume auto"
    )


def test_a_disabled_recorder_writes_nothing(tmp_path: Path) -> None:
    recorder = Recorder(
        tmp_path / "run", enabled=False, resume_step=None, num_steps=1, tensorboard=True
    )
    recorder.train([record(1)])
    recorder.speed(SPEED)
    recorder.valid(ValidRecord(1, 1, 1.0, 1.0, 1.0))
    recorder.telemetry(1, {})
    recorder.event(1, 1, "start")
    recorder.flush()
    recorder.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_last_history(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = open_recorder(tmp_path, tensorboard=True)
    recorder.train([record(step, float(step)) for step in range(1, 6)])
    recorder.telemetry(5, {"layers.0.q": {"zeros": 0.25, "flipped": None, "scale": 0.5}})
    recorder.close()
    resumed = open_recorder(tmp_path, resume_step=3, tensorboard=True)
    resumed.train([record(4, 40.0)])
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        *((1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0))
    ]
    assert "ternary/layers.0.q/flipped" not in events.Tags()["scalars"]


def test_progress_line() -> None:
    line = progress_line(
        TrainRecord(120, 1_966_080, 3.4121, 3e-4, 0.1, 0.25, 1.0, 0.83),
        SPEED._replace(step=120),
        1200,
    )
    assert line == (
        "step 120/1,200  1.97M tok  loss 3.412  lr 3.0e-04  λ .25/1  |g| 0.83  21.4k tok/s  "
        ".73 GiB  ETA 2m13s"
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_count(0), "0"),
        (format_count(950), "950"),
        (format_count(999_900), "1.00M"),
        (format_count(4e9), "4.00B"),
        (format_count(math.nan), "?"),
        (format_share(0.0), "0"),
        (format_share(0.5), ".50"),
        (format_gib(12.34), "12.3"),
        (format_duration(59.6), "1m00s"),
        (format_duration(3 * 3600 + 425), "3h07m"),
        (format_duration(52 * 3600), "2d04h"),
        (format_duration(math.inf), "?"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected


def test_metrics_are_plain_json_lines(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.train([record(1)])
    recorder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["lambda_activation"] == 0.5
