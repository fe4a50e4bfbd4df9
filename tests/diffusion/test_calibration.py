"""The calibration file: round trip, refusals by name, the plan it resolves to, one file for all."""

from dataclasses import replace

import pytest
import torch
import yaml

from stretto.diffusion.api import emulate
from stretto.diffusion.calibration import (
    Calibration,
    Entry,
    Evidence,
    fingerprint,
    read_calibration,
    resolved,
    write_calibration,
)
from stretto.errors import ConfigError, PlanMismatch
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Calibrated, Listed, Steps
from stretto.testing import models

CASE = models.CASES["sd3-flow"]
SIZES = (1, 2, 2, 1, 2)


@pytest.fixture(scope="module")
def pipe():
    built = CASE.pipeline()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def grid(pipe):
    """The noise fractions that a run of this case really has."""
    from stretto.diffusion.local_errors import record

    return tuple(record(pipe, call_of()).noise)


def call_of(**more):
    seed = torch.Generator().manual_seed(0)
    return {**CASE.inputs(), "num_inference_steps": CASE.steps, "generator": seed, **more}


def entry(**changes):
    fields = {
        "depth": 5,
        "windows": SIZES,
        "predictor": "damped",
        "damping": (0.1 + 0.2,),
        "predicted": 1e-7,
        "verified_db": 40.0,
        "tail_db": 39.0,
        "parastep_db": float("inf"),
    }
    return Entry(**{**fields, **changes})


def calibration(pipe, grid, **changes):
    evidence = Evidence(
        calls=({"generator": {"seed": 0}},),
        holdout=({"generator": {"seed": 1}},),
        guidance=True,
        data_range=1.0,
        floor_db=float("inf"),
        dtype="float32",
        device="cpu",
        date="2026-01-01",
        versions={"torch": "2.13.0"},
    )
    fields = {
        "subject": fingerprint(pipe),
        "degree": 2,
        "steps": len(grid) - 1,
        "noise": grid,
        "damping": (0.1 + 0.2,),
        "frontier": (entry(),),
        "evidence": evidence,
    }
    return Calibration(**{**fields, **changes})


@pytest.fixture
def file(pipe, grid, tmp_path):
    path = tmp_path / "plan.yaml"
    write_calibration(calibration(pipe, grid), path)
    return path


def plan_of(path, **changes):
    windows = Calibrated(file=str(path), depth=changes.pop("depth", 5))
    return Plan(step=Steps(**{"degree": 2, "windows": windows, **changes}))


def test_round_trip_keeps_every_bit(pipe, grid, file):
    assert read_calibration(file) == calibration(pipe, grid)
    assert "windows: 1 2 2 1 2\n" in file.read_text()


def test_it_resolves_to_listed_windows_bound_to_the_grid(pipe, grid, file):
    found = resolved(plan_of(file), pipe).step
    assert found.windows == Listed(sizes=SIZES, damping=(0.1 + 0.2,), grid=grid)
    assert found.predictor == "damped"
    assert found.walk == "auto"


def test_other_plans_pass_unchanged(pipe):
    plan = Plan(step=3, cfg=2)
    assert resolved(plan, pipe) is plan


def test_the_default_depth_is_the_published_one(pipe, grid, tmp_path):
    path = tmp_path / "plan.yaml"
    write_calibration(calibration(pipe, grid), path)
    assert resolved(plan_of(path, depth=None), pipe).step.windows.sizes == SIZES
    write_calibration(calibration(pipe, grid, frontier=(entry(depth=6),)), path)
    with pytest.raises(PlanMismatch, match=r"depth 5 is not in the calibration, it has 6"):
        resolved(plan_of(path, depth=None), pipe)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("pipeline", "FluxPipeline"),
        ("transformer", "FluxTransformer2DModel"),
        ("transformer config", "sha256:0000000000000000"),
        ("scheduler", "DDIMScheduler"),
        ("scheduler config", "sha256:0000000000000000"),
    ],
)
def test_each_difference_is_named_with_both_sides(pipe, grid, tmp_path, name, other):
    path = tmp_path / "plan.yaml"
    subject = {**fingerprint(pipe), name: other}
    write_calibration(calibration(pipe, grid, subject=subject), path)
    with pytest.raises(PlanMismatch) as caught:
        resolved(plan_of(path), pipe)
    message = str(caught.value)
    assert f"{name}: {fingerprint(pipe)[name]} here, {other} in the file" in message
    assert message.count(" in the file") == 1
    assert "stretto generate calibrate FOLDER --degree 2 --steps 8" in message


