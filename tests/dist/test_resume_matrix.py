"""Saved at one layout, resumed at another: before, at, inside and after the transition.

A telling part of what tools/compare_resume.py does at length (docs/results/resume-matrix.md).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from resume_runs import SAVED_STEPS, Kept, Layout, resume_runs, run_config, save_run
from world import World

pytestmark = pytest.mark.dist

SAVING: dict[Layout, str | dict[str, float]] = {
    Layout(4, tp=2, pp=2): "keep",
    Layout(2, stage=3, tp=2, sequence_parallel=True): "reset",
    Layout(2, stage=2): {"scale": 0.3},
    Layout(1, stage=1): "keep_second_moment",
}
SECONDS = 300.0


@pytest.fixture(scope="module")
def runs(
    world_of: Callable[[int], World], corpus_prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Kept]:
    made = {}
    for layout, policy in SAVING.items():
        arguments = (run_config(layout, policy), corpus_prefix, tmp_path_factory.mktemp("saved"))
        world = world_of(layout.world_size)
        made[layout] = world.run(save_run, *arguments, seconds=SECONDS)[0]
    return made


@pytest.mark.parametrize(
    "here",
    # Pipelines with tensor-parallel ranks: test_pipeline.py's checkpoints between layouts, too.
    [pytest.param(x, marks=pytest.mark.slow) if "PP" in x.name else x for x in SAVING],
    ids=lambda layout: layout.name,
)
def test_resumes_what_every_layout_saved(
    here: Layout,
    runs: dict[Layout, Kept],
    world_of: Callable[[int], World],
    corpus_prefix: Path,
) -> None:
    arguments = (run_config(here, "keep"), corpus_prefix, list(runs.values()))
    results = world_of(here.world_size).run(resume_runs, *arguments, seconds=SECONDS)[0]
    for there, rows in zip(runs, results, strict=True):
        assert [row.moment for row in rows] == list(SAVED_STEPS)
        for row in rows:
            where = f"{there.name} -> {here.name}, {row}"
            # Masters, moments and counts: to the bit, restored and after the policy.
            assert row.restored == [] and row.begun == [], where
            if here == there:
                assert (row.loss, row.masters, row.moments) == (0.0, 0.0, 0.0), where
            assert row.loss < 5e-6, where
            assert row.masters < 1e-4 and row.moments < 1e-3, where
