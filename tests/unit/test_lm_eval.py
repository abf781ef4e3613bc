"""lm-eval on bitscale's models: prompts, the numbers of transformers' own class, errors."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import open_source
from bitscale.convert.formats import ExportOptions, export
from bitscale.errors import DataError
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from bitscale.scoring.lm_eval_model import BitscaleLM
from bitscale.scoring.local_data import COLUMNS, read_rows
from bitscale.scoring.tasks import GROUP, load_tasks, mean_stderr, score_tasks
from scored_models import SEQ_LEN, scored_checkpoint, write_task_files

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
TASKS = ("piqa", "copa", "winogrande", "arc_easy", "openbookqa")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = ("piqa", "copa", "winogrande", "arc_easy", "openbook_qa")
    return write_task_files(tmp_path_factory.mktemp("tasks"), files)


@pytest.fixture(scope="module")
def tasks(data_dir: Path) -> dict[str, Any]:
    return load_tasks(TASKS, data_dir)


@pytest.fixture(scope="module")
def model_at(
    make_config: MakeConfig, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """model_at(λ, quantizer) -> its checkpoint."""
    root = tmp_path_factory.mktemp("models")

    def make(strength: Strength = TERNARY, preset: str = "b158") -> Path:
        out = root / f"{preset}-{strength.weight:g}"
        if out.exists():
            return out
        override = f"quant.preset={preset}"
        return scored_checkpoint(make_config, out, corpus, override, strength=strength)

    return make


def answers(lm: Any, tasks: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """{task: accuracy}, and of each task the log-likelihoods of all its choices."""
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
    found = evaluate(lm, {"tasks": tasks}, bootstrap_iters=0, log_samples=True)
    assert found is not None
    accuracies = {name: found["results"][name]["acc,none"] for name in tasks}
    nats = {
        name: torch.tensor(
            [float(nats) for s in found["samples"][name] for nats, _ in s["filtered_resps"]]
        )
        for name in tasks
    }
    return accuracies, nats


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


# --- Data and prompts ---


def test_local_items_give_the_prompts_of_lm_evals_own_tasks(tasks: dict[str, Any]) -> None:
    for task in tasks.values():
        task.build_all_requests(rank=0, world_size=1)
    asked = {name: [i.args for i in task.instances[:2]] for name, task in tasks.items()}
    assert asked == {
        "piqa": [
            ("Question: river tree\nAnswer:", " river moves"),
            ("Question: river tree\nAnswer:", " tree bright holds"),
        ],
        # Two spaces: lm-eval's task has one in its choices and one between prompt and choice.
        "copa": [
            ("The river tree because", "  river moves"),
            ("The river tree because", "  tree bright holds"),
        ],
        "winogrande": [
            ("The river saw Rob so Rob", " river moves."),
            ("The river saw Rob so Robert", " river moves."),
        ],
        "arc_easy": [
            ("Question: river river?\nAnswer:", " river moves"),
            ("Question: river river?\nAnswer:", " tree bright holds"),
        ],
        "openbookqa": [("river under", " river moves"), ("river under", " tree bright holds")],
    }
    gold = {name: [task.doc_to_target(d) for d in task.validation_docs()] for name, task in
            tasks.items() if name in ("piqa", "arc_easy", "openbookqa")}  # fmt: skip
    assert all(list(map(int, each)) == [0, 1] * 3 for each in gold.values())


def test_the_data_sets_own_columns_are_read_as_they_are(tmp_path: Path) -> None:
    rows = {
        "hellaswag": {"activity_label": "Cooking", "ctx_a": "A man stirs", "ctx_b": "he",
                      "endings": ["tastes it.", "flies."], "label": "0", "ind": 3},
        "sciq": {"support": "Water boils.", "question": "At what?", "distractor1": "1",
                 "distractor2": "2", "distractor3": "3", "correct_answer": "100"},
        "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
        "cb": {"premise": "It rains.", "hypothesis": "It is wet", "label": 2},
        "mrpc": {"sentence1": "It rains.", "sentence2": "Rain falls.", "label": 1},
        "sst2": {"sentence": "a fine film", "label": 1},
    }  # fmt: skip
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n")
    tasks = load_tasks(list(rows), tmp_path)
    prompts = {}
    for name, task in tasks.items():
        task.build_all_requests(rank=0, world_size=1)
        prompts[name] = [task.instances[0].args[0], *(i.args[1] for i in task.instances)]
    assert prompts == {
        "hellaswag": ["Cooking: A man stirs He", " tastes it.", " flies."],
        "sciq": ["Water boils.\nQuestion: At what?\nAnswer:", " 1", " 2", " 3", " 100"],
        "rte": ["It rains.\nQuestion: It is wet. True or False?\nAnswer:", " True", " False"],
        "cb": ["It rains.\nQuestion: It is wet. True, False, or Neither?\nAnswer:",
               " True", " False", " Neither"],
        "mrpc": ["Sentence 1: It rains.\nSentence 2: Rain falls.\nQuestion: Do both sentences "
                 "mean the same thing?\nAnswer:", " no", " yes"],
        "sst2": ["a fine film\nQuestion: Is this sentence positive or negative?\nAnswer:",
                 " negative", " positive"],
    }  # fmt: skip


def test_the_group_is_the_eleven_tasks_of_the_paper(tmp_path: Path) -> None:
    assert len(COLUMNS) == 11
    with pytest.raises(DataError) as error:
        load_tasks([GROUP], write_task_files(tmp_path))
    message = str(error.value)
    missing = [f"{task}.jsonl" for task in COLUMNS if task not in ("piqa", "copa", "winogrande")]
    assert f"has no {', '.join(missing)}; put them there" in message
    assert message.endswith("or ask for --tasks piqa,winogrande,copa")


def test_data_for_other_tasks_is_not_asked_for(data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir holds data for piqa.* not for lambada; leave"):
        load_tasks(["piqa", "lambada"], data_dir)


def test_without_a_hub_the_remedy_is_local_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(**options: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"piqa: its data .*no route to the hub.*--data-dir DIR"):
        load_tasks(["piqa"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"piqa.jsonl has no items; write one JSON object a line"),
        ("{not json}\n", r"piqa.jsonl is not readable as one JSON object a line"),
        (
            '{"goal": "g"}\n',
            r"line 1: piqa needs the columns goal, sol1, sol2, label, or llm",
        ),
        ("[1]\n", r"line 1: piqa needs the columns"),
        ('{"query": "q", "choices": ["a"], "gold": 0}\n', r"line 1: piqa needs the columns"),
    ],
)
def test_bad_rows_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "piqa.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows("piqa", file)


# --- The same numbers as transformers' own class ---


@pytest.fixture
def eagerly() -> Iterator[None]:
    """transformers' ternary layers are compiled, which takes minutes on CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("strength", "preset", "target", "linear", "bound"),
    [
        (SIXTEEN_BIT, "b158", "hf", None, 1e-4),
        # Activations stay in 16 bit there: a quantizer of weights only is the same model.
        (TERNARY, "weight_only", "hf-dequantized", None, 1e-4),
        # An activation may round to the next code.
        (TERNARY, "b158", "hf-bitnet", "autobitlinear", 5e-2),
    ],
)
def test_an_exported_directory_scores_what_its_checkpoint_scores(
    strength: Strength,
    preset: str,
    target: str,
    linear: Any,
    bound: float,
    model_at: Callable[..., Path],
    tasks: dict[str, Any],
    tmp_path: Path,
    eagerly: None,
) -> None:
    checkpoint = model_at(strength, preset)
    export(open_source(checkpoint), tmp_path / "hf", target, ExportOptions(linear=linear))
    ours = BitscaleLM(str(checkpoint), batch_size=4, device="cpu")
    theirs = HFLM(
        pretrained=str(tmp_path / "hf"),
        dtype="float32",
        device="cpu",
        batch_size=3,
        prefix_token_id=ours.eot_token_id,
    )
    our_accuracies, our_nats = answers(ours, tasks)
    their_accuracies, their_nats = answers(theirs, tasks)
    assert our_accuracies == their_accuracies
    for name in tasks:
        assert torch.allclose(our_nats[name], their_nats[name], atol=bound, rtol=0), name
        assert our_nats[name].std() > 20 * bound  # it is not that all are alike
    text = "river tree moves holds under bright slow never always and " * 9
    rolling = [request("loglikelihood_rolling", text) for text in (text, "a", "")]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), abs=len(text) * bound
    )
    asked = {"until": [" tree", "\n\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = ("river tree moves", "never always and the slow")
    generate = [request("generate_until", prompt, asked) for prompt in prompts]
    assert ours.generate_until(generate) == theirs.generate_until(generate)


def test_rolling_windows_cover_the_text_once(model_at: Callable[..., Path]) -> None:
    lm = BitscaleLM(str(model_at()), device="cpu")
    text = "river tree moves holds under bright slow never always and " * 9
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * SEQ_LEN
    windows = list(get_rolling_token_windows(ids, lm.prefix_token_id, SEQ_LEN, 1))
    assert [t for _, predicted in windows for t in predicted] == ids
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    nats = 0.0
    for inputs, predicted in windows:
        log_p = lm.scored.model.logits(torch.tensor([inputs]))[0].log_softmax(-1)
        tail = log_p[-len(predicted) :]
        nats += float(tail.gather(1, torch.tensor(predicted)[:, None]).sum())
    assert found == pytest.approx(nats, rel=1e-5)


def test_what_the_class_does_not_do_is_refused(model_at: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"batch_size=auto: sizes are not found out"):
        BitscaleLM(str(model_at()), batch_size="auto", device="cpu")
    lm = BitscaleLM(str(model_at()), device="cpu")
    sampled = request("generate_until", "a", {"do_sample": True, "temperature": 1.0})
    with pytest.raises(DataError, match=r"asks for sampled text .*do_sample=False"):
        lm.generate_until([sampled])


# --- Scores and the command ---


def test_scores_and_paired_differences(
    model_at: Callable[..., Path], tasks: dict[str, Any], data_dir: Path
) -> None:
    found = []
    for strength in (SIXTEEN_BIT, TERNARY):
        lm = BitscaleLM(str(model_at(strength)), device="cpu")
        found.append(score_tasks(lm.scored, tasks, tokenizer=lm.tokens, batch_size=4, limit=5))
    for name in TASKS:
        first, other = found[0][name], found[1][name]
        assert (first.num_items, first.version) == (5, "1.0")
        items = first.items["acc"]
        assert (first.values["acc"], first.stderrs["acc"]) == pytest.approx(mean_stderr(items))
        difference = other.difference(first, "acc")
        assert difference == mean_stderr(
            [b - a for a, b in zip(items, other.items["acc"], strict=True)]
        )
        assert first.data_sha256 == other.data_sha256 != None  # noqa: E711
    assert any(found[0][n].items["acc"] != found[1][n].items["acc"] for n in TASKS)


def test_mean_and_its_standard_error() -> None:
    mean, stderr = mean_stderr([1.0, 0.0, 0.0, 1.0, 1.0])
    assert mean == pytest.approx(0.6)
    assert stderr == pytest.approx(math.sqrt(0.3 / 5))
    assert math.isnan(mean_stderr([1.0])[1])


def test_the_command_prints_a_table_and_writes_task_results(
    model_at: Callable[..., Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results.json"
    models = [str(model_at(SIXTEEN_BIT)), str(model_at())]
    options = ["--tasks", "piqa,copa", "--data-dir", str(data_dir), "--limit", "4"]
    assert main(["eval", *models, *options, "--out", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["piqa", "piqa", "copa", "mean"]
    assert " ± " in table[2].split("|")[-2]
    results = json.loads(out.read_text())
    assert "lm-eval" in results["versions"]
    assert "held_out" not in results["models"][0]
    piqa = results["models"][1]["tasks"]["piqa"]
    assert (piqa["n"], piqa["version"]) == (4, "1.0")
    assert piqa["metrics"].keys() == {"acc", "acc_norm"}
    assert piqa["metrics"]["acc"]["minus_first"]["stderr"] is not None
    assert len(piqa["data_sha256"]) == 64
