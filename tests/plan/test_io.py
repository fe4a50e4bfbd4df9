"""Plan files: round trip of every option, faults by name, written whole or not at all."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.io import (
    SCHEMA,
    parse_plan,
    read_document,
    read_plan,
    write_document,
    write_plan,
)
from stretto.plan.model import Origin, Plan
from stretto.plan.options import (
    PREDICTORS,
    SPLITS,
    WALKS,
    Adaptive,
    Calibrated,
    Fixed,
    Guidance,
    Listed,
    Parastep,
    Steps,
    Tail,
)

KINDS = "parastep, tail, fixed, listed, calibrated, adaptive"

counts = st.integers(1, 64)
maybe = st.none() | counts
fractions = st.lists(st.floats(0, 1), max_size=4).map(tuple)
sizes = st.lists(counts, min_size=1).map(tuple)
windows = st.one_of(
    st.builds(Parastep, warmup=maybe),
    st.builds(Tail, depth=maybe),
    st.builds(Fixed, warmup=counts, cooldown=counts),
    st.builds(Listed, sizes=sizes, damping=fractions, grid=fractions),
    st.builds(Calibrated, file=st.text(min_size=1), depth=maybe),
    st.builds(Adaptive, tolerance=st.floats(0, 1)),
)
steps = st.builds(
    Steps,
    degree=counts,
    windows=windows,
    predictor=st.sampled_from(PREDICTORS),
    walk=st.sampled_from(WALKS),
    exact_split=st.booleans(),
)
guidance = st.builds(Guidance, degree=counts, split=st.sampled_from(SPLITS))
origins = st.builds(
    Origin,
    by=st.text(),
    basis=st.sampled_from(["measured", "simulated", "projected"]),
    note=st.text(),
)


@given(plan=st.builds(Plan, step=steps, cfg=guidance, origin=st.none() | origins))
def test_every_plan_survives_a_file(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    write_plan(plan, path)
    assert read_plan(path) == plan


def test_the_file_is_plain_yaml_that_names_its_schema_first(tmp_path):
    path = tmp_path / "new" / "plan.yaml"
    write_plan(Plan(step=4, cfg=2), path)
    assert path.read_text().startswith(f"stretto: {SCHEMA}\n")
    assert yaml.safe_load(path.read_text()) == {
        "stretto": "plan/1",
        "kind": "generate",
        "step": {
            "degree": 4,
            "windows": {"kind": "tail"},
            "predictor": "damped",
            "walk": "auto",
            "exact_split": True,
        },
        "cfg": {"degree": 2, "split": "auto"},
    }


def test_degrees_may_stand_for_options(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("stretto: plan/1\nstep: 3\n")
    assert read_plan(path) == Plan(step=Steps(degree=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 0}, "step: step=0: a degree counts ranks and is at least 1"),
        ({"cfg": {"degree": -1}}, "cfg: cfg=-1: a degree counts ranks"),
        ({"step": {"degree": "many"}}, "step.degree: Input should be a valid integer"),
        ({"step": {"degre": 2}}, "step.degre: Unexpected keyword argument (got 2)"),
        ({"step": {"predictor": "crystal"}}, "predictor 'crystal' is unknown; known are damped,"),
        ({"step": {"walk": "run"}}, "walk 'run' is unknown; known are auto, replay, leader"),
        ({"cfg": {"split": "half"}}, "split 'half' is unknown; known are auto, batch, calls"),
        ({"stepp": 2}, "stepp: Extra inputs are not permitted (got 2)"),
        ({"kind": "serve"}, "kind: Input should be 'generate' or 'train' (got 'serve')"),
        ({"origin": {"by": "me", "basis": "felt"}}, "origin.basis: Input should be 'measured'"),
        ({"origin": {"basis": "measured"}}, "origin.by: Field required"),
        ({1: 2}, "1: Extra inputs are not permitted (got 2)"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_path(fields, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"stretto": SCHEMA, **fields}, sort_keys=False))
    with pytest.raises(PlanMismatch) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(PlanMismatch) as caught:
        parse_plan({"step": {"degree": "x"}, "cfg": {"degree": "y"}, "tp": 2}, source="here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert [name in message for name in ("step.degree:", "cfg.degree:", "tp:")] == [True] * 3


@pytest.mark.parametrize("more", [{}, {"kind": "generate"}])
def test_an_unknown_kind_lists_the_known_ones(more):
    """Also in a written plan, which says `kind: generate` of itself."""
    fields = {"step": {"degree": 2, "windows": {"kind": "tall"}}, "cfg": {"degree": "x"}, **more}
    with pytest.raises(PlanMismatch) as caught:
        Plan(**fields)
    message = str(caught.value)
    assert f"step.windows: kind 'tall' is unknown; known are {KINDS}" in message
    assert "cfg.degree: " in message
    assert message.count("step.windows") == 1


@pytest.mark.parametrize("value", [5, {"depth": "x"}])
def test_windows_without_a_kind_list_the_known_ones(value):
    with pytest.raises(PlanMismatch) as caught:
        Plan(kind="generate", step={"degree": 2, "windows": value})
    assert str(caught.value) == f"step.windows: no kind in {value!r}; known are {KINDS}"


@pytest.mark.parametrize("more", [{}, {"kind": "generate"}])
def test_of_a_union_only_the_branch_that_was_asked_for_complains(more):
    windows = {"kind": "fixed", "warmup": "x", "depth": 3}
    with pytest.raises(PlanMismatch) as caught:
        Plan(step={"degree": 2, "windows": windows}, **more)
    first, second = str(caught.value).split("; ")
    assert first.startswith("step.windows.warmup: Input should be a valid integer")
    assert second == "step.windows.depth: Unexpected keyword argument (got 3)"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("stretto: cluster/1\n", PlanMismatch, "needed is `stretto: plan/1`"),
        ("step: 2\n", PlanMismatch, "starts with `stretto: None`"),
        ("- 1\n", PlanMismatch, "starts with `stretto: None`"),
        ("", PlanMismatch, "starts with `stretto: None`"),
        ("step: [", ConfigError, "is not YAML"),
        ("step: !!python/object/apply:os.getcwd []", ConfigError, "is not YAML"),
    ],
)
def test_other_files_are_refused(text, error, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_plan(path)
    assert type(caught.value) is error


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.yaml: No such file"):
        read_plan(tmp_path / "none.yaml")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "plan.yaml"
    write_plan(Plan(step=2), path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ConfigError, match=r"cannot write .*No space left"):
        write_plan(Plan(step=3), path)
    assert read_plan(path) == Plan(step=2)
    assert list(tmp_path.iterdir()) == [path]


def test_documents_beside_a_plan_keep_what_is_none(tmp_path):
    path = tmp_path / "other.yaml"
    write_document({"guidance": None, "note": "ü"}, path, "other/1")
    assert read_document(path, "other/1") == {"guidance": None, "note": "ü"}
    with pytest.raises(PlanMismatch, match="needed is `stretto: other/2`"):
        read_document(path, "other/2")
