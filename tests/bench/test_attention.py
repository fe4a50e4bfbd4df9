"""bench attention: the reference it trusts, the runs it makes, and that its checks can fail."""

import pytest
import torch

from stretto.bench import attention, attention_exact
from stretto.bench.attention_cases import Call, calls, plans, reference, visible
from stretto.bench.attention_exact import judged, local_rows, on_threads
from stretto.bench.attention_table import byte_rows
from stretto.plan.context import legal_ulysses
from stretto.plan.options import Context, Tile
from stretto.plan.ranges import Mask


@pytest.mark.parametrize("call", calls(4), ids=lambda call: call.name)
def test_the_mask_written_out_is_the_plans_mask(call):
    seen = visible(call)
    for query in range(call.tokens):
        for key in range(call.kv_tokens):
            assert bool(seen[query, key]) == call.mask.sees(query, key)


def test_every_named_family_and_every_call_is_run():
    wanted = attention.jobs(attention.FULL.small, every=True)
    families = {name.partition("(")[0] for name, _, _ in wanted}
    assert families >= {"ring", "double-ring", "kv-allgather", "ulysses", "usp"}
    assert families >= {"startrail", "tile", "pass-q"}
    assert {call.name for _, _, call in wanted} == {call.name for call in calls(4)}
    large = attention.jobs(attention.FULL.large, every=False)
    assert {(c.degree, name) for name, c, _ in large} == {
        (ranks, name) for ranks in (32, 64) for name in plans(ranks)
    }
    for _, context, call in [*wanted, *large, *attention.others((64,)), *attention.over_gloo(16)]:
        assert context.ulysses in legal_ulysses(*call.heads, call.ranks)


def test_every_call_on_three_virtual_ranks():
    wanted = [
        (name, context, call) for _, name, context, fits in attention.legal(3) for call in fits
    ]
    rows = local_rows(wanted)
    assert len(rows) > 50
    assert [row for row in rows if not row["right"]] == []
    found = attention.summary(rows)
    assert found["max_err_fp64"] <= attention_exact.MOST_ERROR
    assert found["bytes_match"] is True
    assert found["wrong"] == 0


@pytest.mark.parametrize("name", ["rows 4 x 2", "rings 4 x 2, keep far"])
def test_two_levels_on_eight_virtual_ranks(name):
    (row,) = local_rows([(name, plans(8)[name], calls(8)[3])])
    assert row["right"], row


def test_ranks_of_two_levels_are_put_in_logical_order():
    """Teams across nodes and rings within: world order is not the order of shards."""
    context = Context(team=4, ring=2, schedule=Tile(ring_inner=2))
    (row,) = local_rows([("tile", context, calls(8)[3])])
    assert row["right"], row


def small():
    return Context(ring=2), Call("causal", 2, 8, 8, (2, 1), Mask(causal=True))


@pytest.mark.parametrize("spoiled", ["out", "lse", "dq", "dk", "dv"])
def test_a_wrong_result_is_noticed(spoiled):
    context, call = small()
    found = on_threads(context, call)
    assert judged("x", context, call, found, "threads")["right"]
    found[1][spoiled][..., 0] += 1e-9
    row = judged("x", context, call, found, "threads")
    assert not row["right"]
    assert row["wrong"].startswith(f"{spoiled} off by 1.0e-09") or spoiled in row["wrong"]


def test_a_missing_row_is_noticed():
    context, call = small()
    found = on_threads(context, call)
    found[0]["out"] = found[0]["out"][:, :, :-1]
    assert judged("x", context, call, found, "threads")["max_err"] == float("inf")


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_byte_too_many_is_noticed(way):
    context, call = small()
    found = on_threads(context, call)
    for own in found:
        own[way][next(iter(own[way]))] += 1
    row = judged("x", context, call, found, "threads")
    assert (row["bytes_declared"], row["bytes_closed"], row["right"]) == (False, False, False)
    assert attention.summary([row])["bytes_match"] is False


def test_a_plan_that_raises_is_a_row():
    context, call = Context(ulysses=2), Call("x", 2, 8, 8, (3, 3), Mask())
    (row,) = local_rows([("ulysses", context, call)])
    assert not row["right"]
    assert row["wrong"].startswith("PlanMismatch: ulysses 2 does not fit 3 query")
    found = attention.summary([row])
    assert (found["max_err_fp64"], found["wrong"]) == (float("inf"), 1)


@pytest.mark.parametrize("name", ["ring", "tile(2)", "startrail(2)"])
def test_numerical_gradients(name):
    context = plans(4)[name]
    call = Call("g", 4, 4, 4, (2, 1), Mask(causal=True), head_dim=1)
    (row,) = attention_exact.gradcheck_rows([(name, context, call)])
    assert row["right"], row


