"""Fixtures for whole-process tests: one corpus, one configuration, two finished runs."""

from pathlib import Path

import pytest

from runs import KEEP_ALL, prepare_corpus, python_text, train, write_config


@pytest.fixture(scope="session")
def python_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 500 KB of Python source, 512 pieces."""
    return prepare_corpus(python_text(), tmp_path_factory.mktemp("corpus") / "python")


@pytest.fixture(scope="session")
def config_file(python_corpus: Path) -> Path:
    """The configuration of `runs.CONFIG`: 40 tiny steps, ramp over steps 16 to 27, bf16."""
    return write_config(python_corpus.parent / "tiny.yaml", python_corpus)


@pytest.fixture(scope="session")
def finished_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank, never interrupted, with every checkpoint kept. Not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train("plain", config_file, f"run.dir={run_dir}", "log.tensorboard=true", KEEP_ALL)
    return run_dir


@pytest.fixture(scope="session")
def finished_run_2_ranks(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks under torchrun, by ZeRO-3. Not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished-2") / "run"
    train("torchrun", config_file, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3")
    return run_dir
