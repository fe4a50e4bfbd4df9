"""Public names: complete, sorted, lazy, and never shadowed by a subpackage."""

import pkgutil
from types import ModuleType

import pytest
from pydantic import ValidationError

import stretto
from tests.fresh import modules_after

SUBPACKAGES = {info.name for info in pkgutil.iter_modules(stretto.__path__)}


def test_names_are_frozen():
    assert set(stretto.__all__) == {
        "Cluster",
        "Context",
        "Data",
        "Estimate",
        "Guidance",
        "Mesh",
        "Plan",
        "Steps",
        "Workload",
        "attention",
        "errors",
        "estimate",
        "explain",
        "find_plans",
        "init_mesh",
        "parallelize",
        "parallelized",
        "shard",
        "testing",
    }


def test_names_are_sorted_and_at_most_30():
    assert stretto.__all__ == sorted(stretto.__all__)
    assert len(stretto.__all__) <= 30


@pytest.mark.parametrize("name", stretto.__all__)
def test_name_loads_and_is_documented(name):
    value = getattr(stretto, name)
    assert value.__doc__
    assert name in dir(stretto)


@pytest.mark.parametrize("name", ["Cluster", "Plan", "Workload"])
def test_a_noun_is_frozen_and_has_few_fields(name):
    noun = getattr(stretto, name)
    assert noun.model_config["frozen"]
    assert noun.model_config["extra"] == "forbid"
    assert len(noun.model_fields) <= 12


def test_a_plan_cannot_be_changed():
    plan = stretto.Plan(step=2)
    with pytest.raises(ValidationError, match="frozen"):
        plan.cfg = stretto.Guidance(degree=2)
    assert plan == stretto.Plan(step=2)


def test_every_home_is_public():
    assert set(stretto._HOMES) == {n for n in stretto.__all__ if n not in SUBPACKAGES}


def test_no_callable_shares_a_name_with_a_subpackage():
    """Importing the subpackage would overwrite the lazy name: right once, then a module."""
    shared = SUBPACKAGES & set(stretto.__all__)
    assert all(isinstance(getattr(stretto, name), ModuleType) for name in shared)
    assert shared == {"errors", "testing"}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Plane'"):
        _ = stretto.Plane


def test_import_stretto_loads_nothing_heavy():
    loaded = modules_after("import stretto")
    assert not loaded & {"torch", "numpy", "pydantic", "diffusers", "rich", "cyclopts"}
    assert {name for name in loaded if name.startswith("stretto")} == {"stretto"}
