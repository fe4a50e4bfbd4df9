"""Live blocks: the figures of the brief, and equality with what a schedule says of itself."""

import pytest

from stretto.cost.attention_bytes import Call
from stretto.cost.attention_memory import kept_blocks, memory_of, peak_blocks
from stretto.plan.context import named_points
from stretto.plan.options import AttentionCase, Context, StarTrail, Tile
from stretto.plan.ranges import FULL, shard
from stretto.plan.schedule import schedule
from stretto.workload.train import Training


def case_and_call(ranks, heads, kv_heads, item):
    shards = shard("contiguous", 4 * ranks, ranks)
    case = AttentionCase(1, heads, kv_heads, 4, item, shards, shards, FULL)
    return case, Call(1, 4, 4, heads, kv_heads, 4, item, case.stat_bytes)


@pytest.mark.parametrize("ranks", [1, 4, 6, 16])
@pytest.mark.parametrize(("kv_heads", "item"), [(16, 2), (2, 8)])
def test_peaks_are_those_of_the_schedules(ranks, kv_heads, item):
    case, call = case_and_call(ranks, 16, kv_heads, item)
    two = Tile(team_inner=2, ring_inner=2, grad_wire="float32")
    points = named_points(ranks, 16, kv_heads)
    points |= {"two levels": Context(team=4, ring=4, schedule=two)} if ranks == 16 else {}
    for name, context in points.items():
        assert schedule(context, case).peak_blocks() == pytest.approx(peak_blocks(context, call)), (
            name
        )


def test_backward_of_a_tile_is_6a_and_14g():
    _, call = case_and_call(16, 16, 4, 2)
    assert peak_blocks(Context(team=4, ring=4), call) == pytest.approx(6 * 4 + 14 / 4)


@pytest.mark.parametrize(
    ("context", "blocks"),
    [
        (Context(ring=8), 0),
        (Context(ring=8, schedule=Tile(keep="all")), 2 * 7),
        (Context(ring=8, schedule=Tile(ring_inner=4, keep="far")), 2 * 1),
        (Context(ring=8, schedule=Tile(ring_inner=4, keep="all")), 2 * 7),
        (Context(team=2, ring=4, schedule=StarTrail(keep="far")), 2 * 2),
        (Context(ulysses=8), 0),
    ],
)
def test_what_is_kept(context, blocks):
    _, call = case_and_call(8, 16, 16, 2)
    assert kept_blocks(context, call) == blocks


def test_parts_of_a_rank():
    training = Training.of("gpt3-1.3b", 8192)
    arch = training.arch
    call = Call(1, 1024, 1024, 16, 16, 128, 2)
    memory = memory_of(training, Context(ring=8), call, 8)
    assert memory.states == 16 * arch.parameters // 8
    assert memory.logits == 1024 * arch.vocab * 6
    # Input, q, k, v, out: five widths of two bytes; a float32 per row and head.
    assert memory.saved == arch.layers * 1024 * (5 * arch.width * 2 + 16 * 4)
    assert memory.kept == 0
    assert memory.column == 20 * call.q_block
    assert memory.total == sum(memory.as_dict().values())
    more = memory_of(training.model_copy(update={"recompute": False}), Context(ring=8), call, 8)
    assert more.saved > 2 * memory.saved