def test_all_differences_are_named_at_once(pipe, grid, file):
    other = models.OTHERS | models.CASES
    with pytest.raises(PlanMismatch) as caught:
        resolved(plan_of(file, degree=3), other["flux-distilled"].pipeline())
    message = str(caught.value)
    for name in ("pipeline:", "transformer:", "transformer config:", "degree: 3 here, 2 in"):
        assert name in message


def test_a_changed_setting_of_the_scheduler_is_seen(pipe, file):
    """The mutation of the fingerprint check: the same classes, one number different."""
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, shift=1.5)
    try:
        with pytest.raises(PlanMismatch, match="scheduler config: sha256"):
            resolved(plan_of(file), pipe)
    finally:
        pipe.scheduler = scheduler
    resolved(plan_of(file), pipe)


def test_a_check_that_compares_nothing_would_be_noticed(pipe, grid, tmp_path, monkeypatch):
    """Break the fingerprint: the refusals above rest on it alone."""
    path = tmp_path / "plan.yaml"
    subject = {**fingerprint(pipe), "scheduler config": "sha256:0000000000000000"}
    write_calibration(calibration(pipe, grid, subject=subject), path)
    monkeypatch.setattr("stretto.diffusion.calibration.fingerprint", lambda *_, **__: subject)
    resolved(plan_of(path), pipe)


def test_bookkeeping_does_not_count_as_configuration(pipe):
    before = fingerprint(pipe)
    pipe.scheduler.register_to_config(_name_or_path="/elsewhere")
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("predictor", ["taylor-2", "own"])
def test_a_predictor_of_ones_own_is_refused(pipe, file, predictor):
    with pytest.raises(PlanMismatch, match=f"predictor: {predictor} here"):
        resolved(plan_of(file, predictor=predictor), pipe)


def test_other_step_counts_are_refused_when_the_grid_is_known(pipe, file):
    with (
        emulate(pipe, plan_of(file)),
        pytest.raises(PlanMismatch, match=r"steps: 7 in this generation, 8 in the calibration"),
    ):
        pipe(**call_of(num_inference_steps=7))


def test_another_noise_grid_is_refused_with_the_step_where_it_differs_most(pipe, grid, tmp_path):
    path = tmp_path / "plan.yaml"
    other = (*grid[:3], grid[3] + 0.01, *grid[4:])
    write_calibration(calibration(pipe, grid, noise=other), path)
    with emulate(pipe, plan_of(path)), pytest.raises(PlanMismatch, match="noise grid: step 3 of 8"):
        pipe(**call_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stretto": "calibration/9"},
            "`stretto: calibration/9`, needed is `stretto: calibration/1`",
        ),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"degree": None}, "degree: Input should be a valid integer"),
        ({"steps": 9}, "9 steps, but 9 noise fractions"),
        ({"frontier": [{**entry().model_dump(), "windows": "1 2"}]}, "windows cover 3 steps"),
        ({"frontier": [{**entry().model_dump(), "depth": 4}]}, "of depth 4 has 5 windows"),
    ],
)
def test_a_file_that_is_no_calibration(pipe, file, change, message):
    document = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**document, **change}, sort_keys=False))
    with pytest.raises(PlanMismatch) as caught:
        resolved(plan_of(file), pipe)
    assert message in str(caught.value)


def test_a_missing_file(pipe, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        resolved(plan_of(tmp_path / "none.yaml"), pipe)


def test_all_ranks_take_the_file_of_rank_0(pipe, file):
    """Other ranks may have no file, or another one: they never read theirs."""

    def body(mesh):
        plan = plan_of(file if mesh.world_rank == 0 else "/nowhere/plan.yaml")
        return resolved(plan, pipe, mesh=mesh).step

    first, second = LocalWorld({"step": 2}).run(body)
    assert first == second
    assert first.windows.sizes == SIZES


def test_a_file_that_rank_0_cannot_read_fails_every_rank(pipe, tmp_path):
    errors = []

    def body(mesh):
        try:
            resolved(plan_of(tmp_path / "none.yaml"), pipe, mesh=mesh)
        except ConfigError as error:
            errors.append(str(error))

    LocalWorld({"step": 2}).run(body)
    assert len(errors) == 2
    assert all("No such file" in text for text in errors)


def test_the_rest_of_the_step_option_is_kept(pipe, file):
    plan = plan_of(file, walk="replay", exact_split=False)
    found = resolved(plan, pipe).step
    assert replace(found, windows=plan.step.windows) == plan.step
