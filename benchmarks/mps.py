"""The MPS daemon, so that several processes really share one GPU at the same time.

It gets directories of its own and is told to quit at the end, also after a failure; no setting of
the card is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CONTROL = "nvidia-cuda-mps-control"


@contextmanager
def daemon() -> Iterator[dict[str, str]]:
    """Run the daemon while inside; yields the environment its clients need.

    A SIGTERM inside becomes SystemExit, so that the daemon goes with its clients. Raises
    CalledProcessError when it does not start (is one running on these directories?).
    """
    # Short, because a socket's path ends at 107 characters.
    folder = tempfile.mkdtemp(prefix="mps-", dir="/tmp")
    own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
    for path in own.values():
        os.mkdir(path)
    environment = {**os.environ, **own}
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        subprocess.run([CONTROL, "-d"], env=environment, check=True, timeout=60)
        try:
            yield own
        finally:
            # Clients are given ten seconds, then the server ends without them.
            command = {"args": [CONTROL], "input": "quit -t 10\n", "text": True}
            subprocess.run(**command, env=environment, check=False, timeout=60)
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def slice_environment(ranks: int) -> dict[str, str]:
    """What one of `ranks` equal clients sets: its share of the multiprocessors, in percent."""
    return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // ranks)}


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)
