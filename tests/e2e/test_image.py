"""The Dockerfile's steps, executed without an engine: what they install installs and starts."""

import subprocess
import sys
from pathlib import Path

import pytest

import rehearse_image

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SECONDS = 1200


@pytest.mark.timeout(SECONDS + 60)
def test_the_cpu_image_installs_and_its_health_check_passes() -> None:
    """Minutes, and 3 GB of memory for what is installed."""
    if reason := rehearse_image.why_not():
        pytest.skip(reason)
    # An index of this machine's, where it has one, in place of PyTorch's.
    setting = [sys.executable, "-m", "pip", "config", "get", "global.extra-index-url"]
    index = subprocess.run(setting, capture_output=True, text=True).stdout.strip()
    arguments = ["--build-arg", f"CPU_INDEX={index}"] if index else []
    tool = Path(rehearse_image.__file__)
    done = subprocess.run(
        [sys.executable, str(tool), *arguments],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    healthy, _, started = done.stdout.partition("== ENTRYPOINT")
    assert "1 host: fit for a run" in healthy
    assert "/opt/bitscale/bin/python" in healthy
    assert "usage: bitscale" in started
