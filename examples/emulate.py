"""What would 4 step ranks do to the picture? Played in one process, no ranks needed.

    python examples/emulate.py

Holds schedules of equal depth, and fewer plain steps, against the sequential result.
"""

import os

import torch

from stretto import Plan, Steps
from stretto.diffusion import quality
from stretto.diffusion.api import emulate
from stretto.diffusion.shipped.load import load
from stretto.plan.options import Parastep, Tail

STEPS = int(os.environ.get("STEPS", "50"))
RANKS = 4


def main() -> None:
    pipe = load()  # or any other diffusers pipeline
    pipe.set_progress_bar_config(disable=True)
    reference = generate(pipe, STEPS)
    depth = 0
    for windows in (Parastep(), Tail()):  # Tail has by default the depth of Parastep
        plan = Plan(step=Steps(degree=RANKS, windows=windows))
        with emulate(pipe, plan) as run:
            picture = generate(pipe, STEPS)
        depth = run.report.depth
        print(f"{windows.short():12} depth {depth:3}  {psnr(picture, reference):5.1f} dB")
        print(f"{'':12} windows {' '.join(map(str, run.report.sizes))}")
    fewer = generate(pipe, depth)
    print(f"{'fewer steps':12} depth {depth:3}  {psnr(fewer, reference):5.1f} dB")


def generate(pipe, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe([0, 5], num_inference_steps=steps, generator=generator, output_type="pt").images


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    return quality.psnr(picture, reference, data_range=1.0).mean


if __name__ == "__main__":
    main()
