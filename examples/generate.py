"""Pictures on several ranks, from Python. The same script runs on one rank and on many machines.

    python examples/generate.py
    torchrun --nproc-per-node 2 examples/generate.py
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --rdzv-backend c10d \
        --rdzv-endpoint FIRST_MACHINE:29500 examples/generate.py

Every rank makes the same call and ends with the same pictures; rank 0 writes them.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist

import stretto
from stretto.diffusion.shipped.load import load


def main() -> None:
    torch.set_num_threads(1)  # ranks on one machine share its cores
    plan = stretto.Plan(step=int(os.environ.get("WORLD_SIZE", "1")))
    mesh = stretto.init_mesh(plan)  # a GPU per rank where there is one
    pipe = load().to(mesh.device)  # or any other diffusers pipeline
    with stretto.parallelized(pipe, plan, mesh=mesh) as run:
        generator = torch.Generator().manual_seed(1)
        steps = int(os.environ.get("STEPS", "50"))
        pictures = pipe([0, 5], num_inference_steps=steps, generator=generator).images
    if mesh.world_rank == 0:
        folder = Path(os.environ.get("OUT", "out/example"))
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{number}.png")
        print(run.report)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
