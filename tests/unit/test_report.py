"""The report: figures on curves with a planted spike, and the three files that it writes."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitscale.errors import DataError
from bitscale.recorder import Recorder, SpeedRecord, TrainRecord, ValidRecord
from bitscale.report import console_table, default_out_dir, write_report
from bitscale.report.read import read_run
from bitscale.report.spike import find_transition, measure_spike
from bitscale.report.summary import Summary, summarize

pytestmark = pytest.mark.unit

STEPS, SWITCH, TOKENS = 400, 200, 100  # TOKENS a step


def write_run(
    run_dir: Path,
    *,
    bump: float = 0.5,
    lasts: int = 50,
    switch: int | None = SWITCH,
    event: bool = True,
    floor: float = 0.0,
) -> Path:
    """Loss 3.0, from `switch` on 3.0 + bump for `lasts` steps, then 3.0 + floor."""
    recorder = Recorder(run_dir, enabled=True, resume_step=None, num_steps=STEPS, tensorboard=False)
    recorder.event(0, 0, "start", config_hash="9f3b0c5d1e77")
    for step in range(1, STEPS + 1):
        since = -1 if switch is None else step - 1 - switch
        if since == 0 and event:
            recorder.event(step - 1, (step - 1) * TOKENS, "transition")
        loss = 3.0 if since < 0 else 3.0 + (bump if since < lasts else floor)
        strength = float(since >= 0)
        recorder.train([TrainRecord(step, step * TOKENS, loss, 1e-3, 0.1, strength, strength, 0.5)])
        if step % 100 == 0:
            recorder.speed(SpeedRecord(step, 2000.0, 0.05, 0.5, 1.0, {"c": 1.0}))
            recorder.valid(ValidRecord(step, step * TOKENS, loss + 0.1, math.exp(loss), 1.5))
            recorder.telemetry(step, {"layers.0.q": {"zeros": 0.3, "flipped": 0.1, "scale": 0.1}})
    recorder.event(STEPS, STEPS * TOKENS, "finished")
    recorder.close()
    return run_dir


def summary_of(run_dir: Path) -> Summary:
    return summarize(read_run(run_dir / "metrics.jsonl", "run"))


def test_a_planted_spike_is_measured(tmp_path: Path) -> None:
    summary = summary_of(write_run(tmp_path / "run"))
    assert summary.transition_step == SWITCH + 1 and summary.transition_tokens == SWITCH * TOKENS
    assert summary.pre_transition_loss == pytest.approx(3.0)
    assert summary.spike_height == pytest.approx(0.5)
    # 50 steps of spike, then the window of 4 steps has to leave it.
    assert summary.tokens_to_recover == (50 + 4) * TOKENS
    assert summary.finished and summary.steps == summary.planned_steps == STEPS
    assert summary.final_train_loss == pytest.approx(3.0)
    assert summary.median_tokens_per_second == 2000.0


def test_a_finished_run_that_is_made_longer_is_not_finished(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    longer = Recorder(
        run_dir, enabled=True, resume_step=STEPS, num_steps=2 * STEPS, tensorboard=False
    )
    longer.event(STEPS, STEPS * TOKENS, "resume")
    longer.close()
    summary = summary_of(run_dir)
    assert (summary.finished, summary.planned_steps) == (False, 2 * STEPS)


def test_no_spike_is_zero_and_a_lasting_one_is_not_recovered(tmp_path: Path) -> None:
    flat = summary_of(write_run(tmp_path / "flat", bump=-0.1, floor=-0.1))
    assert flat.spike_height == 0 and flat.tokens_to_recover == 0
    lasting = summary_of(write_run(tmp_path / "lasting", floor=0.2))
    assert lasting.spike_height == pytest.approx(0.5) and lasting.tokens_to_recover is None
    assert "not in run" in console_table([lasting])


def test_the_transition_without_its_event_is_the_first_quantized_step(tmp_path: Path) -> None:
    with_event = summary_of(write_run(tmp_path / "with"))
    without = summary_of(write_run(tmp_path / "without", event=False))
    assert without.transition_step == with_event.transition_step
    assert without.spike_height == with_event.spike_height


@pytest.mark.parametrize("switch", [None, 0])
def test_sixteen_bit_and_ternary_runs_have_no_transition(
    tmp_path: Path, switch: int | None
) -> None:
    summary = summary_of(write_run(tmp_path / "run", switch=switch))
    assert summary.transition_step is None and summary.spike_height is None


def test_nan_losses_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    broken = path.read_text().replace('"loss": 3.5', '"loss": NaN', 3)
    path.write_text(broken)
    run = read_run(path, "run")
    transition = find_transition(run)
    assert transition is not None
    spike = measure_spike(run, transition, STEPS)
    assert spike is not None and spike.height == pytest.approx(0.5)
    assert summarize(run).num_nonfinite_steps == 3


class _Page(HTMLParser):
    """Collects the tags left open and every address in an HTML page."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "col"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_three_files(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", switch=None)]
    out = tmp_path / "report"
    summaries = write_report(runs, out, names=["<b>switched</b>", "16 bit"])

    figures = json.loads((out / "summary.json").read_text())["runs"]
    assert figures == [summary._asdict() for summary in summaries]

    page = _Page()
    page.feed((out / "report.html").read_text())
    assert page.open == []
    # Only places within the page and data in it: it can be mailed.
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "<b>switched</b>" in page.text  # as text: escaped in the source
    assert "0.500" in page.text and "prefers-color-scheme" in (out / "report.html").read_text()

    from matplotlib.image import imread

    pixels = imread(out / "report.png")
    assert pixels.shape[:2] == (900, 1200) and pixels.std() > 0.05


@pytest.mark.parametrize("x", ["tokens", "steps"])
def test_axes_and_smoothing(tmp_path: Path, x: str) -> None:
    run = write_run(tmp_path / "a")
    write_report([run], tmp_path / "out", x=x, smooth=1)
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_where_a_report_goes(tmp_path: Path) -> None:
    assert default_out_dir([tmp_path / "run"]) == tmp_path / "run" / "report"
    assert default_out_dir([tmp_path / "run" / "metrics.jsonl"]) == tmp_path / "run" / "report"
    assert default_out_dir([tmp_path / "a", tmp_path / "b"]) == Path("report")


def test_bad_input_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    started = tmp_path / "started"
    Recorder(started, enabled=True, resume_step=None, num_steps=1, tensorboard=False).close()
    cases = [
        ([tmp_path / "gone"], {}, r"gone does not exist; give a run directory"),
        ([tmp_path / "empty"], {}, r"empty has no metrics\.jsonl; is it a run directory"),
        ([started], {}, r"has no training step yet; wait for the first logging interval"),
        ([run], {"names": ["a", "b"]}, r"--names gives 2 names for 1 runs; give one each"),
        ([run, run], {}, r"two runs are named 'a'; tell them apart with --names"),
        ([run], {"smooth": 0}, r"--smooth 0 is no number of steps; give 1 \(raw\) or more"),
    ]
    for paths, options, message in cases:
        with pytest.raises(DataError, match=message):
            write_report(paths, out, **options)  # type: ignore[arg-type]
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "step": 401, "tokens": 1}', r":\d+: train line without 'loss'"),
        ('{"kind": "valid", "step": 1, "tokens": "x"}', r":\d+: bad valid line: 'x' is not a numb"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        read_run(path, "a")


def test_two_histories_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    first = next(text for text in path.read_text().splitlines() if '"train"' in text)
    with path.open("a") as file:
        file.write(first + "\n")
    with pytest.raises(DataError, match="does not follow step 400; two runs wrote to this file"):
        read_run(path, "a")
