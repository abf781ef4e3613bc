"""What models score: log-likelihoods and texts against plain sums, comparisons against formulas."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import export_packed, open_source
from bitscale.data.batches import EvaluationBatch
from bitscale.data.tokenizer import load_tokenizer, train_tokenizer
from bitscale.errors import CheckpointError, ConfigError, DataError
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from bitscale.scoring.held_out import (
    HeldOut,
    Text,
    corpus_texts,
    ratio_stderr,
    score_held_out,
    text_files,
)
from bitscale.scoring.model import (
    Continuation,
    ScoredModel,
    open_model,
    open_ranks,
    open_tokenizer,
)
from scored_models import SEQ_LEN, scored_checkpoint

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
STRENGTHS = {"16 bit": SIXTEEN_BIT, "ramp": Strength(0.4, 0.7), "ternary": TERNARY}


@pytest.fixture(scope="module")
def model_at(
    make_config: MakeConfig, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """model_at(name of a λ, or packed) -> its path."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        out = root / name.replace(" ", "-")
        if out.exists():
            return out
        if name == "packed":
            export_packed(open_source(make("ternary")), out)
            return out
        return scored_checkpoint(make_config, out, corpus, strength=STRENGTHS[name])

    return make


def opened(path: Path) -> ScoredModel:
    return open_model(path, open_ranks("cpu", 1))


def wanted() -> list[Continuation]:
    """Of all lengths, some with the same input but for the last token, some too long."""
    draw = np.random.default_rng(3)
    found = [
        Continuation(draw.integers(300, size=n).tolist(), draw.integers(300, size=m).tolist())
        for n, m in [(1, 1), (5, 3), (20, 4), (SEQ_LEN, 2), (2 * SEQ_LEN, 7), (1, SEQ_LEN)]
    ]
    found += [Continuation([7, 8, 9], [10, last]) for last in (3, 4, 5)]
    return [*found, Continuation([1, 2], [])]


