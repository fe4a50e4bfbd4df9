"""Workloads: files, defaults, and the arithmetic of a cut batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.errors import ConfigError
from stretto.workload import denoise
from stretto.workload.model import Workload
from tests.fresh import modules_after

SECOND = {"evaluation_seconds": 1.0, "guided_bytes": 1000}


@given(
    steps=st.integers(1, 40),
    guidance=st.sampled_from(["none", "batch", "calls"]),
    seconds=st.floats(1e-6, 1e4),
    half=st.floats(0.01, 1),
    guided=st.integers(0, 2**40),
    raw=st.none() | st.integers(0, 2**40),
    own_noise=st.booleans(),
)
def test_round_trip(tmp_path_factory, steps, guidance, seconds, half, guided, raw, own_noise):
    made = Workload.denoise(
        steps,
        guidance=guidance,
        evaluation_seconds=seconds,
        half_batch_cost=half,
        guided_bytes=guided,
        raw_bytes=raw,
        noise=denoise.flow_noise(steps, 3.0) if own_noise else None,
        encode_seconds=seconds / 7,
        memory_bytes=guided + 1,
    )
    path = tmp_path_factory.mktemp("workload") / "w.yaml"
    made.write(path)
    assert Workload.read(path) == made


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "either `seconds` or `flops`"),
        ({**SECOND, "evaluation_flops": "1 TFLOP"}, "either `seconds` or `flops`"),
        ({**SECOND, "noise": (1.0, 0.5)}, "2 fractions for 4 steps, 5 are needed"),
        ({**SECOND, "rows": 3}, "3 is odd"),
        ({**SECOND, "half_batch_cost": 1.5}, "evaluation.half_batch_cost"),
        ({**SECOND, "guided_bytes": "1.5 B"}, "not a whole number"),
        ({**SECOND, "guidence": "none"}, "guidence: Extra inputs"),
        ({"evaluation_seconds": "1 fortnight"}, "evaluation.seconds: '1 fortnight'"),
    ],
)
def test_faults_are_named(fields, match):
    with pytest.raises(ConfigError, match=match):
        Workload.denoise(4, **fields)


def test_raw_output_follows_from_guidance():
    def raw(**fields):
        return denoise.raw_bytes_of(Workload.denoise(4, **SECOND, **fields))

    assert raw() == 2000
    assert raw(guidance="calls") == raw(guidance="none") == 1000
    assert raw(raw_bytes=7) == 7


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_part_never_costs_more_than_the_whole(half, fraction):
    assert 0 < denoise.share(half, fraction) <= 1
    assert denoise.share(half, 1) == 1
    assert denoise.share(half, 0.5) == pytest.approx(half)


def test_chunks_divide_the_rows():
    assert [denoise.chunks_of(rows, 4) for rows in (1, 2, 3, 4, 6, 7)] == [1, 2, 3, 4, 3, 1]


def test_flow_noise_by_hand():
    assert denoise.flow_noise(2, 3.0) == (1.0, 0.75, 0.0)


def test_nouns_need_no_torch():
    code = "import stretto\nstretto.Workload, stretto.Cluster, stretto.estimate, stretto.explain"
    assert not modules_after(code) & {"torch", "diffusers", "transformers", "numpy"}