def test_a_wrong_gradient_fails_gradcheck(monkeypatch):
    real = attention_exact.backward_rank

    def doubled(dout, saved):
        dq, dk, dv = real(dout, saved)
        return dq, 2 * dk, dv

    monkeypatch.setattr(attention_exact, "backward_rank", doubled)
    call = Call("g", 2, 2, 2, (1, 1), Mask(causal=True), head_dim=1)
    (row,) = attention_exact.gradcheck_rows([("ring", Context(ring=2), call)])
    assert not row["right"]


def test_byte_table_at_64_ranks():
    rows = {(row["ranks"], row["heads"], row["plan"]): row for row in byte_rows()}
    assert rows[64, "32/32", "ring"]["forward_blocks"] == 126
    star = rows[64, "32/32", "startrail(4)"]
    assert star["ring_over_forward"] == pytest.approx(126 / 44, rel=0.002)
    assert rows[64, "32/32", "ulysses(8) x tile(2)"]["ring_over_forward"] > 10
    assert rows[4, "32/32", "startrail(2)"]["loses"]
    assert not star["loses"]
    for ranks, heads in {(row["ranks"], row["heads"]) for row in rows.values()}:
        best = [key for key, row in rows.items() if key[:2] == (ranks, heads) and row["best"]]
        assert len(best) == 1


def test_ratios_are_of_counted_bytes_at_64_ranks():
    def row(plan, ulysses, sent):
        return {
            "part": "exact", "carrier": "threads", "ranks": 64, "plan": plan, "ulysses": ulysses,
            "case": "causal", "max_err": 0.0, "right": True, "forward_bytes": sent,
            "bytes_declared": True, "bytes_closed": True,
        }  # fmt: skip

    rows = [row("ring", 1, 126), row("startrail(4)", 1, 45), row("usp(16)", 16, 2)]
    assert attention.summary(rows)["ring_over_best_bytes_p64"] == 126 / 45
    rows.append(row("ulysses(8) x tile(2)", 8, 12))
    found = attention.summary(rows)
    assert found["ring_over_startrail_bytes_p64"] == 2.8
    assert found["ring_over_best_bytes_p64"] == 10.5
    assert attention.summary(rows[1:])["ring_over_best_bytes_p64"] is None


def test_time_that_is_up_leaves_runs_out(monkeypatch):
    size = attention.Size(small=(2,), large=(), gloo=(2,), gradients=2, minutes=0)
    found = attention.run(size)
    assert found["left_out"] > 60
    assert found["summary"]["max_err_fp64"] is None
    assert found["summary"]["bytes_match"] is None


@pytest.mark.ranks
def test_gloo_ranks_equal_threads_bit_by_bit():
    wanted = [
        (name, plans(4)[name], calls(4)[number])
        for number, name in enumerate(["ring", "startrail(2)", "tile of two levels", "ulysses"])
    ]
    rows = attention.gloo_rows(4, wanted)
    assert all(row["right"] and row["same_bits"] for row in rows), rows


@pytest.mark.ranks
def test_quick_run_keeps_its_file_growing():
    kept = []
    size = attention.Size(small=(1, 2), large=(), gloo=(2,), gradients=2, minutes=2)
    found = attention.run(size, keep=lambda result: kept.append(len(result["rows"])))
    assert found["summary"]["wrong"] == 0
    assert found["summary"]["gradcheck_ok"] is True
    assert found["summary"]["gloo_equals_threads"] is True
    assert found["complete"]
    assert kept
    assert kept[0] < len(found["rows"])


def test_the_reference_is_the_naive_attention_of_one_device():
    call = calls(2)[0]
    known = reference(call)
    q, k, v = (x.clone().requires_grad_() for x in (known.q, known.k, known.v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible(call))
    out.backward(known.dout)
    for mine, theirs in zip((known.out, *known.grads), (out, q.grad, k.grad, v.grad), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_tile_levels_are_in_the_list():
    assert any(isinstance(c.schedule, Tile) and c.two_level for c in plans(16).values())


def test_rows_of_a_plan_are_merged_and_say_what_is_wrong():
    context, call = small()
    good = judged("ring", context, call, on_threads(context, call), "threads")
    spoiled = on_threads(context, call)
    spoiled[0]["dq"] += 1
    bad = judged("ring", context, call, spoiled, "threads") | {"case": "window"}
    checked = {"part": "gradcheck", "ranks": 2, "plan": "ring", "right": True}
    one, other = attention.merged([good, checked, bad])
    assert other == checked
    assert (one["runs"], one["declared"], one["closed_of"], one["right"]) == (2, 2, 2, False)
    assert one["cases"] == ["causal", "window"]
    assert one["forward_bytes"] == good["forward_bytes"]
    assert one["wrong"].startswith("window: dq off by")
    assert attention.summary([good, bad])["wrong"] == 1
