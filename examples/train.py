"""A training loop of your own on a sequence that is split over ranks.

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py

Every rank holds the whole weights and a part of the sequence. Losses and gradients are sums over
ranks; the printed losses are the same for any number of ranks, up to rounding.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import stretto
from stretto.parallel.context import Attention


class Block(nn.Module):
    """The smallest model that attends: 2 heads of 16."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.qkv = nn.Linear(32, 96)
        self.attention = Attention()
        self.head = nn.Linear(32, 256)

    def forward(self, tokens, positions):
        x = self.embedding(tokens) + torch.sin(positions[..., None] / 10)
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.head(x + self.attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


def main() -> None:
    torch.set_num_threads(1)  # ranks on one machine share its cores
    torch.manual_seed(0)  # equal weights on every rank
    plan = stretto.Plan(kind="train", cp=int(os.environ.get("WORLD_SIZE", "1")))
    mesh = stretto.init_mesh(plan)
    model = Block().to(mesh.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor([list(b"the cat sat on the mat, the dog sat on the log. " * 20)])
    whole = {"input_ids": text[:, :-1], "targets": text[:, 1:]}  # shifted before it is cut
    with stretto.parallelize(model, plan, mesh=mesh):
        own = stretto.shard(whole, mesh, plan)
        own = {name: tensor.to(mesh.device) for name, tensor in own.items()}
        for step in range(int(os.environ.get("STEPS", "50"))):
            logits = model(own["input_ids"], own["position_ids"])
            loss = functional.cross_entropy(
                logits.flatten(0, 1), own["targets"].flatten(), reduction="sum"
            )
            loss = loss / whole["targets"].numel()  # of all ranks
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                mesh.all_reduce(parameter.grad, "cp", "gradients").wait()
            optimizer.step()
            total = mesh.all_reduce(loss.detach(), "cp", "loss").wait()
            if mesh.world_rank == 0 and step % 10 == 9:
                print(f"step {step + 1}: loss {total.item():.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
