"""Measure a model once, then generate with windows made for it.

    python examples/calibrated.py

Calibration takes minutes at full size. Afterwards the file is all that a run needs, on real ranks
too: Plan(step=Steps(degree=4, windows=Calibrated(file=...))).
"""

import os
from pathlib import Path

import torch

from stretto import Plan, Steps
from stretto.diffusion.api import emulate
from stretto.diffusion.calibrate import calibrate
from stretto.diffusion.calibration import write_calibration
from stretto.diffusion.shipped.load import load
from stretto.plan.options import Calibrated

STEPS = int(os.environ.get("STEPS", "50"))
CALLS = int(os.environ.get("CALLS", "4"))
RANKS = int(os.environ.get("RANKS", "4"))


def main() -> None:
    pipe = load()  # or any other diffusers pipeline
    pipe.set_progress_bar_config(disable=True)
    measured = [call(label % 10, seed=label) for label in range(CALLS)]
    # Held out: other pictures than those that the plans are made from.
    holdout = [call((label + 5) % 10, seed=100 + label) for label in range(CALLS)]
    found = calibrate(pipe, measured, degree=RANKS, holdout=holdout)
    file = Path(os.environ.get("OUT", "out/example")) / "calibration.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_calibration(found, file)
    for entry in found.frontier:
        print(
            f"depth {entry.depth}: {entry.verified_db:.1f} dB calibrated, "
            f"{entry.tail_db:.1f} tail, {entry.parastep_db:.1f} published; "
            f"windows {' '.join(map(str, entry.windows))}"
        )
    plan = Plan(step=Steps(degree=RANKS, windows=Calibrated(file=str(file))))
    with emulate(pipe, plan) as run:
        pipe(**call(7, seed=1000))
    print(run.report)


def call(label: int, seed: int) -> dict:
    """Arguments of one pipeline call."""
    return {
        "class_labels": [label],
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }


if __name__ == "__main__":
    main()
