"""Laws: planted values are found again, with honest intervals; tables; recommendations."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitscale.cli.main import main
from bitscale.config import load_config, transition_step
from bitscale.errors import DataError
from bitscale.fit.estimate import fit_law
from bitscale.fit.laws import LAWS, Floats
from bitscale.fit.paired import (
    Interval,
    best_interval,
    judge_range,
    judge_sign,
    mean_interval,
)
from bitscale.fit.qat_fraction import PAPER_A, best_fraction, fit_fraction
from bitscale.fit.recommend import read_evidence, recommend, shape_for
from bitscale.fit.report import fit_table, show, write_report
from bitscale.fit.table import read_table
from bitscale.model import cost
from fit_recovery import PLANTED, fraction_table, grid, noisy

pytestmark = pytest.mark.unit

# Laws


@pytest.mark.parametrize("name", LAWS)
def test_planted_values_are_found_without_noise(name: str) -> None:
    law, columns = LAWS[name], grid(name)
    fit = fit_law(law, columns, noisy(law, columns, 0.0, 0), resamples=2)
    for key, planted in PLANTED[name].items():
        assert fit.values[key].value == pytest.approx(planted, rel=0.02), key
    assert fit.goodness.r_squared > 0.9999 and fit.goodness.residual_sd < 1e-3


def test_formulas_as_the_papers_have_them() -> None:
    """One point of each law by hand; recovery alone would find the values of any formula again."""
    n, d, p = 1e6, 2e7, 4.0
    chinchilla = 1.7 + 400 / n**0.42 + 410 / d**0.38
    share = 1 - math.exp(-p / 1.5)
    penalty = d**0.38 / n**0.42 * math.log2(32) * 0.8
    expected = {
        "chinchilla": chinchilla,
        "precision": 1.7 + 400 / (n * share) ** 0.42 + 410 / d**0.38,
        "floating-point": chinchilla + penalty / ((4 + 0.5) ** 2.0 * (3 + 0.5) ** 1.5),
        "qid": 0.2 * d**0.5 / (n**0.25 * p**3),
        "qat-loss": 2 + 100 / d**0.4 + 0.5 / 30**0.8 + 0.9 / (70**0.5 * 30**0.4),
    }
    point = {"parameters": n, "tokens": d, "weight_bits": p, "exponent_bits": 4.0,
             "mantissa_bits": 3.0, "block_size": 32.0, "s_qat": 30.0, "s_fp": 70.0}  # fmt: skip
    assert expected.keys() == LAWS.keys()
    for name, law in LAWS.items():
        columns = {key: np.array([point[key]]) for key in law.columns}
        assert law.predict(columns, PLANTED[name]) == pytest.approx(expected[name]), name


def test_intervals_hold_the_planted_values_as_often_as_they_say() -> None:
    """95% intervals of 5 values in 8 tables: 40 chances, which go together within a table."""
    law, columns = LAWS["chinchilla"], grid("chinchilla")
    hits = 0
    for seed in range(8):
        fit = fit_law(law, columns, noisy(law, columns, 0.003, seed), resamples=40)
        for key, planted in PLANTED["chinchilla"].items():
            hits += fit.values[key].low <= planted <= fit.values[key].high
        widths = {key: value.high - value.low for key, value in fit.values.items()}
        assert widths["alpha"] < 0.1 and widths["beta"] < 0.1  # nor are they merely wide
        assert fit.goodness.residual_sd == pytest.approx(0.003 * 4, rel=0.6)
    assert hits >= 32


def test_an_outlier_moves_the_fit_little() -> None:
    law, columns = LAWS["chinchilla"], grid("chinchilla")
    losses = noisy(law, columns, 0.001, 0)
    losses[7] *= 1.3  # a run that went wrong
    fit = fit_law(law, columns, losses, resamples=2)
    assert fit.values["alpha"].value == pytest.approx(0.42, abs=0.02)
    assert fit.values["beta"].value == pytest.approx(0.38, abs=0.02)


def test_seeds_are_resampled_whole() -> None:
    """What a seed shifts in all its runs makes E uncertain, not the exponents."""
    law, points = LAWS["chinchilla"], grid("chinchilla")
    columns = {name: np.tile(column, 6) for name, column in points.items()}
    seeds = np.repeat(np.arange(6), 25)
    shift = 0.03 * np.random.default_rng(1).standard_normal(6)
    losses = noisy(law, columns, 0.0005, 0) + shift[seeds]
    together = fit_law(law, columns, losses, list(seeds), resamples=60)
    apart = fit_law(law, columns, losses, None, resamples=60)
    assert together.bootstrap.startswith("seeds") and apart.bootstrap.startswith("residuals")
    wide, narrow = apart.values["alpha"], together.values["alpha"]
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    floor = together.values["E"]
    assert floor.high - floor.low > 0.012 and floor.low < 1.7 + shift.mean() < floor.high
    # Four seeds are too few, and unequal ones cannot be exchanged.
    few = fit_law(law, columns, losses, list(seeds % 4), resamples=2)
    assert few.bootstrap.startswith("residuals")


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (5, {}, "has 5 free values and the table 5 rows"),
        (25, {"tokens": np.full(25, 1e6)}, "all rows have tokens = 1e+06"),
    ],
)
def test_what_cannot_be_fitted(rows: int, columns: dict[str, Floats], message: str) -> None:
    whole = {name: column[:rows] for name, column in (grid("chinchilla") | columns).items()}
    with pytest.raises(DataError) as caught:
        fit_law(LAWS["chinchilla"], whole, np.linspace(3, 4, rows))
    assert message in str(caught.value)


# The best QAT fraction


def test_the_fraction_law_is_found_again() -> None:
    """Seeds shift all their losses by more than the effect: pairing takes that out."""
    hits = 0
    for seed in range(10):
        table = fraction_table(4.0, 0.004, seed)
        fit = fit_fraction(**table, resamples=100)
        hits += fit.a.low <= 4.0 <= fit.a.high
        assert fit.a.value == pytest.approx(4.0, abs=0.6)
        assert fit.best[100.0].value == pytest.approx(best_fraction(100.0, 4.0), abs=0.06)
    assert hits >= 7
    assert fit.bootstrap.startswith("seeds")
    assert fit.observed_best[100.0] == 0.4


@pytest.mark.parametrize("loss", [lambda f: 3 - 0.05 * f, lambda f: 3 - 0.05 * (f - 0.45) ** 2])
def test_losses_without_a_lowest_point_are_no_evidence(
    loss: Callable[[float], float], tmp_path: Path
) -> None:
    rows = [row | {"valid_loss": loss(row["qat_fraction"])} for row in sweep_rows()]
    table = write_csv(tmp_path / "table.csv", rows)
    with pytest.raises(DataError, match=r"no lowest point between the fractions 0\.1 and 0\.8"):
        fit_table(table, "qat-fraction", resamples=20)


def test_a_best_fraction_beyond_those_that_were_run_is_called_so(tmp_path: Path) -> None:
    """a = 10 at S = 25: .045, where the smallest that was run is .1."""
    rows = sweep_rows()
    for row in rows:
        s = row["tokens"] / row["parameters"] / math.log2(3) * 8
        row["valid_loss"] = 3 + 0.02 * (math.log(row["qat_fraction"]) + 10 / math.log(s)) ** 2
    report = fit_table(write_csv(tmp_path / "table.csv", rows), "qat-fraction", resamples=20)
    (warning,) = report.tree["warnings"]
    assert warning.startswith("at 25 tokens") and "0.10 to 0.80: extrapolated" in warning
    assert f"  WARNING: {warning}" in show(report)
    evidence = read_evidence(write_report(report, tmp_path)[0])
    notes = recommend(2e5, 1e6, evidence=evidence).notes
    assert any("its runs have QAT fractions of 0.10 to 0.80, this is 0.0" in n for n in notes)


def test_the_papers_law() -> None:
    """f* = exp(ln S - a / ln S) / S; it grows with S."""
    s = 100.0
    assert best_fraction(s) == pytest.approx(math.exp(math.log(s) - PAPER_A / math.log(s)) / s)
    assert best_fraction(10) < best_fraction(100) < best_fraction(1e4) < 1
    with pytest.raises(DataError, match=r"0.5 tokens per parameter-byte.*more than 1"):
        best_fraction(0.5)
    with pytest.raises(DataError, match="2 fractions in 1 budgets are too few"):
        fit_fraction(np.full(4, 30.0), np.array([0.2, 0.4, 0.2, 0.4]), np.ones(4), [0, 0, 1, 1])


# Paired comparisons


def test_interval_of_a_mean() -> None:
    """Against t(0.975, 4) = 2.776: mean .3, sd .1581, half-width .1963."""
    interval = mean_interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert interval == pytest.approx((0.3, 0.10368, 0.49632, 5), abs=1e-4)
    assert mean_interval([1.0]).low == -math.inf


@pytest.mark.parametrize(
    ("low", "high", "predicted", "verdict"),
    [
        (-0.3, -0.1, "negative", "confirmed"),
        (0.1, 0.3, "negative", "contradicted"),
        (-0.01, 0.015, "negative", "not seen"),
        (-0.01, 0.03, "negative", "underpowered"),
        (0.001, 0.3, "positive", "confirmed"),
        (-0.3, -0.001, "positive", "contradicted"),
        (-0.019, 0.019, "zero", "confirmed"),
        (0.021, 0.03, "zero", "contradicted"),
        (0.001, 0.03, "zero", "underpowered"),
        (-9.0, 0.019, "at_most", "confirmed"),
        (0.021, 0.03, "at_most", "contradicted"),
        (-9.0, 0.021, "at_most", "underpowered"),
    ],
)
def test_verdicts(low: float, high: float, predicted: str, verdict: str) -> None:
    interval = Interval((low + high) / 2, low, high, 5)
    assert judge_sign(interval, predicted, 0.02) == verdict
    assert judge_sign(interval._replace(num_seeds=2), predicted, 0.02) == "underpowered"


def test_the_best_point_and_its_range() -> None:
    positions = [0.1, 0.2, 0.4]
    sure = np.array([[3.0, 3.1, 3.2], [2.0, 2.1, 2.2], [3.0, 3.1, 3.2]])
    assert best_interval(sure, positions) == pytest.approx((0.2, 0.15, 0.3, 3))
    unsure = np.array([[2.0, 3.0, 2.4, 2.6], [2.5, 2.4, 2.6, 2.5], [3.0, 2.0, 2.6, 2.4]])
    found = best_interval(unsure, positions)
    assert (found.low, found.high) == (0.1, 0.4)
    assert judge_range(Interval(0.2, 0.2, 0.2, 5), (0.1, 0.3)) == "confirmed"
    assert judge_range(Interval(0.2, 0.1, 0.4, 5), (0.1, 0.3)) == "underpowered"
    assert judge_range(Interval(0.4, 0.4, 0.5, 5), (0.1, 0.3)) == "contradicted"
    assert judge_range(Interval(0.2, 0.2, 0.2, 2), (0.1, 0.3)) == "underpowered"


# The command


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A foreign table: three columns, a diverged run left out."""
    columns = grid("chinchilla")
    losses = noisy(LAWS["chinchilla"], columns, 0.001, 3)
    rows = [
        {"parameters": n, "tokens": d, "valid_loss": loss, "status": "finished"}
        for n, d, loss in zip(columns["parameters"], columns["tokens"], losses, strict=True)
    ]
    rows.append({"parameters": 1e6, "tokens": 2e6, "valid_loss": 99.0, "status": "diverged"})
    table = write_csv(tmp_path / "table.csv", rows)
    assert main(["fit", str(table), "--resamples", "20"]) == 0
    output = capsys.readouterr().out
    assert "L = E + A / N^alpha + B / D^beta" in output and "25 rows" in output
    assert "capacity: not fitted: law 'capacity' needs 16-bit runs and ternary" in output
    written = json.loads((tmp_path / "fits" / "chinchilla.json").read_text())
    alpha = written["values"]["alpha"]
    assert alpha["low"] <= 0.42 <= alpha["high"] and written["rows"] == 25
    assert (tmp_path / "fits" / "chinchilla.svg").read_text().startswith("<?xml")

    assert main(["fit", str(table), "--law", "kaplan"]) == 2
    assert "--law 'kaplan' is unknown; use one of chinchilla" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "none.csv")]) == 2
    assert "none.csv does not exist" in capsys.readouterr().err
    assert main(["fit", str(table), "--law", "precision"]) == 2
    assert "the table has no column 'weight_bits'" in capsys.readouterr().err
    assert main(["fit", str(table), "--where", "seed"]) == 2
    assert "--where 'seed' is not of the form COLUMN=VALUE" in capsys.readouterr().err
    assert main(["fit", str(table), "--law", "chinchilla", "--resamples", "0"]) == 2
    assert "--resamples 0 make no interval; give at least 20" in capsys.readouterr().err
    assert main(["fit", str(table), "--law", "chinchilla", "--sweep", "a"]) == 2
    assert "no finished row that was asked for" in capsys.readouterr().err
    (tmp_path / "RESULTS.parquet").write_text("no parquet")
    assert main(["fit", str(tmp_path), "--law", "chinchilla"]) == 2
    assert "is no parquet file" in capsys.readouterr().err


def sweep_rows(s_design: bool = True) -> list[dict[str, Any]]:
    """As RESULTS has them: fractions at three budgets, and widths."""
    table = fraction_table(4.0, 0.002, 0)
    parameters = 200_000
    return [
        {"sweep": "x", "label": f"{f}", "seed": int(n), "hash": f"h{i}", "status": "finished",
         "parameters": parameters, "tokens": s * parameters * math.log2(3) / 8,
         "weight_bits": math.log2(3), "qat_fraction": f, "valid_loss": loss}
        for i, (s, f, n, loss) in enumerate(
            zip(table["s"], table["fraction"], table["seeds"], table["loss"], strict=True)
        )
    ]  # fmt: skip


def test_fraction_from_a_table_and_a_recommendation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sweep_rows()
    table = write_csv(tmp_path / "table.csv", rows)
    assert main(["fit", str(table), "--law", "qat-fraction", "--resamples", "100"]) == 0
    assert "at 100 tokens per parameter-byte: best QAT fraction 0.4" in capsys.readouterr().out
    evidence = tmp_path / "fits" / "qat-fraction.json"
    out = tmp_path / "mine.yaml"
    command = ["recommend", "--params", "1e6", "--tokens", "20e6", "--out", str(out)]
    assert main([*command, "--evidence", str(evidence)]) == 0
    output = capsys.readouterr().out
    assert f"with {evidence} (90 runs) (a = 4" in output
    assert "EXTRAPOLATED: the runs behind it have 2e+05 to 2e+05 parameters" in output
    cfg = load_config(out)
    assert cfg.transition.at is not None and cfg.transition.at.fraction is not None
    # S = 20 / (log2(3) / 8) = 101: f* = exp(-4 / ln 101) = .42
    assert cfg.transition.at.fraction == pytest.approx(1 - math.exp(-4 / math.log(101)), abs=0.02)
    assert main([*command, "--evidence", str(evidence)]) == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "b.yaml"), "--evidence", str(table)]) == 2
    assert "is no fit of the QAT fraction" in capsys.readouterr().err

    # The same points twice: something else differs, which the law does not know.
    twice = [*rows, *({**row, "hash": f"{row['hash']}b", "label": "other"} for row in rows)]
    write_csv(table, twice)
    assert main(["fit", str(table), "--law", "qat-fraction"]) == 2
    message = capsys.readouterr().err
    assert "are one point to it and differ in something else" in message and "'other'" in message
    assert main(["fit", str(table), "--law", "qat-fraction", "--where", "label=0.4"]) == 2
    assert "fractions in 3 budgets are too few" in capsys.readouterr().err


