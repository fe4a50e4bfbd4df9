"""What a window costs a device: its kernels are counted, and none may be waited for.

On the CPU, so what would live on a GPU is told by size, and by descent from what does: the sums and
fits that tensors of latents went into. The scheduler's own arithmetic on noise levels is neither.
"""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stretto.diffusion.hooks import Attachment
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import Pending
from stretto.plan.model import Plan
from stretto.plan.options import Fixed, Steps

SHAPE = (2, 1, 32, 32)
WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
DEGREE = 8


class Device(TorchDispatchMode):
    """Counts operations on what a GPU would hold: launches, and those that the host waits for."""

    def __init__(self):
        super().__init__()
        self.kernels = 0
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_device = any(x.numel() >= 2048 or hasattr(x, "on_device") for x in given)
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not is_device:
            return out
        for tensor in made:
            vars(tensor)["on_device"] = True
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.waits.append(name)
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        # An allocation launches nothing, and what fills it here poisons it for these tests.
        self.kernels += not is_view and not name.startswith(("empty", "fill_"))
        return out


class Silent(torch.nn.Module):
    """A denoiser that launches nothing: what is counted is everything but the network."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.outputs = [torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(40)]

    def forward(self, x, i):
        return (self.outputs[i],)


class Pipeline:
    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.unet = Silent()

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        self.scheduler.is_scale_input_called = True
        x = torch.ones(SHAPE, dtype=torch.bfloat16)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(self.unet(x, i)[0], t, x, return_dict=False)[0]
        return x


def last_rank():
    """The last of the step ranks, alone: its peers send what it sends."""
    mesh = LocalWorld({"step": DEGREE}).mesh(DEGREE - 1)
    mesh.broadcast_bytes = lambda data, axis=None, src=0: data
    mesh.all_gather = lambda tensor, axis, phase: Pending(lambda: [tensor] * mesh.size(axis))
    mesh.broadcast = lambda tensor, axis, src, phase: Pending(lambda: tensor)
    assert mesh.rank("step") == DEGREE - 1
    return mesh


def counted(pipe, steps, plan=None, mesh=None):
    attachment = plan and Attachment(pipe, plan, mesh or last_rank()).attach()
    try:
        with torch.no_grad(), Device() as seen:
            pipe(steps)
    finally:
        if attachment:
            attachment.detach()
    return seen


@pytest.mark.parametrize(
    ("scheduler", "carried"),
    [
        (FlowMatchEulerDiscreteScheduler(), 0),
        (DDIMScheduler(clip_sample=False), 2 * (DEGREE - 1)),
        (EulerDiscreteScheduler(), 2 * (DEGREE - 1)),
    ],
    ids=["flow", "ddim", "euler"],
)
def test_kernels_of_a_window(scheduler, carried):
    """Beside the scheduler's own: a few per window, however many steps it has."""
    pipe = Pipeline(scheduler)
    plan = Plan(step=Steps(degree=DEGREE, windows=Fixed(warmup=1), exact_split=False))
    plain = [counted(pipe, steps).kernels for steps in (20, 21)]
    per_step = plain[1] - plain[0]
    assert per_step > 0
    runs = [counted(pipe, 1 + DEGREE * windows, plan) for windows in (3, 4)]
    per_window = runs[1].kernels - runs[0].kernels
    # Every position but the own is walked with a guess, then all of them truly. The stand-in for
    # the network's output launches nothing; 19 were measured beside these (2 the guesses, 2 the
    # line, 8 its fit, 3 the exchange, 3 the error of the latents), a few more leave room for
    # another torch. What one operation a position adds does not fit.
    own = 22 + carried
    assert (2 * DEGREE - 1) * per_step < per_window <= (2 * DEGREE - 1) * per_step + own
    assert len(runs[1].waits) == len(runs[0].waits), runs[1].waits


def test_kernels_of_a_step_on_one_rank():
    """Nothing is guessed, so nothing is kept: a prediction is looked at once, for NaN."""
    pipe, mesh = Pipeline(EulerDiscreteScheduler()), LocalWorld({}).mesh(0)
    plain = [counted(pipe, steps).kernels for steps in (20, 21)]
    ours = [counted(pipe, steps, Plan(), mesh).kernels for steps in (20, 21)]
    assert (ours[1] - ours[0]) - (plain[1] - plain[0]) == 1
