"""Two steps of every recipe, shrunken: `python recipe_sessions.py CORPUS OUT` prints exit codes.

A process of its own, because sessions are forked after the imports, which no thread may outlive.
"""

import json
import sys
from pathlib import Path

from bitscale.config import load_config
from preloaded import Session, preload

RECIPES = sorted((Path(__file__).parents[2] / "configs/recipes").glob("*.yaml"))
SHRUNKEN = [
    *("model.vocab_size=null", "model.num_layers=2", "model.d_model=32", "model.d_ff=48"),
    *("model.num_heads=2", "model.num_kv_heads=1", "data.seq_len=16"),
    *("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=1"),
    *("train.eval_every=0", "train.eval_batches=1", "optim.warmup.steps=1", "log.every=1"),
    *("engine.zero_stage=1", "engine.num_threads=1", "log.tensorboard=false"),
]


def main(corpus: str, out: str) -> None:
    preload()
    codes = {}
    for recipe in RECIPES:
        run = Path(out) / recipe.stem
        arguments = [str(recipe), f"run.dir={run}", f"data.corpora=[{{path: {corpus}}}]", *SHRUNKEN]
        at = load_config(recipe).transition.at
        if at is None or at.step != 0:  # else ternary from the start, and so it stays
            arguments.append("transition.at={step: 1}")
        codes[recipe.stem] = Session(arguments, 1, Path(out) / f"{recipe.stem}.log").wait(120)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