def test_capacity_and_degradation_pair_what_belongs_together(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for seed in range(5):
        shift = draw.standard_normal()
        for width, parameters in ((32, 1e5), (64, 4e5), (128, 16e5)):
            for bits, share in ((16.0, 0.0), (math.log2(3), 1.0)):
                loss = 4 + shift - math.log(width) / 4 + 0.2 * share + 0.01 * draw.standard_normal()
                rows.append({"hash": f"{len(rows)}", "seed": seed, "model.d_model": width,
                             "parameters": parameters, "tokens": 1000, "weight_bits": bits,
                             "qat_fraction": share, "valid_loss": loss})  # fmt: skip
    table = write_csv(tmp_path / "table.csv", rows)
    report = fit_table(table, "capacity")
    pairs = report.tree["pairs"]
    assert [pair["width"] for pair in pairs] == [32, 64]
    for pair in pairs:
        difference = pair["difference"]
        assert difference["low"] < 0.2 - math.log(2) / 4 < difference["high"]
        assert difference["high"] - difference["low"] < 0.1
        low, high = pair["bootstrap"]
        assert difference["low"] < low < difference["value"] < high < difference["high"]
    assert report.points is not None and report.tree["rows"] == len(report.points.observed) == 10
    residuals = report.points.observed - report.points.predicted
    assert residuals.mean() == pytest.approx(np.mean([p["difference"]["value"] for p in pairs]))
    with pytest.raises(DataError, match="all rows have tokens = 1000"):
        fit_table(table, "qid")  # but the pairs were found


# Recommendations


@pytest.mark.parametrize("parameters", [1e5, 1e6, 3.5e8, 1e9, 7e9, 7e10])
def test_a_recommended_configuration_is_sound(parameters: float) -> None:
    found = recommend(parameters, 20 * parameters)
    count = cost.parameters(found.cfg.model).total
    assert count == pytest.approx(parameters, rel=0.2)
    assert cost.parameters(found.cfg.model).matrices > 0.6 * count
    expected = 1 - best_fraction(20 * parameters / (count * math.log2(3) / 8))
    assert found.cfg.transition.at is not None
    assert found.cfg.transition.at.fraction == pytest.approx(expected, abs=1e-4)
    assert found.fraction.low < found.fraction.value < found.fraction.high
    small = parameters < 86e6 or parameters > 2.2e9
    assert any(note.startswith("EXTRAPOLATED") for note in found.notes) == small
    assert transition_step(found.cfg)
    ramp = found.cfg.transition.ramp.over.fraction
    assert any(note.startswith(f"Ramp: linear over {ramp:.1%} of") for note in found.notes)


def test_recommend_refuses_what_no_rule_covers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--params", "7", "--tokens", "1e9"]) == 2
    assert "--params 7 is outside" in capsys.readouterr().err
    assert main(["recommend", "--params", "1e6", "--tokens", "10"]) == 2
    assert "--tokens 10 is too few" in capsys.readouterr().err
    assert main(["recommend", "--params", "1e9", "--tokens", "1e6"]) == 2
    assert (
        "tokens per parameter-byte: the law for the QAT fraction needs" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "inf"], "--tokens inf is more than any rule here covers; give at most 1e+16"),
        (["--tokens", "nan"], "--tokens nan is too few for any rule here; give at least 1e5"),
        (["--tokens", "1e8", "--vocab-size", "0"], "--vocab-size 0 is not positive"),
        (["--tokens", "1e8", "--seq-len", "-5"], "--seq-len -5 is not positive"),
    ],
)
def test_recommend_refuses_numbers_that_mean_nothing(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", "--params", "1e6", *options]) == 2
    assert message in capsys.readouterr().err


def test_tables_of_spreadsheets(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfparameters,tokens\r\n1,2\r\n")  # begins with a mark
    assert read_table(file) == [{"parameters": 1, "tokens": 2}]
    file.write_text("parameters,tokens\n1,2,3\n")
    with pytest.raises(DataError, match="line 2: more fields than the first line has names"):
        read_table(file)
    file.write_bytes(b"parameters,tokens\n1,\xfc\n")
    with pytest.raises(DataError, match="not readable as CSV in UTF-8"):
        read_table(file)


def test_rows_without_a_logarithm_are_refused(tmp_path: Path) -> None:
    sizes = (1e5, 2e5, 4e5, 8e5, 1e6, 2e6, 4e6)
    rows = [{"parameters": n, "tokens": 10 * n**1.5, "valid_loss": 2.0 + n**-0.3} for n in sizes]
    rows[0]["tokens"] = 0.0
    table = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=r"a row has tokens = 0, and the law takes its logarithm"):
        fit_table(table, "chinchilla", resamples=20)


def test_shapes_are_trainable() -> None:
    for parameters in np.geomspace(1e5, 1e11, 7).tolist():
        m = shape_for(parameters)
        assert m.d_model % m.num_heads == 0 and m.num_heads % (m.num_kv_heads or 1) == 0
        assert m.d_ff % 32 == 0 and m.vocab_size
