"""Checks of values, at once on the CPU; the streams of a GPU are left to its benchmarks."""

import torch

from stretto.diffusion.deferred import Aside, Deferred


def test_a_check_on_the_cpu_is_made_at_once():
    deferred, seen = Deferred(Aside()), []
    with deferred.aside(torch.ones(2)):
        deferred.check(torch.tensor(3.0), seen.append)
    assert seen == [torch.tensor(3.0)]
    deferred.close_window()
    deferred.finish()
    assert len(seen) == 1
