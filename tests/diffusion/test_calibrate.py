"""Calibration: local errors against brute force, plans against verification."""

import pytest
import torch

from stretto.diffusion.api import emulate
from stretto.diffusion.calibrate import calibrate, calibrations, tensor_of
from stretto.diffusion.calibration import write_calibration
from stretto.diffusion.local_errors import (
    Record,
    fitted_damping,
    fresh,
    local_errors,
    record,
)
from stretto.errors import ConfigError, LatentsEdited, PlanMismatch, UnsupportedPipeline
from stretto.plan.model import Plan
from stretto.plan.options import Calibrated, Listed, Parastep, Steps
from stretto.testing import models

#: A one-step, a multistep, a stochastic, a doubled-grid and a recurrent scheduler.
SCHEDULERS = ("sd3-flow", "sd15-unipc", "sd15-euler-ancestral", "sd15-heun", "cogvideox-dpm")
STEPS = 6


def pipeline(name):
    pipe = models.CASES[name].pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(name, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    inputs = models.CASES[name].inputs()
    return {"num_inference_steps": STEPS, **inputs, "generator": generator, **more}


def latents_after(pipe, call, plan, step):
    """Latents as the run under `plan` has them after `step` steps, by a callback."""
    seen = {}

    def keep(pipe, index, timestep, values):
        seen[index] = values["latents"].clone()
        return {}

    with emulate(pipe, plan):
        pipe(**fresh(call), callback_on_step_end=keep)
    return seen[step - 1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_local_errors_are_those_of_single_windows(name):
    """Exact steps up to the window, then the window: the emulation's own latents, to the bit."""
    pipe, call, degree = pipeline(name), call_of(name), 3
    known = record(pipe, call)
    damping = fitted_damping([known], degree)
    sizes = (1,) * known.num_steps
    option = Listed(sizes=sizes, damping=damping)
    steps = Steps(degree=degree, windows=option, exact_split=False)
    errors = local_errors(pipe, call, known, steps)
    assert len(errors) > known.num_steps
    for start, size in ((1, 2), (2, 3), (3, 2)):
        rest = known.num_steps - start - size
        single = (1,) * start + (size,) + (1,) * rest
        option = Listed(sizes=single, damping=damping)
        plan = Plan(step=Steps(degree=degree, windows=option, exact_split=False))
        alone = latents_after(pipe, call, plan, start + size)
        true = known.results[start + size - 1][0]
        assert errors[start, size] == (alone.double() - true.double()).square().mean().item()
        assert errors[start, size] > 0


def test_every_window_is_measured_and_exact_steps_cost_nothing():
    pipe, call = pipeline("sd3-flow"), call_of("sd3-flow")
    known = record(pipe, call)
    errors = local_errors(pipe, call, known, Steps(degree=4, predictor="repeat"))
    wanted = {(i, w) for i in range(1, STEPS) for w in range(2, min(4, STEPS - i) + 1)}
    assert {key for key in errors if key[1] > 1} == wanted
    assert all(value == 0 for (_, size), value in errors.items() if size == 1)


def test_the_record_is_the_plain_run_and_survives_its_passes():
    """Windows start from untouched states, or a second pass would differ from the first."""
    pipe, call = pipeline("sd15-unipc"), call_of("sd15-unipc")
    known = record(pipe, call)
    assert torch.equal(known.results[-1][0], tensor_of(pipe(**fresh(call))).float())
    steps = Steps(degree=3, predictor="repeat")
    assert local_errors(pipe, call, known, steps) == local_errors(pipe, call, known, steps)


def test_windows_that_forget_to_return_to_the_record_would_be_noticed(monkeypatch):
    from stretto.diffusion import local_errors as module

    pipe, call = pipeline("sd3-flow"), call_of("sd3-flow")
    known = record(pipe, call)
    monkeypatch.setattr(module, "_REPRODUCIBLE", 0.0)
    local_errors(pipe, call, known, Steps(degree=3, predictor="repeat"))
    gone_on = lambda self: self.run.port._last_result  # noqa: E731
    monkeypatch.setattr(module._MeasuredWindows, "_back_on_record", gone_on)
    with pytest.raises(UnsupportedPipeline, match="does not repeat"):
        local_errors(pipe, call, known, Steps(degree=3, predictor="repeat"))


def test_stored_damping_is_the_least_squares_fit():
    """On an even grid, changes that shrink by 0.4 want 0.4 of the line, and 0.28 two steps on."""
    noise = [1.0 - n / 8 for n in range(9)]

    def damping(*changes):
        values = torch.tensor(changes, dtype=torch.float64).cumsum(0)
        return fitted_damping([Record(noise=noise, guided=list(values[:, None]))], 3)

    assert damping(1, 0.4, 0.4**2, 0.4**3, 0.4**4) == pytest.approx((0.4, 0.28))
    assert damping(1, 1, 1, 1, 1) == pytest.approx((1.0, 1.0))
    assert damping(1, -1, 1, -1, 1) == (0.0, 0.0)
    assert damping(1, 2, 4, 8) == (1.0, 1.0)
    assert damping(0, 0, 0) == (0.0, 0.0)
    # Two records: the sums of products are pooled, so the larger changes weigh more.
    records = [
        Record(noise=noise, guided=[torch.tensor([float(v)]) for v in values])
        for values in ((0, 1, 1.4), (0, 3, 5.4))
    ]
    assert fitted_damping(records, 2) == pytest.approx(((1 * 0.4 + 3 * 2.4) / (1 + 9),))


@pytest.fixture(scope="module")
def measured():
    """One calibration of a tiny pipeline, shared by the tests that only look at it."""
    pipe = pipeline("sd3-flow")
    calls = [call_of("sd3-flow", seed) for seed in (0, 1)]
    held_out = [call_of("sd3-flow", 2)]
    said = []
    found = calibrate(pipe, calls, degree=3, holdout=held_out, say=said.append)
    return pipe, found, held_out[0], said


def test_the_frontier_holds_the_best_of_what_was_tried(measured):
    _, found, _, said = measured
    assert found.depths == (3, 4)
    for entry in found.frontier:
        assert sum(entry.windows) == STEPS
        assert len(entry.windows) <= entry.depth
        assert entry.verified_db >= entry.tail_db
        assert entry.damping in ((), found.damping)
    assert found.evidence.calls[1]["generator"] == {"seed": 1}
    assert found.evidence.guidance is True
    assert found.evidence.floor_db > 80
    assert found.evidence.basis == "measured"
    assert said[0].startswith("recording 2")


@pytest.mark.parametrize("depth", [3, 4])
def test_a_calibrated_run_is_bitwise_the_verified_one(measured, tmp_path, depth):
    pipe, found, call, _ = measured
    write_calibration(found, tmp_path / "plan.yaml")
    from stretto.diffusion.quality import psnr

    reference = tensor_of(pipe(**fresh(call)))
    option = Calibrated(file=str(tmp_path / "plan.yaml"), depth=depth)
    with emulate(pipe, Plan(step=Steps(degree=3, windows=option))) as run:
        output = tensor_of(pipe(**fresh(call)))
    entry = found.entry(depth)
    assert run.report.sizes == entry.windows
    again = psnr(output, reference, data_range=found.evidence.data_range).mean
    assert again == entry.verified_db


def test_parastep_is_measured_at_the_same_depth(measured):
    pipe, found, call, _ = measured
    reference = tensor_of(pipe(**fresh(call)))
    warmups = {3: None, 4: 2}
    from stretto.diffusion.quality import psnr

    for depth, warmup in warmups.items():
        option = Parastep(warmup=warmup)
        with emulate(pipe, Plan(step=Steps(degree=3, windows=option))) as run:
            output = tensor_of(pipe(**fresh(call)))
        assert run.report.depth == depth
        value = psnr(output, reference, data_range=found.evidence.data_range).mean
        assert found.entry(depth).parastep_db == value


def test_asked_depths_up_to_all_steps(measured):
    pipe, _, call, _ = measured
    found = calibrate(pipe, [call_of("sd3-flow")], degree=2, depths=[6, 4], holdout=[call])
    assert found.depths == (4, 6)
    assert found.entry(6).windows == (1,) * STEPS
    assert found.entry(6).predicted == 0
    assert found.entry(6).verified_db >= found.entry(4).verified_db


def test_a_pipeline_that_edits_latents_is_refused_with_the_reason():
    pipe, call = pipeline("sd15-inpaint"), call_of("sd15-inpaint")
    with pytest.raises(UnsupportedPipeline, match=r"leader walk.*use windows tail") as caught:
        calibrate(pipe, [call], degree=2, holdout=[call])
    assert not isinstance(caught.value, LatentsEdited)


def test_a_call_without_a_seed_is_refused():
    pipe, call = pipeline("sd3-flow"), call_of("sd3-flow")
    del call["generator"]
    with pytest.raises(UnsupportedPipeline, match="does not repeat: at step"):
        calibrate(pipe, [call], degree=2, holdout=[call])


def test_requests_that_cannot_be_met():
    pipe, call = pipeline("sd3-flow"), call_of("sd3-flow")
    with pytest.raises(PlanMismatch, match="every step is exact"):
        calibrate(pipe, [call], degree=1, holdout=[call])
    with pytest.raises(ConfigError, match=r"0 held-out call"):
        calibrate(pipe, [call], degree=2, holdout=[])
    with pytest.raises(PlanMismatch, match=r"depth \[2, 9\].*between 4 and 6"):
        calibrate(pipe, [call], degree=2, depths=[2, 5, 9], holdout=[call])
    with pytest.raises(PlanMismatch, match="step=7 for 6"):
        calibrate(pipe, [call], degree=7, holdout=[call])
    other = call_of("sd3-flow", num_inference_steps=5)
    with pytest.raises(ConfigError, match="2 different noise grids"):
        calibrate(pipe, [call, other], degree=2, holdout=[call])


def test_leaving_restores_the_pipeline():
    pipe, call = pipeline("sd3-flow"), call_of("sd3-flow")
    plain, kind = tensor_of(pipe(**fresh(call))), type(pipe)
    local_errors(pipe, call, record(pipe, call), Steps(degree=2))
    assert type(pipe) is kind
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(tensor_of(pipe(**fresh(call))), plain)


def test_pictures_become_one_tensor():
    import numpy as np
    from PIL import Image

    white = Image.fromarray(np.full((4, 6, 3), 255, np.uint8))
    assert tensor_of(([white, white],)).shape == (2, 4, 6, 3)
    assert tensor_of(([[white, white]],)).shape == (1, 2, 4, 6, 3)
    assert tensor_of(([white],)).max() == 1.0
    assert tensor_of((torch.ones(2, 3),)).dtype == torch.float64


def test_several_degrees_at_once_are_the_single_ones():
    """Windows of a larger degree begin with those of a smaller one, to the bit."""
    pipe, calls = pipeline("sd15-unipc"), [call_of("sd15-unipc", seed) for seed in (0, 1)]
    depths = {2: [4], 3: [3, 4]}
    together = calibrations(pipe, calls[:1], depths=depths, holdout=calls[1:])
    for degree, wanted in depths.items():
        alone = calibrate(pipe, calls[:1], degree=degree, depths=wanted, holdout=calls[1:])
        assert together[degree].frontier == alone.frontier
        assert together[degree].damping == alone.damping
