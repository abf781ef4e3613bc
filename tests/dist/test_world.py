"""The spawn helper itself: a failing, dying or hanging rank fails the test and never hangs."""

import os
import time
from collections.abc import Callable

import pytest
import torch
from world import RankFailure, World

from bitscale.mesh import Mesh

pytestmark = pytest.mark.dist


def add_ranks(mesh: Mesh, start: int) -> tuple[int, int]:
    return int(mesh.sum(torch.tensor(start + mesh.rank))), torch.get_num_threads()


def fail_on_rank_1(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise ValueError("rank one is unhappy")
    mesh.barrier()  # waits for rank 1, which never comes


def die_on_rank_0(mesh: Mesh) -> None:
    if mesh.rank == 0:
        os._exit(7)


def hang(mesh: Mesh) -> None:
    time.sleep(600)


def test_ranks_work_together_with_one_thread_each(world_of: Callable[[int], World]) -> None:
    assert world_of(2).run(add_ranks, 10) == [(21, 1), (21, 1)]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (fail_on_rank_1, "rank one is unhappy"),
        (die_on_rank_0, "rank 0 of 1: died with exit code 7"),
        (hang, "rank 0 of 1: not finished after 0.5 s"),
    ],
)
def test_a_bad_rank_fails_the_test_and_the_next_world_works(
    world_of: Callable[[int], World], check: Callable[..., None], message: str
) -> None:
    world = world_of(2 if check is fail_on_rank_1 else 1)
    with pytest.raises(RankFailure, match=message) as failure:
        world.run(check, seconds=0.5 if check is hang else 60)
    if check is fail_on_rank_1:
        assert "rank 0 of 2: not finished when another rank failed" in str(failure.value)
    assert world.run(add_ranks, 0)[0] == (sum(range(world.size)), 1)
