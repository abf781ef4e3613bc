"""What docs/safety.md guarantees: no code from files, no path out of them, no secret passed on."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from bitscale import sources
from bitscale.checkpoint import Meta, Reader
from bitscale.checkpoint.directory import make_empty, publish
from bitscale.config import Config, load_config
from bitscale.data.corpus import load_corpus
from bitscale.environment import is_allowed
from bitscale.errors import CheckpointError, ConfigError, DataError
from bitscale.names_in_files import is_plain
from bitscale.sources.universal import open_universal

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


# Configuration: data, never code


@pytest.mark.parametrize(
    "value",
    [
        "${oc.decode:'[1, 2]'}",
        "${oc.create:{a:1}}",
        "a-${oc.dict.keys:optim}",
        "${${run.dir}:x}",
        "${evaluate:1}",
        "${oc.env:HOME,${oc.decode:1}}",
    ],
)
def test_no_resolver_of_a_configuration_is_run(tiny_config_file: Path, value: str) -> None:
    calls: list[object] = []
    OmegaConf.register_resolver("evaluate", calls.append)
    try:
        with pytest.raises(ConfigError) as caught:
            load_config(tiny_config_file, [f"data.corpora=[{{path: {json.dumps(value)}}}]"])
    finally:
        OmegaConf.clear_resolver("evaluate")
    assert calls == []
    assert "is not run: a configuration refers to keys" in str(caught.value)
    assert "data.corpora[0].path" in str(caught.value)


@pytest.mark.parametrize("value", ["${oc.env:WANDB_API_KEY}", "x-${oc.env:HF_TOKEN,none}",
                                   "${oc.env:${oc.env:HOME}}", "${oc.env:'HF_TOKEN'}"])  # fmt: skip
def test_no_secret_enters_a_configuration(
    tiny_config_file: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    with pytest.raises(ConfigError, match="would put that variable into checkpoints"):
        load_config(tiny_config_file, [f"run.dir={value}"])


def test_harmless_variables_and_keys_are_read(
    tiny_config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    value = "run.dir=${oc.env:SCRATCH}/job-${oc.env:SLURM_JOB_ID,none}/lr-${optim.lr}"
    assert load_config(tiny_config_file, [value]).run.dir == "/scratch/me/job-none/lr-0.003"


def test_yaml_tags_of_objects_are_refused(tmp_path: Path, tiny_config_file: Path) -> None:
    path = tmp_path / "c.yaml"
    ran = tmp_path / "ran"
    path.write_text(f"base: {tiny_config_file}\nrun: !!python/object/apply:os.mkdir [{ran}]\n")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(path)
    assert not ran.exists()


# Files: what they name, and what they hold


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "a\nb", "a\0b", 7, None]
)
def test_names_that_lead_elsewhere(name: object) -> None:
    assert not is_plain(name)
    assert is_plain("state-00000-of-00002.safetensors")


def change(path: Path, edit: Callable[[Any], None]) -> None:
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_a_corpus_that_names_files_elsewhere_is_refused(make_corpus: Callable[..., Path]) -> None:
    """Its tokenizer is copied into exports: it must not be /etc/shadow."""
    manifest = make_corpus(3) / "corpus.json"
    whole = manifest.read_text()
    edits: list[Callable[[Any], None]] = [
        lambda tree: tree["tokenizer"].update(file="../../../etc/passwd"),
        lambda tree: tree["files"].update({"/etc/passwd": tree["files"]["train.bin"]}),
        lambda tree: tree["splits"].update({"../train": tree["splits"]["train"]}),
    ]
    for edit in edits:
        change(manifest, edit)
        with pytest.raises(DataError, match="not a file of its own folder; use no corpus of unkn"):
            load_corpus(manifest.parent)
        manifest.write_text(whole)
    load_corpus(manifest.parent)


def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    outside = {"../../secret.safetensors": {"bytes": 1, "sha256": "0"}}
    meta = Meta(
        step=1, tokens=1, lambda_weight=0.0, lambda_activation=0.0, config={}, config_hash="",
        identity={}, shapes={}, world_size=1, versions={}, files=outside,
    )  # fmt: skip
    final = tmp_path / "checkpoints" / "step-00000001"
    staging = final.with_name(".step-00000001.partial")
    make_empty(staging)
    publish(staging, final, meta)  # with sound checksums: an attacker writes them, too
    with pytest.raises(CheckpointError, match=r"secret\.safetensors', which is not a file of its"):
        Reader(final)


@pytest.mark.parametrize("pointer", ["latest", "latest_universal"])
def test_a_pointer_that_leads_elsewhere_is_refused(tmp_path: Path, pointer: str) -> None:
    (tmp_path / pointer).write_text("../other-run/global_step5")
    with pytest.raises(CheckpointError, match=r"is said to be '\.\./other-run/global_step5'"):
        sources.locate(tmp_path)


def test_a_parameter_whose_name_is_a_path_is_refused(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    (tmp_path / "zero").mkdir()
    state = {"param_shapes": [{"../../../home/me/weights": (2,)}], "global_steps": 3}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="which leads out of the checkpoint"):
        open_universal(tmp_path)


_FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load",
              "pickle.loads", "yaml.load", "yaml.unsafe_load", "marshal.loads",
              "np.load", "joblib.load"}  # fmt: skip


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File, dotted name and node of every call in the package."""
    for path in sorted((ROOT / "bitscale").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path}:{node.lineno}", ast.unparse(node.func), node


def test_the_package_runs_nothing_that_it_reads() -> None:
    found, num_loads = [], 0
    for where, name, node in calls():
        num_loads += name == "torch.load"
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unpacks = name.rpartition(".")[2] in ("extract", "extractall", "unpack_archive")
        if name in _FORBIDDEN or unpacks or arguments.get("shell") == "True":
            found.append(f"{where}: {name}")
        if name == "torch.load" and arguments.get("weights_only") != "True":
            found.append(f"{where}: torch.load without weights_only=True")
        if arguments.get("trust_remote_code", "False") != "False":
            found.append(f"{where}: trust_remote_code")
    assert found == []
    assert num_loads >= 3  # the scan sees calls


# Secrets


def test_the_environment_file_of_a_launch_is_private_and_holds_no_secret(tmp_path: Path) -> None:
    """A deepspeed that only looks at what launch/multinode.sh hands it."""
    seen = tmp_path / "seen"
    stub = tmp_path / "deepspeed"
    stub.write_text(
        f'#!/bin/sh\nstat -c %a "$DS_ENV_FILE" >{seen}\ncat "$DS_ENV_FILE" >>{seen}\n'
        f'echo "$DS_ENV_FILE" >{tmp_path}/name\n'
    )
    stub.chmod(0o755)
    command = tmp_path / "bitscale"  # this tree's, whichever is installed
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m bitscale.cli.main "$@"\n')
    command.chmod(0o755)
    login = tmp_path / "ssh"  # of a host that lets us in
    login.write_text("#!/bin/sh\nexit 0\n")
    login.chmod(0o755)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    secrets = {"WANDB_API_KEY": "0123", "HF_TOKEN": "hf_x", "AWS_SECRET_ACCESS_KEY": "s"}
    env = os.environ | secrets | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", ROOT / "launch/multinode.sh", tmp_path / "hosts", "config.yaml"],
        env=env, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    mode, *lines = seen.read_text().splitlines()
    assert mode == "600"
    names = [line.partition("=")[0] for line in lines]
    assert "PATH" in names
    assert [name for name in names if not is_allowed(name)] == []
    assert not Path((tmp_path / "name").read_text().strip()).exists()
