"""What a sweep makes of its runs: rows, verdicts, the page; command lists and Slurm jobs."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from pretended_runs import CLAIMS, Executor, Make, run_all, schedule_of, valid_loss

from bitscale.cli.main import main
from bitscale.config import parse_config
from bitscale.errors import ConfigError
from bitscale.fit.table import Row, read_table
from bitscale.sweep import campaign as campaigns
from bitscale.sweep.campaign import Campaign
from bitscale.sweep.claims import _line, write_claims
from bitscale.sweep.commands import command_list
from bitscale.sweep.progress import Progress
from bitscale.sweep.results import measure_cells, write_table
from bitscale.sweep.schedule import Schedule
from bitscale.sweep.slurm import make_executor, run_slurm

pytestmark = pytest.mark.unit


@pytest.fixture
def finished(make: Make) -> tuple[Campaign, list[Row]]:
    campaign = make(claims=CLAIMS, seeds={"values": [0, 1, 2, 3, 4]})
    run_all(schedule_of(campaign))
    return campaign, campaigns.collect(campaign)


def test_rows(finished: tuple[Campaign, list[Row]]) -> None:
    campaign, rows = finished
    by_point = {(row["label"], row["seed"]): row for row in rows}
    assert len(by_point) == 20
    early, sixteen = by_point["early", 2], by_point["sixteen", 2]
    assert early["valid_loss"] == valid_loss(10, 2) and early["trunk"] == sixteen["hash"]
    assert (early["transition_fraction"], early["qat_fraction"]) == (0.25, 0.75)
    assert early["weight_bits"] == pytest.approx(1.585, abs=1e-3) and sixteen["weight_bits"] == 16
    # Steps 11 to 14 lie .4 above: the trunk's steps before are part of the fork's history.
    assert early["spike_height"] == pytest.approx(0.4 - 0.01 * (12.5 - 6.5), abs=0.011)
    assert early["peak_excess"] == pytest.approx(0.4) and early["end_excess"] == pytest.approx(0)
    assert early["mean_excess"] == pytest.approx(0.4 * 4 / 30)
    assert by_point["scratch", 0]["peak_excess"] is None and sixteen["spike_height"] is None
    assert early["train_seconds"] == 15.0 and sixteen["train_seconds"] == 20.0
    assert (early["commit"], early["steps"], early["tokens"]) == ("abc", 40, 40 * 128)
    stored = read_table(campaign.store.root)
    assert stored == rows and read_table(campaign.store.root / "RESULTS.csv") == rows


def test_rows_of_other_sweeps_stay_in_the_table(
    finished: tuple[Campaign, list[Row]], tmp_path: Path
) -> None:
    _, rows = finished
    content = (tmp_path / "try.yaml").read_text()
    (tmp_path / "other.yaml").write_text(content.replace("early", "soon"))
    other = campaigns.plan([tmp_path / "other.yaml"], [], tmp_path / "out")
    assert schedule_of(other).remaining() == []  # the same runs
    campaigns.collect(other)
    stored = read_table(tmp_path / "out")
    assert len(stored) == 40 and {row["sweep"] for row in stored} == {"try", "other"}
    assert [row for row in stored if row["sweep"] == "try"] == rows


def test_columns_have_one_type(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": True, "c": None, "d": 1}, {"a": 0.5, "b": "x", "c": None, "d": None}]
    write_table(rows, tmp_path)
    assert read_table(tmp_path) == [
        {"a": 1.0, "b": "True", "c": None, "d": 1},
        {"a": 0.5, "b": "x", "c": None, "d": None},
    ]


# Verdicts


def test_verdicts_and_the_page(
    finished: tuple[Campaign, list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign, rows = finished
    figures, said = tmp_path / "docs" / "images", list[str]()
    judgements = campaigns.report(campaign, rows, figures, said.append)
    assert [judgement.verdict for judgement in judgements] == [
        *("confirmed", "confirmed", "not seen", "confirmed")
    ]
    better, same, _, when = (judgement.interval for judgement in judgements)
    assert better.value == pytest.approx(-0.2, abs=0.01)  # though seeds lie .5 apart
    assert better.high - better.low < 0.05 and same.num_seeds == 5
    assert (when.value, when.low, when.high) == (0.25, 0.125, 0.375)
    assert any(line.startswith("  Early beats scratch: confirmed (-0.") for line in said)
    assert (figures / "try.svg").read_text().startswith("<?xml")

    page = tmp_path / "docs" / "results" / "claims.md"
    write_claims(page, campaign, rows, judgements, figures)
    text = page.read_text()
    assert "| Early beats scratch | a paper | below 0 | valid_loss -0." in text
    assert "| Late is early | us | within ±0.05 |" in text
    assert re.search(r"models of \S+k to \S+k parameters", text)
    assert "| Early is best | us | 0.1 to 0.4 | transition_fraction +0.25" in text
    assert "![try](../images/try.svg)" in text and "20 finished cells of 20" in text
    # The command does the same, and trains nothing.
    arguments = ["sweep", str(tmp_path / "try.yaml"), "--out", str(tmp_path / "out"), "--report"]
    assert main([*arguments, "--claims", str(page)]) == 0
    assert "20 of 20 cells" in capsys.readouterr().out
    # From the page's table alone, with all runs gone, the page and the figure come out the same.
    shutil.rmtree(tmp_path / "out")
    figure = (figures / "try.svg").read_bytes()
    arguments += ["--figures", str(figures), "--claims", str(page)]
    assert main([*arguments, "--table", str(page.with_suffix(".csv"))]) == 0
    assert page.read_text() == text and (figures / "try.svg").read_bytes() == figure
    assert not (tmp_path / "out").exists()
    assert main([*arguments[:-5], "--table", str(page.with_suffix(".csv"))]) == 2
    assert "--table is for --report" in capsys.readouterr().err


def test_seeds_that_are_missing_or_diverged_leave_no_verdict(
    finished: tuple[Campaign, list[Row]],
) -> None:
    campaign, rows = finished
    four = campaigns.judge_all(campaign, [row for row in rows if row["seed"] != 3])
    assert {(j.verdict, len(j.seeds)) for j in four} == {("underpowered", 4)}
    # Early is better where scratch did not diverge: those seeds alone would confirm it.
    lost = [
        {**row, "status": "diverged", "valid_loss": None}
        if (row["label"], row["seed"]) == ("scratch", 3)
        else row
        for row in [*rows, *({**row, "seed": 9} for row in rows if row["seed"] == 0)]
    ]
    better, same, *_ = campaigns.judge_all(campaign, lost)
    assert (better.verdict, len(better.seeds)) == ("underpowered", 5) and better.interval.high < 0
    assert (same.verdict, len(same.seeds)) == ("confirmed", 6)
    assert better.sentence.endswith("5 seeds, 95%; a cell diverged with seed 3).")
    assert "**underpowered** (a cell diverged with seed 3) |" in _line(better)


def test_a_best_point_at_the_edge_says_so(finished: tuple[Campaign, list[Row]]) -> None:
    campaign, rows = finished
    for label, place, beyond in (("late", 0.5, True), ("scratch", 0.0, False)):
        moved = [
            {**row, "valid_loss": row["valid_loss"] - 0.4 * (row["label"] == label)} for row in rows
        ]
        when = campaigns.judge_all(campaign, moved)[-1]
        assert when.interval.value == place
        assert ("the best may lie beyond" in when.sentence) == beyond
    assert campaigns.judge_all(campaign, rows)[-1].note == ""


def test_claims_wait_for_their_cells(make: Make, tmp_path: Path) -> None:
    campaign = make(claims=CLAIMS)
    schedule = schedule_of(campaign)
    rows = measure_cells(campaign.cells, schedule.runs, campaign.store)
    judgements = campaigns.judge_all(campaign, rows)
    assert {judgement.verdict for judgement in judgements} == {"underpowered"}
    assert "no seed has all its cells" in judgements[0].sentence
    write_claims(tmp_path / "page.md", campaign, rows, judgements, tmp_path)
    assert "no data" in (tmp_path / "page.md").read_text()
    wrong = make(claims=[{**CLAIMS[0], "measure": "los"}])
    with pytest.raises(ConfigError, match="'los' is no measure; use one of valid_loss"):
        campaigns.judge_all(wrong, rows)


# Other back ends


def test_printed_commands_come_in_an_order_that_works(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = make(seeds={"values": [0]})
    lines = command_list(schedule_of(campaign))
    trunk = campaign.cells[0].key
    assert len(lines) == 4 and f"configs/{trunk}.yaml --resume auto" in lines[0]
    resumes = [line.split("--resume ")[1] for line in lines[2:]]
    assert [Path(path).name for path in resumes] == ["step-00000010", "step-00000020"]
    assert all(f"runs/{trunk}/checkpoints" in path for path in resumes)
    written = parse_config(yaml.safe_load((tmp_path / f"out/configs/{trunk}.yaml").read_text()), "")
    assert written.checkpoint.at == (10, 20)
    arguments = ["sweep", str(tmp_path / "try.yaml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--backend", "print"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main([*arguments, "--dry-run"]) == 0
    assert f"from {trunk} at step 10 to 40" in capsys.readouterr().out


def test_slurm_submits_trunks_first(make: Make) -> None:
    campaign, executor, lines = make(), Executor(), list[str]()
    schedule = schedule_of(campaign)
    progress = Progress(schedule, campaign.names, write=lines.append)
    assert run_slurm(schedule, progress, executor, poll_seconds=0.0)
    assert executor.arrays == [8, 8]  # four trunks and four from scratch, then the forks
    assert len(schedule.done) == 16 and lines[0] == "submitted 8 jobs: 1 to 8"


def test_a_lost_job_is_submitted_again(make: Make) -> None:
    campaign, executor = make(seeds={"values": [0]}), Executor()
    schedule = Schedule(campaign.runs, campaign.store, {"lost": True})
    assert run_slurm(schedule, Progress(schedule, campaign.names), executor, poll_seconds=0.0)
    assert executor.arrays == [2, 2] and len(schedule.failed) == 2


def test_slurm_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match="--backend slurm"):
        make_executor(tmp_path, "local", {"no_such_parameter": 1})
    assert make_executor(tmp_path, "local", {"timeout_min": 5}) is not None


def test_wrong_slurm_parameter(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    arguments = ["sweep", str(tmp_path / "try.yaml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--backend", "slurm", "--slurm", "timeout"]) == 2
    assert "--slurm 'timeout' is not of the form NAME=VALUE" in capsys.readouterr().err
    assert main([*arguments, "--workers", "0"]) == 2
    assert "--workers 0 trains nothing; give 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--disk-gib", "0"])
    assert "--disk-gib: 0 is not above 0" in capsys.readouterr().err