def by_itself(scored: ScoredModel, each: Continuation) -> tuple[float, bool]:
    """One sequence, one token after the other, in float64."""
    ids = [*each.context_ids, *each.target_ids][-(SEQ_LEN + 1) :]
    with torch.no_grad():
        log_p = scored.model.logits(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    first = len(ids) - 1 - len(each.target_ids)
    places = range(first, len(ids) - 1)
    nats = sum(float(log_p[place, ids[place + 1]]) for place in places)
    return nats, all(int(log_p[place].argmax()) == ids[place + 1] for place in places)


@pytest.mark.parametrize("name", [*STRENGTHS, "packed"])
def test_log_likelihoods_are_those_of_each_sequence_by_itself(
    name: str, model_at: Callable[[str], Path]
) -> None:
    scored = opened(model_at(name))
    steps: list[int] = []
    found = scored.log_likelihoods(wanted(), batch_size=3, on_batch=steps.append)
    assert sum(steps) == len(wanted())
    for each, score in zip(wanted(), found, strict=True):
        nats, is_greedy = by_itself(scored, each)
        assert score.nats == pytest.approx(nats, abs=2e-4)
        assert score.is_greedy == is_greedy


def test_a_packed_export_scores_what_its_checkpoint_scores(
    model_at: Callable[[str], Path],
) -> None:
    its, ours = (opened(model_at(n)).log_likelihoods(wanted(), batch_size=4)
                 for n in ("ternary", "packed"))  # fmt: skip
    assert ours == its


def test_continuations_with_the_same_input_share_a_forward_pass(
    model_at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = opened(model_at("16 bit"))
    rows: list[int] = []
    plain = ScoredModel._logits

    def counting(self: ScoredModel, batch: list[list[int]]) -> torch.Tensor:
        rows.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(ScoredModel, "_logits", counting)
    scored.log_likelihoods([Continuation([1, 2], [n]) for n in range(5)], batch_size=8)
    assert rows == [1]


def test_a_continuation_longer_than_the_sequences_is_refused(
    model_at: Callable[[str], Path],
) -> None:
    too_long = Continuation([1], [2] * (SEQ_LEN + 1))
    with pytest.raises(DataError, match=r"of 49 tokens does not fit .* of 48 .*--seq-len"):
        opened(model_at("16 bit")).log_likelihoods([too_long], batch_size=1)
    longer = open_model(model_at("16 bit"), open_ranks("cpu", 1), seq_len=SEQ_LEN + 1)
    assert longer.log_likelihoods([too_long], batch_size=1)[0].nats < 0


def test_generated_tokens_are_the_likeliest_ones(model_at: Callable[[str], Path]) -> None:
    scored = opened(model_at("ternary"))
    prompts = [[5, 6, 7], [9], list(range(40))]
    found = scored.generate(prompts, max_new_tokens=6, is_finished=lambda ids: False, batch_size=2)
    for prompt, new in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(scored.model.logits(torch.tensor([ids]))[0, -1].argmax()))
        assert new == ids[len(prompt) :]
    stopped = scored.generate(
        prompts, max_new_tokens=6, is_finished=lambda ids: ids[-1] == found[0][1], batch_size=3
    )
    assert stopped[0] == found[0][: found[0].index(found[0][1]) + 1]
    # A full sequence ends it, and a prompt that leaves no room loses its beginning.
    (long,) = scored.generate(
        [list(range(100))], max_new_tokens=20, is_finished=lambda ids: False, batch_size=1
    )
    assert len(long) == 20
    (full,) = scored.generate(
        [[1]], max_new_tokens=10 * SEQ_LEN, is_finished=lambda ids: False, batch_size=1
    )
    assert len(full) == SEQ_LEN


# --- Text ---


def score(scored: ScoredModel, texts: list[Text], **changes: int | None) -> HeldOut:
    options = {"seq_len": SEQ_LEN, "stride": None, "batch_size": 4, "limit": None} | changes
    return score_held_out(scored, texts, tokenizer_sha256="t", **options)  # type: ignore[arg-type]


def test_a_text_with_a_stride_of_one_is_scored_token_by_token(
    model_at: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    """Each token after the SEQ_LEN tokens before it, bits by the bytes of the file."""
    scored, tokenizer = opened(model_at("ternary")), load_tokenizer(corpus)
    file = tmp_path / "text.txt"
    file.write_text("river tree moves holds under bright slow never always and " * 3 + "é")
    ids = [tokenizer.eos_id, *tokenizer.encode(file.read_text())]
    assert len(ids) > SEQ_LEN + 10
    nats = []
    for end in range(1, len(ids)):
        context = ids[max(0, end - SEQ_LEN) : end]
        nats.append(-by_itself(scored, Continuation(context, [ids[end]]))[0])
    with text_files([file], tokenizer) as texts:
        found = score(scored, texts, stride=1)
        apart = score(scored, texts)
    assert found.num_tokens == apart.num_tokens == len(ids) - 1
    assert found.nats_per_token == pytest.approx(np.mean(nats), rel=1e-5)
    bits = sum(nats) / math.log(2) / len(file.read_bytes())
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    # Windows that do not overlap leave some tokens with little before them.
    assert abs(apart.nats_per_token - found.nats_per_token) > 1e-4


def test_the_limit_is_of_windows_and_of_their_bytes(
    model_at: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("river tree moves holds under bright slow " * 40)
    scored = opened(model_at("16 bit"))
    with text_files([file], load_tokenizer(corpus)) as texts:
        whole, part = score(scored, texts), score(scored, texts, limit=3, batch_size=2)
    assert len(part.nats_W) == 3
    assert np.allclose(part.nats_W, whole.nats_W[:3], rtol=1e-6)
    assert part.num_tokens == 3 * SEQ_LEN
    assert part.num_bytes / part.num_tokens == pytest.approx(whole.num_bytes / whole.num_tokens)


def test_standard_errors_over_windows() -> None:
    """Equal windows: of a mean. Unequal ones: as simulated from a known population."""
    draw = np.random.default_rng(0)
    sums = draw.normal(3.0, 0.5, size=200) * 10
    expected = sums.std(ddof=1) / 10 / math.sqrt(200)
    assert ratio_stderr(sums, np.full(200, 10.0)) == pytest.approx(expected)
    assert math.isnan(ratio_stderr(sums[:1], np.array([10.0])))
    ratios, stderrs = [], []
    for _ in range(600):
        counts = draw.integers(5, 50, size=80).astype(float)
        sums = counts * draw.normal(3.0, 0.5, size=80)
        ratios.append(sums.sum() / counts.sum())
        stderrs.append(ratio_stderr(sums, counts))
    assert np.mean(stderrs) == pytest.approx(np.std(ratios), rel=0.1)


def test_differences_are_paired_window_by_window() -> None:
    draw = np.random.default_rng(1)
    nats_W, targets_W = draw.normal(30.0, 9.0, size=50), np.full(50, 10.0)
    gain_W = draw.normal(1.0, 0.1, size=50)
    first = HeldOut(nats_W, targets_W, 1000.0, "t")
    other = HeldOut(nats_W + gain_W, targets_W, 1000.0, "t")
    found = other.difference(first)
    assert found is not None
    assert found[0] == pytest.approx(gain_W.mean() / 10)
    assert found[1] == pytest.approx(gain_W.std(ddof=1) / 10 / math.sqrt(50))
    assert found[1] < first.stderr / 10
    assert HeldOut(nats_W, targets_W, 1000.0, "other").difference(first) is None
    assert HeldOut(nats_W[:9], targets_W[:9], 1000.0, "t").difference(first) is None


# --- The command ---


def test_the_command_compares_models_and_writes_results(
    model_at: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "sub" / "results.json"
    models = [str(model_at(name)) for name in ("16 bit", "ternary", "packed")]
    assert main(["eval", *models, "--split", "test", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == models
    results = json.loads(out.read_text())
    assert results["format"] == "bitscale-eval-1"
    assert {"bitscale", "torch", "deepspeed"} <= results["versions"].keys()
    assert results["settings"]["split"] == "test"
    first, ternary, packed = results["models"]
    assert first["held_out"]["minus_first"] is None
    assert packed["held_out"]["minus_first"] == ternary["held_out"]["minus_first"]
    assert [each["lambda_weight"] for each in results["models"]] == [0.0, 1.0, 1.0]
    assert len({each["digest"] for each in results["models"]}) == 3
    gain = ternary["held_out"]["loss"] - first["held_out"]["loss"]
    assert ternary["held_out"]["minus_first"]["value"] == pytest.approx(gain)
    assert f"{gain:+.4f} ±" in lines[3]
    assert not list(out.parent.glob(".*"))


def test_losses_are_the_decoders_own(model_at: Callable[[str], Path], corpus: Path) -> None:
    """Of a batch, through `token_losses`: what training would report."""
    scored = opened(model_at("ternary"))
    ids = torch.arange(2 * 9).view(2, 9)
    batch = EvaluationBatch(ids[:, :-1], ids[:, 1:], None, 16)
    expected = scored.model(ids[:, :-1], ids[:, 1:]).detach()
    assert scored.token_losses(batch).mean() == pytest.approx(float(expected), rel=1e-6)


# --- Errors ---


def test_errors_name_value_reason_and_remedy(
    model_at: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(model_at("16 bit"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    cases = {
        ("--text", "absent.txt"): "--text absent.txt cannot be read: No such file",
        ("--text", str(tmp_path / "empty.txt")): "empty.txt is empty; give a file with text",
        ("--text", str(tmp_path / "latin.txt")): "is not UTF-8 (byte 2); convert it",
        ("--tp", "2"): "--tp 2 needs a multiple of 2 ranks, and this launch has 1; start it with",
        ("--split", "exam"): "no corpus has a 'exam' split",
        ("--stride", "99"): "a stride of 99 leaves out targets",
        ("--out", "/proc/absent/x.json"): "--out /proc/absent/x.json cannot be written",
        ("--out", str(tmp_path)): f"--out {tmp_path} is a directory; name a file, such as",
    }
    for arguments, message in cases.items():
        assert main(["eval", model, *arguments]) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error, error


def test_a_published_model_names_no_text() -> None:
    with pytest.raises(DataError, match="does not say what text it was trained on; name some with"):
        corpus_texts([], "", "valid")


def test_a_byte_order_mark_is_no_text(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    (tmp_path / "plain.txt").write_text("the river")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfthe river")
    files = [tmp_path / "plain.txt", tmp_path / "marked.txt"]
    with text_files(files, tokenizer) as (plain, marked):
        assert marked.shard.num_tokens == plain.shard.num_tokens
        assert marked.bytes_per_token == plain.bytes_per_token


def test_the_tokenizer_must_be_the_models_own(
    model_at: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    source = open_source(model_at("16 bit"))
    assert open_tokenizer(source).fingerprint == source.tokenizer_sha256
    assert open_tokenizer(source, corpus).path == corpus / "tokenizer.model"
    train_tokenizer(["other words here"] * 40, tmp_path / "tokenizer.model", "bpe", 270)
    with pytest.raises(DataError, match=r"is not the tokenizer that .* SHA-256 differs.*--tokeniz"):
        open_tokenizer(source, tmp_path)
    with pytest.raises(DataError, match=r"the tokenizer is not where it was .* --tokenizer PATH"):
        open_tokenizer(replace(source, tokenizer_file=None))


def test_what_ranks_cannot_share_is_refused(model_at: Callable[[str], Path]) -> None:
    mesh = replace(open_ranks("cpu", 1), world_size=3)
    with pytest.raises(CheckpointError, match=r"packed codes.*use its training checkpoint"):
        open_model(model_at("packed"), mesh, tp=2)
    with pytest.raises(ConfigError, match=r"tp=3 does not divide model.num_heads=4; use tp=1"):
        open_model(model_at("ternary"), mesh, tp=3)
