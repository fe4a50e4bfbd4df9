"""Outputs that stand in where another rank evaluates: as they were, whoever wrote into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from stretto.diffusion.remembered import Remembered


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor


def test_an_output_is_handed_out_without_a_copy_until_somebody_writes_into_it():
    remembered, made = Remembered(), torch.arange(3.0)
    remembered.put(("unet",), (made, "kept"))
    made.zero_()  # The denoiser's own memory, used again.
    first, word = remembered.get(("unet",))
    assert word == "kept"
    assert remembered.get(("unet",))[0] is first
    first.add_(10)
    second = remembered.get(("unet",))[0]
    second.add_(10)
    assert second is not first
    assert remembered.get(("unet",))[0].tolist() == [0, 1, 2]


def test_views_of_an_output_count_as_written():
    remembered = Remembered()
    remembered.put(("unet",), Output(sample=torch.zeros(2, 2)))
    remembered.get(("unet",)).sample.chunk(2)[1].add_(1)
    found = remembered.get(("unet",))
    assert isinstance(found, Output)
    assert not found.sample.any()


def test_inference_mode_counts_no_writes_so_everything_is_copied():
    remembered = Remembered()
    with torch.inference_mode():
        remembered.put(("unet",), torch.zeros(2))
        remembered.get(("unet",)).add_(1)
        assert remembered.get(("unet",)).tolist() == [0, 0]


def test_the_oldest_forms_are_forgotten():
    remembered = Remembered()
    for form in range(12):
        remembered.put((form,), torch.zeros(1))
    remembered.trim()
    assert 11 in {form for form in range(12) if (form,) in remembered}
    assert (0,) not in remembered
    assert remembered.get((0,)) is None


def test_a_form_in_use_is_not_the_oldest():
    remembered = Remembered()
    for form in range(12):
        remembered.put((form,), torch.zeros(1))
    remembered.get((0,))
    remembered.trim()
    assert (0,) in remembered
    assert (1,) not in remembered
