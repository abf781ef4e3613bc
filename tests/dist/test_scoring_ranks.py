"""Models scored by two ranks, which share the model or the work, against one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from tiny_runs import tiny_config
from world import World

from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.data.shards import ShardWriter, TokenShard
from bitscale.mesh import Mesh, single_process_mesh
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from bitscale.scoring.held_out import Text, score_held_out
from bitscale.scoring.lm_eval_model import BitscaleLM
from bitscale.scoring.model import Continuation, open_model
from tiny_models import make_source

pytestmark = pytest.mark.dist

SEQ_LEN = 24
STRENGTHS = {"16 bit": SIXTEEN_BIT, "ramp": Strength(0.4, 0.7), "ternary": TERNARY}


class Words:
    """As much of a tokenizer as requests need: a token a character."""

    eos_id, fingerprint = 0, "characters"

    def encode(self, text: str) -> list[int]:
        return [1 + ord(character) % 60 for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(64 + token) for token in ids)


def scores(mesh: Mesh, checkpoint: Path, shard: Path, tp: int) -> dict[str, Any]:
    """Everything that a model is asked for, of every kind."""
    scored = open_model(checkpoint, mesh, tp)
    wanted = [Continuation([1, 2, n], [n, 4, n + 1][: 1 + n % 3]) for n in range(11)]
    lm = BitscaleLM(scored, Words(), batch_size=2)  # type: ignore[arg-type]
    options = {"until": ["Z"], "max_gen_toks": 5, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (f"abc{n}", options), n, ("task", n, 1)) for n in range(3)
    ]
    held_out = score_held_out(
        scored,
        [Text(TokenShard(shard), 2.0)],
        tokenizer_sha256="t",
        seq_len=SEQ_LEN,
        stride=10,
        batch_size=2,
        limit=None,
    )
    return {
        "nats": [s.nats for s in scored.log_likelihoods(wanted, batch_size=2)],
        "greedy": [s.is_greedy for s in scored.log_likelihoods(wanted, batch_size=3)],
        "texts": lm.generate_until(requests),
        "windows": held_out.nats_W.tolist(),
        "bytes": held_out.num_bytes,
        "parameters": sum(p.numel() for p in scored.model.parameters()),
    }


@pytest.mark.parametrize("name", STRENGTHS)
def test_two_ranks_score_what_one_scores(
    name: str, world_of: Callable[[int], World], tmp_path: Path
) -> None:
    cfg = tiny_config(1, "fp32", data={"seq_len": SEQ_LEN}, transition={"at": {"step": 0}})
    checkpoint = write_checkpoint(make_source(cfg, STRENGTHS[name]), tmp_path / "model", {})
    shard = tmp_path / "shard"
    with ShardWriter(shard, 61) as writer:
        writer.add_document([(7 * n * n) % 61 for n in range(150)])
    expected = scores(single_process_mesh("cpu"), checkpoint, shard, 1)
    for tp in (1, 2):
        for found in world_of(2).run(scores, checkpoint, shard, tp):
            assert found["greedy"] == expected["greedy"]
            assert found["texts"] == expected["texts"]
            assert found["nats"] == pytest.approx(expected["nats"], abs=1e-4)
            assert found["windows"] == pytest.approx(expected["windows"], abs=1e-3)
            assert found["bytes"] == expected["bytes"]
            assert (found["parameters"] < expected["parameters"]) == (tp == 2)
