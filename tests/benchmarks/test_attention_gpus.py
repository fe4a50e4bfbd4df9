"""Attention over several GPUs: a dry run on gloo ranks, its gate, its ratios."""

import argparse

import attention_gpus
import displaced
import pytest
import torch

from stretto.cluster.model import Cluster
from stretto.plan.options import Context, Gather, Ring, Tile
from tests.benchmarks.conftest import check_format
from tests.benchmarks.torchrun import dry_ranks


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_dry_run(tmp_path, ranks):
    result, printed = dry_ranks("attention_gpus.py", tmp_path / "x.json", ranks)
    check_format(result)
    summary = result["summary"]
    assert summary["gate_ok"]
    assert summary["bytes_match"]
    assert summary["errors"] == []
    assert set(summary["cases"]) == {
        f"{section}/{16 * ranks}" for section in ("mha", "gqa", "peers", "peers-gqa", "long")
    }
    skipped = {each["who"] for each in result["skipped"]}
    assert skipped == {"context_parallel"} | ({"usp", "startrail", "tile"} if ranks == 2 else set())
    gated = [row for row in result["rows"] if row["who"].startswith("gate")]
    assert {row["who"].split("/")[-1] for row in gated} >= {"ring", "ulysses", "auto"}
    for row in result["rows"]:
        if row["who"].startswith("mha") and row["name"] != attention_gpus.ONE:
            assert len(row["ms"]) == 3
            assert len(row["bytes_sent"]) == ranks
            assert row["predicted_ms"] > 0
            assert row["exposed_ms"] == pytest.approx(
                row["median_ms"] - attention_gpus.median(row["kernels_ms"])
            )
            assert row["who"] in printed
    cluster = Cluster.read(tmp_path / result["links"]["gloo"]["cluster_file"])
    assert cluster.size == ranks
    assert "attention_gpus.py" in cluster.devices["cpu"].attention.source
    links = result["links"]["gloo"]
    assert cluster.links[0].displaces == links["displaces"]
    assert [each["kernel"].split()[0] for each in links["beside"]] == ["forward", "backward"]
    for each in links["beside"]:
        assert 0 < each["num_bytes"] <= 2**20
        assert min(each["alone"], each["message"]) > 0
        assert 0 < each["beside"] <= each["both"]
    found = [displaced.Beside(**each) for each in links["beside"]]
    assert links["displaces"] == displaced.part_displaced(found, links["fit"]["rate"])


def row(name, ms, section="mha", **more):
    found = {"section": section, "tokens": 8, "name": name, "median_ms": ms, "who": name}
    ours = name not in (attention_gpus.ONE, "context_parallel(allgather)")
    found |= {"carrier": "nccl", "exposed_ms": 0.0, "bytes_match": True} if ours else {}
    return found | {"over_one_gpu": 10.0 / ms, **more}


def test_auto_is_held_against_the_best_plan_over_its_carrier():
    rows = [row(attention_gpus.ONE, 10.0), row("ring", 5.0), row("auto", 5.4)]
    assert attention_gpus.of_case(rows)["auto_within_10pct"]
    assert not attention_gpus.of_case([*rows, row("ulysses", 4.0)])["auto_within_10pct"]
    other = row("ulysses", 4.0, carrier="symmetric")
    assert attention_gpus.of_case([*rows, other])["auto_within_10pct"]


def test_torchs_own_is_compared_in_the_same_run():
    rows = [
        row(attention_gpus.ONE, 10.0),
        row("auto", 5.0),
        row("context_parallel(allgather)", 6.0),
    ]
    assert attention_gpus.of_case(rows)["ours_over_context_parallel"] == pytest.approx(1.2)


def test_an_error_that_is_not_a_number_passes_no_gate():
    nan = torch.tensor([float("nan")])
    sums = attention_gpus.squares(nan, torch.ones(1))
    assert attention_gpus.relative(sums) > 1e30


def test_a_mesh_without_messages_leaves_what_memory_held():
    class Carried:
        sizes, world_rank, device, timeout_s = {"ring_in": 2}, 0, "cpu", 1.0

    silent = attention_gpus.Silent(Carried())
    into = {0: torch.zeros(2), 1: torch.full((2,), 7.0)}
    got = silent.exchange({0: torch.ones(2), 1: torch.ones(2)}, into, "ring_in", "column").wait()
    assert got[0].tolist() == [1, 1]
    assert got[1].tolist() == [7, 7]


def test_long_calls_are_repeated_less():
    options = argparse.Namespace(repeats=7)
    bench = argparse.Namespace(options=options, ranks=2)
    counts = [
        attention_gpus.repeats_for(bench, attention_gpus.Case("mha", tokens, 32, 32, 128))
        for tokens in (2**15, 2**17, 2**18, 2**19)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 7
    assert counts[-1] == 2


def test_flops_are_seven_half_squares():
    case = attention_gpus.Case("mha", 8, 2, 1, 4)
    assert case.flops == 7 * (2 * 8 * 8 * 4 * 2) / 2
    assert case.of(Context(ring=2), 1, 2).q_rows[1].rows == 4


#: Milliseconds of 64k tokens on two H200 over NCCL, 32 query and key heads.
ON_TWO_H200 = [
    (Context(ring=2), 122.49),
    (Context(ring=2, schedule=Ring(gradients="ride", prune=False)), 122.99),
    (Context(ring=2, schedule=Gather()), 125.22),
    (Context(ulysses=2), 117.88),
    (Context(team=2, schedule=Tile()), 126.38),
]


def test_the_preset_of_two_h200_predicts_what_they_measured():
    cluster = Cluster.read("h200-x2-nccl")
    (link,) = cluster.links
    idle = cluster.model_copy(update={"links": (link.model_copy(update={"displaces": 0.0}),)})
    case = attention_gpus.Case("mha", 2**16, 32, 32, 128)
    bench = argparse.Namespace(
        dtype=torch.bfloat16, ranks=2, clusters={"nccl": cluster, "idle": idle}
    )

    def off(context, measured, carrier):
        return abs(measured / attention_gpus.predicted_ms(bench, case, context, carrier) - 1)

    assert max(off(*each, "nccl") for each in ON_TWO_H200) < 0.04
    # Rings hide their messages beside kernels; other plans wait for theirs.
    for place, each in enumerate(ON_TWO_H200):
        now, without = off(*each, "nccl"), off(*each, "idle")
        assert (now < without / 2) if place < 2 else (now == without)
    assert attention_gpus.chosen(bench, case, "nccl") == Context(ulysses=2)


def test_what_the_gate_found_wrong_is_not_timed():
    bench = argparse.Namespace(
        options=argparse.Namespace(plans=[], long_plans=[]), ranks=2, clusters={}, wrong=set()
    )
    case = attention_gpus.Case("mha", 64, 4, 4, 16)
    found = attention_gpus.plans(bench, case, "nccl")
    bench.wrong.add(("nccl", found["ulysses"]))
    assert set(found) - set(attention_gpus.plans(bench, case, "nccl")) == {"ulysses"}
    assert "ulysses" in attention_gpus.plans(bench, case, "symmetric")


def test_predictions_rest_on_messages_as_attention_sends_them():
    messages = [
        attention_gpus.probe.Message(verb, size, 2, 1.0)
        for verb in ("all_gather", "shift")
        for size in (1024, 2**20)
    ]
    kept = attention_gpus.sent_by_attention(messages, False)
    assert [(each.verb, each.num_bytes) for each in kept] == [("shift", 2**20)]
