"""The vocabulary of axes: order, coordinates and peers, against counting by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto import axes

sizes_of = st.fixed_dictionaries({axis: st.integers(1, 5) for axis in axes.ORDER})


def test_mesh_order_is_frozen():
    assert axes.ORDER == ("step", "cfg")


def test_absent_axes_are_of_size_one_and_come_in_mesh_order():
    assert list(axes.ordered({"cfg": 2}).items()) == [("step", 1), ("cfg", 2)]
    assert axes.ordered({}) == {"step": 1, "cfg": 1}


def test_an_unknown_axis_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="unknown axes"):
        axes.ordered({"tensor": 2})


def test_coordinates_by_hand():
    places = [axes.coordinates(rank, {"step": 3, "cfg": 2}) for rank in range(6)]
    assert [(place["step"], place["cfg"]) for place in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]


def test_peers_by_hand():
    sizes = {"step": 3, "cfg": 2}
    assert axes.peers(3, "step", sizes) == [1, 3, 5]
    assert axes.peers(3, "cfg", sizes) == [2, 3]
    assert axes.peers(0, "step", {"step": 1, "cfg": 1}) == [0]


@given(sizes=sizes_of)
def test_ranks_and_places_are_one_to_one(sizes):
    world = axes.world_size(sizes)
    places = [tuple(axes.coordinates(rank, sizes).values()) for rank in range(world)]
    assert places == list(itertools.product(*(range(size) for size in sizes.values())))


@given(sizes=sizes_of, axis=st.sampled_from(axes.ORDER))
def test_groups_of_an_axis_part_the_ranks(sizes, axis):
    groups = {tuple(axes.peers(rank, axis, sizes)) for rank in range(axes.world_size(sizes))}
    assert sorted(itertools.chain(*groups)) == list(range(axes.world_size(sizes)))
    assert {len(group) for group in groups} == {sizes[axis]}
    for group in groups:
        assert [axes.coordinates(rank, sizes)[axis] for rank in group] == list(range(len(group)))
