"""Fixtures for whole-process tests: corpora, one configuration, two finished runs."""

from pathlib import Path

import prepare_sessions
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs in which `bitscale prepare` runs."""
    return prepare_sessions.make_folder(tmp_path_factory.mktemp("prepare"))


@pytest.fixture(scope="session")
def reference(folder: Path) -> Path:
    """What `bitscale prepare` makes of them when nothing disturbs it. Not to be changed."""
    options = ("--out", "reference", *prepare_sessions.TOKENIZER, "--workers", 1)
    stderr = prepare_sessions.run(folder, "in", *options)
    assert stderr.count("\n") == 1 and "2 empty documents skipped" in stderr
    return folder / "reference"
