"""The fixtures themselves: poison reaches stretto's allocations and nobody else's."""

import math

import torch

from tests.conftest import poisoning


def called_from(module, source):
    """Evaluate `source` as if it stood in `module`, with poisoned allocators in reach."""
    names = {"__name__": module, "torch": torch, "empty": poisoning(torch.empty)}
    names["new_empty"] = poisoning(torch.Tensor.new_empty)
    return eval(source, names)


def test_poison_fills_what_stretto_allocates():
    assert called_from("stretto.mesh.mesh", "empty(3)").isnan().all()
    assert called_from("stretto.ops", "new_empty(torch.ones(2), (4,))").isnan().all()
    integers = called_from("stretto", "empty(3, dtype=torch.int16)")
    assert integers.tolist() == [torch.iinfo(torch.int16).max] * 3


def test_poison_leaves_other_libraries_alone():
    # Uninitialised memory may hold anything, NaN too, so look for the call and not the value.
    filled = []
    allocate = poisoning(lambda: filled.append(1) or torch.full((1,), 7.0))
    eval("allocate()", {"__name__": "diffusers.models", "allocate": allocate})
    assert filled == [1]
    assert eval("allocate()", {"__name__": "strettonian", "allocate": allocate}).item() == 7.0
    assert math.isnan(eval("allocate()", {"__name__": "stretto", "allocate": allocate}).item())


def test_one_thread():
    assert torch.get_num_threads() == 1
