"""What every test gets: one thread, a seed, no hub, and poisoned uninitialised memory."""

import functools
import os
import sys

# Before torch is imported: thread pools read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

#: Folders whose tests see NaN wherever stretto reads memory that it did not write.
POISONED = ("tests.diffusion", "tests.mesh", "tests.ops")

torch.set_num_threads(1)
# `with torch.device(...)` remembers, at its first use, which functions make tensors: that must be
# torch's own and not the poisoned ones, or the device is ignored from then on.
with torch.device("cpu"):
    torch.empty(0)
# No deadline, because tests assert no times; derandomized, because a red run must repeat.
settings.register_profile("stretto", deadline=None, derandomize=True)
settings.load_profile("stretto")


def pytest_collection_modifyitems(items):
    """Skip the gpu lane where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    """One seed for each test, so that no test depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empties(request, monkeypatch):
    """`torch.empty` and its kin, called from stretto, return NaN or the extreme integer."""
    if request.module.__name__.startswith(POISONED):
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


def poisoning(allocate):
    """`allocate`, filled with poison when its caller is a module of stretto."""

    @functools.wraps(allocate)
    def call(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "stretto" and not torch.compiler.is_compiling():
            poison(tensor)
        return tensor

    return call


def poison(tensor):
    """Overwrite with what no computation survives unnoticed."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype is torch.bool:
            tensor.fill_(True)
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
