"""Which environment variables a launch hands to other hosts: an allow list, and only plain values.

Everything that starts ranks elsewhere asks here (launch/ by `bitscale doctor --print-environment`),
so that no token of the launching shell reaches another host, a job log or a checkpoint.
"""

import fnmatch
import re
from collections.abc import Mapping

from bitscale.errors import ConfigError

# What changes how ranks find each other, the libraries and the devices; nothing that says who runs.
ALLOWED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONFAULTHANDLER",
    "XDG_CACHE_HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "TZ",
    "BITSCALE_*",
    "DS_ACCELERATOR",
    "NCCL_*",
    "GLOO_*",
    "TORCH_*",
    "PYTORCH_*",
    "TORCHINDUCTOR_*",
    "TRITON_*",
    "CUDA_*",
    "OMP_*",
    "MKL_*",
    "FI_*",
    "UCX_*",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)
# Never handed on, whatever a pattern above would say.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE|_KEY$|_PAT$|COOKIE")
# What a shell, mpirun and an environment file all read as itself: DeepSpeed's pdsh launcher writes
# `export NAME=VALUE;` without quotes, so `;` or `$(...)` in a value would run on every host.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./^-]*")


def is_allowed(name: str) -> bool:
    """Whether a variable of this name is handed to other hosts."""
    allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)
    return allowed and not _SECRET.search(name)


def exported(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that other hosts are given, sorted by name.

    Raises ConfigError for an allowed one whose value a shell would not read as it stands.
    """
    chosen = {name: environ[name] for name in sorted(environ) if is_allowed(name)}
    for name, value in chosen.items():
        if not _PLAIN.fullmatch(value):
            raise ConfigError(
                f"environment variable {name}={value[:60]!r} cannot be handed to other hosts: a "
                "shell there would not read it as it stands; use letters, digits and "
                "@%+=:,./^-_ only, or unset it"
            )
    return chosen
