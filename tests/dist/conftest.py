"""Fixtures of the distributed tests: worlds of ranks and a corpus."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import write_corpus
from world import World


@pytest.fixture(scope="session")
def world_of() -> Iterator[Callable[[int], World]]:
    """`world_of(n)`: n ranks, started at the first use and shared by the session."""
    worlds: dict[int, World] = {}

    def get(size: int) -> World:
        return worlds.setdefault(size, World(size))

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture(scope="session")
def corpus_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a token shard (tiny_runs.write_corpus)."""
    return write_corpus(tmp_path_factory.mktemp("shard") / "text")
