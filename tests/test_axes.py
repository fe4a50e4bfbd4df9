"""The vocabulary of axes: order, coordinates and peers, against counting by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto import axes

#: Meshes of any order, small enough to list.
sizes_of = st.builds(
    lambda order, lengths: dict(zip(order, lengths, strict=True)),
    st.permutations(axes.ORDER),
    st.lists(st.integers(1, 3), min_size=3, max_size=3).map(lambda few: [*few, 1, 2, 1, 1, 2]),
)


def test_mesh_order_is_frozen():
    names = "step fsdp cfg ring_out team_out ring_in team_in ulysses"
    assert " ".join(axes.ORDER) == names


def test_absent_axes_are_of_size_one_and_come_in_mesh_order():
    assert list(axes.ordered({"cfg": 2, "step": 3})) == list(axes.ORDER)
    assert axes.ordered({"cfg": 2}) == dict.fromkeys(axes.ORDER, 1) | {"cfg": 2}


def test_a_mapping_of_all_axes_keeps_its_order():
    backwards = dict.fromkeys(reversed(axes.ORDER), 1)
    assert list(axes.ordered(backwards)) == list(reversed(axes.ORDER))


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


def test_composite_axes_by_hand():
    """Mesh order ring_out, team_out, ring_in: the logical index puts ring_in before team_out."""
    sizes = axes.ordered({"ring_out": 2, "team_out": 2, "ring_in": 2})
    assert axes.size("cp", sizes) == 8
    assert axes.size("team", sizes) == 2
    assert axes.peers(0, "ring", sizes) == [0, 1, 4, 5]
    assert axes.peers(2, "ring", sizes) == [2, 3, 6, 7]
    assert axes.peers(7, "cp", sizes) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert [axes.position(rank, "cp", sizes) for rank in range(4)] == [0, 2, 1, 3]


@given(sizes=sizes_of)
@settings(max_examples=30)
def test_ranks_and_places_are_one_to_one(sizes):
    world = axes.world_size(sizes)
    places = [tuple(axes.coordinates(rank, sizes).values()) for rank in range(world)]
    assert places == list(itertools.product(*(range(size) for size in sizes.values())))
    assert [axes.rank_at(axes.coordinates(rank, sizes), sizes) for rank in range(world)] == list(
        range(world)
    )


@given(sizes=sizes_of, axis=st.sampled_from(axes.NAMES))
@settings(max_examples=60)
def test_groups_of_an_axis_part_the_ranks(sizes, axis):
    groups = {tuple(axes.peers(rank, axis, sizes)) for rank in range(axes.world_size(sizes))}
    assert sorted(itertools.chain(*groups)) == list(range(axes.world_size(sizes)))
    assert {len(group) for group in groups} == {axes.size(axis, sizes)}
    for group in groups:
        assert [axes.position(rank, axis, sizes) for rank in group] == list(range(len(group)))


@given(sizes=sizes_of)
@settings(max_examples=30)
def test_the_logical_index_ignores_the_order_of_the_mesh(sizes):
    """The same place on each axis has the same position on `cp` in every mesh order."""
    canonical = {axis: sizes[axis] for axis in axes.ORDER}
    for rank in range(axes.world_size(sizes)):
        place = axes.coordinates(rank, sizes)
        other = axes.rank_at(place, canonical)
        assert axes.position(rank, "cp", sizes) == axes.position(other, "cp", canonical)
