"""Dry runs of scripts that torchrun starts."""

import json
import os
import subprocess
import sys

from tests.benchmarks.conftest import FOLDER, ROOT


def dry_ranks(script, out, ranks, *arguments):
    """Run a script with `--dry` on gloo ranks; the result it wrote, and what it printed."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(ranks), str(FOLDER / script), "--dry", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout
