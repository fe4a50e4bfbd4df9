"""The steps benchmark: depths, ceilings and summaries by arithmetic, and all of it once, tiny."""

import math

import pytest
import torch

from stretto.bench import fidelity, speed, steps
from stretto.bench.fidelity import Setting, Subject
from stretto.bench.speed import METHODS, Lap, Laps, Race

WINDOWS = {"step": (1, 2, 2, 1), "cfg": (1,) * 6}


def report(method):
    sizes = WINDOWS["step" if method.plan.step.degree > 1 else "cfg"]
    return {
        "windows": [{"size": size, "error": None} for size in sizes],
        "network_calls": 7,
        "bytes_sent": 1000,
    }


def laps_of(rank, seconds):
    """Laps in which sequential takes `seconds`, twice, and everything else half of it."""
    found = Laps([], [0.2, 0.2], [0.12, 0.12])
    for method in METHODS:
        lap = Lap(pictures=torch.zeros(2, 1, 4, 4))
        if method.plan or method.together or rank == 0:
            own = seconds if method.who == "sequential" else seconds / 2
            lap.seconds = [own, own + rank]
            lap.denoiser_s = [own / 2, own / 2]
            lap.report = report(method) if method.plan else None
        found.laps.append(lap)
    return found


def row_of(rows, who, guided):
    return next(row for row in rows if (row["who"], row["guidance"]) == (who, guided))


@pytest.fixture
def rows():
    race = Race(steps=6, images=2, repeats=2)
    return speed.rows(race, [laps_of(0, 12.0), laps_of(1, 12.0)], half=0.6)


def test_the_last_rank_ends_a_method(rows):
    assert row_of(rows, "cfg2", True)["seconds"] == [6.0, 7.0]
    assert row_of(rows, "cfg2", True)["speedup"] == 12.0 / 6.5
    assert row_of(rows, "sequential", True)["speedup"] == 1.0
    assert row_of(rows, "sequential", True)["ranks"] == 1


def test_depth_counts_half_batches_at_their_cost(rows):
    cfg = row_of(rows, "cfg2", True)
    assert cfg["depth"] == pytest.approx(6 * 0.6)
    assert cfg["ceiling_ideal"] == 2.0
    # Two exact steps whose batch is cut, two windows of two.
    assert row_of(rows, "step2 tail", True)["depth"] == pytest.approx(2 + 2 * 0.6)
    # Without guidance a batch stays whole, and the published schedule always keeps it whole.
    assert row_of(rows, "step2 tail", False)["depth"] == 4.0
    assert row_of(rows, "parastep p=2", True)["depth"] == 4.0
    assert cfg["of_ceiling"] == cfg["speedup"] / cfg["ceiling"]


def test_summary_of_speed_has_the_agreed_keys(rows):
    found = steps.speed_summary(rows)
    assert found["ceiling_2ranks"] == 6 / 4
    assert found["ceiling_2ranks_cfg2"] == pytest.approx(1 / 0.6)
    assert found["speedup_2ranks"] == 12.0 / 6.5
    assert found["bytes_per_rank"] == found["bytes_per_rank_cfg2"] == 1000
    assert found["machine_2ranks"] == 2 * 12.0 / 6.5
    assert found["of_reachable"] == pytest.approx(found["speedup_2ranks"] / 1.5 / (12.0 / 6.5))


def test_summary_of_fidelity_by_model_and_degree():
    values = {"parastep": 20.0, "tail": 30.0, "calibrated": 34.0, "fewer steps": 25.0}
    values |= {"fewer steps, UniPC": 31.0}
    rows = [{"model": "dit", "degree": 1, "who": "noise floor", "psnr_db": 130.0}]
    rows += [
        {"model": m, "degree": p, "who": who, "psnr_db": db + p, "psnr_worst_item_db": db}
        for m in ("dit", "unet")
        for p in (4, 8)
        for who, db in values.items()
    ]
    found = steps.fidelity_summary(rows)
    assert found["noise_floor_db"] == {"dit": 130.0}
    assert found["psnr_tail_db"] == {m: {"p4": 34.0, "p8": 38.0} for m in ("dit", "unet")}
    assert found["psnr_best_fewer_steps_db"]["unet"]["p4"] == 35.0
    assert found["margin_calibrated_over_parastep_db"]["dit"] == {"p4": 14.0, "p8": 14.0}
    assert found["margin_calibrated_over_fewer_steps_db"]["dit"]["p8"] == 9.0
    assert found["margin_calibrated_over_best_fewer_steps_db"]["dit"]["p8"] == 3.0
    assert found["margin_tail_over_parastep_db"]["unet"]["p4"] == 10.0


def test_summary_of_a_part_of_the_rows():
    """A file written on the way holds margins only between methods that were both measured."""
    rows = [
        {"model": "dit", "degree": p, "who": who, "psnr_db": 30.0, "psnr_worst_item_db": 29.0}
        for p, who in ((8, "parastep"), (8, "tail"), (4, "tail"))
    ]
    found = steps.fidelity_summary(rows)
    assert found["margin_tail_over_parastep_db"] == {"dit": {"p8": 0.0}}
    assert found["margin_calibrated_over_parastep_db"] == {}
    assert found["noise_floor_db"] == {}


def test_every_part_is_measured_by_one_process():
    for ranks in (1, 2, 3):
        tasks = [task for tasks in fidelity.shares(ranks) for task in tasks]
        assert sorted(tasks) == sorted(set(tasks))
        assert set(tasks) == fidelity.TASKS.keys()
    first, second = (sum(fidelity.TASKS[task] for task in tasks) for tasks in fidelity.shares(2))
    assert max(first, second) <= 0.55 * (first + second)


def test_held_out_means_other_classes_and_seeds():
    assert not {*fidelity.CALIBRATED} & {*fidelity.HELD_OUT}
    count = Setting().calibration_images
    assert fidelity.MEASURED_SEED + count <= fidelity.CHOSEN_SEED
    assert fidelity.CHOSEN_SEED + 2 * count <= fidelity.HELD_OUT_SEED


@pytest.mark.parametrize("model", ["unet", pytest.param("dit", marks=pytest.mark.ranks)])
def test_rows_of_a_model_at_one_depth(model):
    setting = Setting(steps=5, images=2, calibration_images=1, degrees=(2, 3))
    said = []
    subject = Subject(model, setting, said.append)
    rows = [*subject.uncalibrated(), *subject.calibrated()]
    for degree in setting.degrees:
        by_name = {row["who"]: row for row in rows if row["degree"] == degree}
        assert sum(name.startswith("fewer steps,") for name in by_name) == 2
        methods = [by_name[who] for who in ("parastep", "tail", "calibrated")]
        assert {len(row["windows"]) for row in methods} == {by_name["fewer steps"]["depth"]}
        assert all(math.isfinite(row["psnr_db"]) for row in methods)
    (floor,) = [row for row in rows if row["who"] == "noise floor"]
    assert floor["depth"] == 5
    assert floor["psnr_db"] > max(row["psnr_db"] for row in rows if row is not floor)
    assert said[0] == f"{model} sequential"


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_rows_come_one_by_one_and_do_not_depend_on_the_processes():
    setting = Setting(steps=5, images=1, calibration_images=1, degrees=(2,))
    counts = []
    together = fidelity.measure(setting, keep=lambda rows: counts.append(len(rows)))
    assert together == fidelity.measure(setting, ranks=1)
    assert counts == sorted(counts)
    assert 0 < counts[0] < len(together)


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_the_race_on_real_ranks():
    rows, facts = speed.measure(Race(steps=5, images=1, repeats=1))
    assert len(rows) == len(METHODS)
    assert all(row["median_s"] > 0 for row in rows)
    assert row_of(rows, "independent runs", True)["identical"]
    assert row_of(rows, "cfg2", True)["psnr_db"] > 90
    assert row_of(rows, "cfg2", True)["evaluations"] == [5, 5]
    assert max(row_of(rows, "step2 tail", False)["bytes_sent"]) > 0
    assert facts["half_batch_cost"] > 0
