"""Run a Dockerfile's steps without a container engine: does what it installs install, and start?

    sudo python tools/rehearse_image.py                                       the CPU image
    sudo python tools/rehearse_image.py --build-arg CPU_INDEX=https://mirror/simple

It reads docker/Dockerfile, follows the stages of the chosen build arguments, and executes every
RUN, COPY, ENV and WORKDIR as written, in a copy-on-write view of this machine's file system (an
overlay in a mount namespace of its own: nothing of it stays, and nothing outside is written). Then
it runs the HEALTHCHECK and `ENTRYPOINT CMD` as the image's user. What differs from a real build:
the base image is this machine, and pip's cache and settings are its own. Linux and root only.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# What the overlay lets through: the upper layer lives in memory, so that it may lie over "/".
_ENTER = """\
set -e
mount -t tmpfs none "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay none -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc none "$1/root/proc"
for name in dev sys; do mount --rbind "/$name" "$1/root/$name"; done
mkdir -p "$1/root/tmp" && mount -t tmpfs none "$1/root/tmp"
mkdir -p "$1/root/rehearsal/context" "$1/root/root/.cache"
mount --bind "$2" "$1/root/rehearsal/context"
mount --bind "$3" "$1/root/root/.cache"
exec chroot "$1/root" bash -c "$4"
"""
_PAIR = r"""\w+=(?:"[^"]*"|'[^']*'|\S+)"""  # of an ENV


class Instruction(NamedTuple):
    name: str
    value: str


def read_dockerfile(text: str) -> list[Instruction]:
    """Instructions in order, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [Instruction(name.upper(), value.strip()) for name, _, value in words]


def steps_of(
    instructions: list[Instruction], build_args: Mapping[str, str], target: str | None = None
) -> list[Instruction]:
    """The instructions of the last stage (or `target`) and of those below it, without FROM.

    ARGs take their value from `build_args` or their default and are put in front, as ENV."""
    defaults = dict(
        i.value.partition("=")[::2] for i in instructions if i.name == "ARG" and "=" in i.value
    )
    unknown = set(build_args) - set(defaults)
    if unknown:
        raise SystemExit(f"error: the Dockerfile has no ARG {', '.join(sorted(unknown))}")
    arguments = defaults | build_args
    stages: dict[str, tuple[str, list[Instruction]]] = {}
    name = ""
    for instruction in instructions:
        if instruction.name == "FROM":
            image, _, alias = expand(instruction.value, arguments).partition(" AS ")
            name = alias or "last"
            stages[name] = (image, [])
        elif name:
            stages[name][1].append(instruction)
    chain: list[Instruction] = []
    name = target or name
    while name in stages:
        image, own = stages[name]
        chain, name = own + chain, image
    given = [Instruction("ENV", f"{key}={shlex.quote(value)}") for key, value in arguments.items()]
    return [*given, *(i for i in chain if i.name != "ARG")]


def expand(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)


def script_of(steps: list[Instruction], then: str = "") -> str:
    """A shell script that does what the steps say, each behind a line that tells it."""
    lines = ["set -e", "cd /"]
    last: dict[str, str] = {}
    user = "root"
    for step in steps:
        name, value = step
        if name in ("RUN", "COPY"):
            lines.append(f"echo {shlex.quote(f'== {name} {value}'[:160])}")
        if name == "ENV":
            lines += [f"export {each}" for each in re.findall(_PAIR, value)]
        elif name == "WORKDIR":
            lines.append(f"mkdir -p {value} && cd {value}")
        elif name == "USER":
            user = value
        elif name == "RUN":
            command = re.sub(r"--mount=\S+\s+", "", value)
            lines.append(_as_user(user, command))
        elif name == "COPY":
            lines.append(_copy(value))
        else:
            last[name] = value
    check = json.loads(last["HEALTHCHECK"].partition("CMD")[2])
    start = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    for title, command in (("HEALTHCHECK", check), ("ENTRYPOINT", start)):
        lines += [f"echo '== {title}'", _as_user(user, shlex.join(command))]
    if then:
        lines += [f"echo {shlex.quote(f'== {then}')}", _as_user(user, then)]
    return "\n".join(lines) + "\n"


def _as_user(user: str, command: str) -> str:
    if user in ("root", "0"):
        return f"sh -c {shlex.quote('set -e; ' + command)}"
    home = f"HOME=$(getent passwd {user} | cut -d: -f6)"
    return (
        f"{home} setpriv --reuid={user} --regid={user} --clear-groups sh -c {shlex.quote(command)}"
    )


def _copy(value: str) -> str:
    """As Docker copies: a directory's content, from the build context, owned as asked."""
    options = [word for word in value.split() if word.startswith("--")]
    *sources, target = [word for word in value.split() if not word.startswith("--")]
    owner = next((o.partition("=")[2] for o in options if o.startswith("--chown")), "root")
    lines = []
    for source in sources:
        there = f"/rehearsal/context/{source}"
        if (ROOT / source).is_dir():
            lines.append(f"mkdir -p {target} && cp -r {there}/. {target}")
        else:
            lines.append(f"mkdir -p $(dirname {target}x) && cp {there} {target}")
        lines.append(f"chown -R {owner} {target}")
    return "\n".join(lines)


