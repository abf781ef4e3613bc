"""The project's own promises: commands, scripts, pins, images, and the limits of its style."""

import ast
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bitscale

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE_FILES = sorted((ROOT / "bitscale").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def run_script(path: str, *args: str, search_path: str | None = None) -> tuple[int, str]:
    """Exit code and stderr of a script of ours; `search_path` replaces PATH."""
    env = dict(os.environ, PATH=search_path or os.environ["PATH"])
    done = subprocess.run(
        ["/bin/bash", str(ROOT / path), *args], env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


def declared(*extras: str) -> Iterator[Requirement]:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for line in project["dependencies"]:
        yield Requirement(line)
    for extra in extras:
        yield from map(Requirement, project["optional-dependencies"][extra])


# Commands


def test_readme_makefile_and_ci_agree_on_the_two_commands() -> None:
    readme, makefile, ci = read("README.md"), read("Makefile"), read(".ci/run")
    for command in ("quickstart", "test"):
        assert re.search(rf"^\s*(\$ )?make {command}\b", readme, re.MULTILINE), command
        assert re.search(rf"^{command}: ", makefile, re.MULTILINE), command
    assert re.search(r"^(exec |timed )?make test$", ci, re.MULTILINE)
    assert "launch/quickstart.sh" in makefile


def test_version_is_the_same_everywhere() -> None:
    assert tomllib.loads(read("pyproject.toml"))["project"]["version"] == bitscale.__version__


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_executable(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK), f"chmod +x {script}"


@pytest.mark.parametrize("name", ["local.sh", "torchrun.sh", "multinode.sh", "mpi.sh"])
def test_launchers_state_their_usage(name: str) -> None:
    code, stderr = run_script(f"launch/{name}", "2")
    assert code != 0
    assert "usage: " in stderr
    assert "CONFIG" in stderr


def test_mpi_starts_nothing_without_an_environment_to_hand_on(tmp_path: Path) -> None:
    programs = {
        "bitscale": "echo 'error: OMP_PLACES cannot be handed to other hosts' >&2; exit 2",
        "mpirun": "echo started >&2",
        "python": "",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, stderr = run_script("launch/mpi.sh", "2", "run.yaml", search_path=path)
    assert (code, stderr) == (2, "error: OMP_PLACES cannot be handed to other hosts\n")
    (tmp_path / "bitscale").write_text("#!/bin/sh\nprintf 'PATH=/bin\\nTZ=UTC\\n'\n")
    (tmp_path / "mpirun").write_text('#!/bin/sh\necho "$@" >&2\n')
    code, stderr = run_script("launch/mpi.sh", "2", "run.yaml", search_path=path)
    assert code == 0 and " -x PATH -x TZ " in stderr


def test_quickstart_refuses_unknown_arguments() -> None:
    assert run_script("launch/quickstart.sh", "--corpse", "x") == (
        2,
        "error: unknown argument '--corpse'; usage: launch/quickstart.sh [--corpus PATH]\n",
    )


def test_quickstart_needs_a_path_after_corpus() -> None:
    assert run_script("launch/quickstart.sh", "--corpus") == (
        2,
        "error: --corpus needs a path: a file or a folder of text\n",
    )


def test_quickstart_says_how_to_get_bitscale(tmp_path: Path) -> None:
    code, stderr = run_script("launch/quickstart.sh", search_path=str(tmp_path))
    assert code == 2
    assert stderr.startswith("error: bitscale is not on PATH; run 'make quickstart'")


def test_make_env_says_which_python_it_needs(tmp_path: Path) -> None:
    """Only a Python that cannot run is on offer, as with a shim of pyenv."""
    makefile = ROOT / "Makefile"
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(read(name), encoding="utf-8")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in ("sh", "bash", "cat", "cksum", "cut", "rm", "make"):
        (bin_dir / tool).symlink_to(shutil.which(tool) or tool)
    shim = bin_dir / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    env = {"PATH": str(bin_dir)}
    done = subprocess.run(
        ["make", "-f", str(makefile), "env"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: no Python 3.11 or 3.12 with venv among: " in done.stderr
    assert "make env PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


# Pins and images


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    for requirement in declared("dev"):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_pins_serve_cpu_and_cuda() -> None:
    pinned = pins()
    assert not [name for name in pinned if name.startswith("nvidia-")]
    assert not [version for version in pinned.values() if "+" in version]


def test_image_copies_what_exists_and_what_the_context_holds() -> None:
    sources = [
        source
        for line in read("docker/Dockerfile").splitlines()
        if line.startswith("COPY ")
        for source in [word for word in line.split()[1:] if not word.startswith("--")][:-1]
    ]
    assert len(sources) > 5
    context = re.findall(r"^!(\S+)$", read(".dockerignore"), re.MULTILINE)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in context, f".dockerignore leaves {source} out"


def test_image_is_pinned_and_does_not_run_as_root() -> None:
    instructions = re.findall(r"^([A-Z]+) (.+)$", read("docker/Dockerfile"), re.MULTILINE)
    images = [value for name, value in instructions if name == "ARG" and "_IMAGE=" in value]
    assert len(images) == 2
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+-\S+$", image), f"{image} needs an exact tag"
    users = [value for name, value in instructions if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert "HEALTHCHECK" in dict(instructions)


# Style


def test_files_have_one_purpose() -> None:
    assert len(PACKAGE_FILES) > 5
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE_FILES}
    too_long = [f"{path}: {n} lines" for path, n in counts.items() if n > MAX_FILE_LINES]
    assert too_long == []
    assert [path for path in PACKAGE_FILES if path.stem in ("utils", "util", "helpers")] == []


def test_functions_fit_a_screen() -> None:
    too_long = [
        f"{path}:{node.lineno} {node.name}: {num_lines} lines"
        for path in PACKAGE_FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (num_lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_every_test_file_belongs_to_the_group_of_its_folder() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert {path.parent.name for path in files} >= {"unit", "dist", "e2e"}
    stray = [
        path
        for path in files
        if not re.search(
            rf"^pytestmark = \[?\s*pytest\.mark\.{path.parent.name}\b",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    ]
    assert stray == []


def test_configs_are_yaml_mappings() -> None:
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert ROOT / "configs" / "quickstart.yaml" in configs
    for path in configs:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