def build_context(folder: Path) -> None:
    """What .dockerignore lets through: everything is shut out but the names behind "!"."""
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for name in allowed:
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder / name)], check=True)


def why_not() -> str:
    """Why steps cannot be rehearsed here; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an overlay needs Linux and root"
    if not base_python():
        return (
            "no Python 3.11 or 3.12 with venv that other users can run (apt install python3-venv)"
        )
    with tempfile.TemporaryDirectory() as top, tempfile.TemporaryDirectory() as context:
        done = _enter(Path(top), Path(context), "true", capture=True)
    return "" if done.returncode == 0 else f"no overlay here: {done.stderr.strip()[-200:]}"


def base_python() -> str:
    """The folder of the Python that takes the place of the base image's; empty if there is none.

    The image's user must be able to run it: one below /root will not do.
    """
    code = "import sys, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))"
    for folder in (f"{sys.base_prefix}/bin", "/usr/local/bin", "/usr/bin"):
        python = Path(folder, "python3")
        if not python.exists() or any(
            not path.stat().st_mode & 0o001
            for path in (python.resolve(), *python.resolve().parents)
        ):
            continue
        if subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0:
            return folder
    return ""


def _enter(
    top: Path, context: Path, script: str, *, capture: bool = False
) -> subprocess.CompletedProcess[str]:
    cache = Path.home() / ".cache"
    cache.mkdir(exist_ok=True)
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "bash",
        "-c",
        _ENTER,
        "enter",
    ]
    # Settings of pip and proxies pass, as an engine's --build-arg would hand them in.
    kept = {k: v for k, v in os.environ.items() if re.match(r"PIP_|SSL_|.*_proxy$", k, re.I)}
    env = {"PATH": f"{base_python()}:/usr/sbin:/usr/bin:/sbin:/bin", **kept}
    return subprocess.run(
        [*command, str(top), str(context), str(cache), script],
        env=env | {"HOME": "/root"},
        capture_output=capture,
        text=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's"
    )
    parser.add_argument("--target", metavar="STAGE", help="stop there, as docker build does")
    parser.add_argument("--then", default="", metavar="COMMAND", help="run in it at the end")
    parser.add_argument("--print", action="store_true", help="print the script, run nothing")
    args = parser.parse_args()
    build_args = {"DEVICE": "cpu"} | dict(each.partition("=")[::2] for each in args.build_arg)
    instructions = read_dockerfile((ROOT / "docker/Dockerfile").read_text())
    script = script_of(steps_of(instructions, build_args, args.target), args.then)
    if args.print:
        print(script, end="")
        return 0
    if reason := why_not():
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as top, tempfile.TemporaryDirectory() as context:
        build_context(Path(context))
        return _enter(Path(top), Path(context), script).returncode


if __name__ == "__main__":
    sys.exit(main())
