"""The words of an explanation: what limits, where a plan loses, what would be faster."""

import pytest
import torch
from torch import nn

from stretto import estimate, explain, parallelize, shard
from stretto.cost.train_words import bytes_of
from stretto.errors import ConfigError
from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalWorld
from stretto.parallel.context import Attention
from stretto.plan.model import Plan
from stretto.plan.options import Context
from stretto.search.judge import outline
from stretto.workload.arch import Arch
from stretto.workload.model import Workload
from tests.cluster.make import line


def job(steps=50, **fields):
    return Workload.denoise(steps, **{"evaluation_seconds": 1.0, "guided_bytes": 10**6, **fields})


def test_phases_hops_and_the_limit():
    text = explain(Plan(step=4, cfg=2), job(), line(8))
    assert "evaluate" in text.split("<- limits")[0].splitlines()[-1]
    assert "axis step: 4 ranks, within n, 1 GB/s, 10 us a hop" in text
    assert "projected from a projected cluster" in text
    assert "memory: not known" in text
    assert "17 windows: 1 1 1 2 2 3" in text


def test_a_slow_link_is_called_so():
    text = explain(Plan(step=8), job(evaluation_seconds=0.01), line(8, rate=1e6))
    assert "the link takes longer than the model" in text
    assert "one device alone is as fast" in text
    assert "exchange" in text.split("<- limits")[0].splitlines()[-1]


def test_few_steps_and_replicas_are_named():
    text = explain(Plan(step=4), job(8), line(4))
    assert "8 steps are few for step parallelism" in text
    assert "a replica on each of 4 devices takes 2 s per item and is exact" in text
    assert "cfg=2 is exact, step parallelism is not" in text


def test_no_warning_without_a_reason():
    assert "note:" not in explain(Plan(), job(), line(1))


def test_a_faster_plan_stands_with_its_guess_error():
    text = explain(Plan(), job(), line(2))
    assert "generate: cfg2 = 2 ranks: 2.00x faster" in text
    assert "guess error 0 against 0 here" in text
    assert explain(Plan(), job(), line(1)).endswith("nothing that was tried")


def test_a_difference_goes_phase_by_phase():
    text = explain(Plan(step=2), job(), line(8), diff=Plan(cfg=2))
    assert text.count("first:") == text.count("second:") == 1
    row = next(k for k in text.splitlines() if k.strip().startswith("total")).split()
    assert float(row[5]) == pytest.approx(float(row[3]) - float(row[1]), abs=1e-2)


def test_without_a_cluster_there_are_no_times():
    assert "seconds" not in explain(Plan(step=2))
    with pytest.raises(ConfigError, match="both a workload and a cluster"):
        explain(Plan(step=2), job())


def test_an_outline_has_exact_bytes():
    text = outline(Plan(step={"degree": 2, "windows": {"kind": "fixed"}}), 5, 1.0, 1000)
    assert "3 windows for 5 steps: 1 2 2" in text
    assert f"step rank 1 sends {2 * 1256 + 40} bytes" in text


def test_a_context_is_a_training_plan_of_its_ranks():
    training, ring = Workload.train("gpt-tiny", tokens=4096, dtype="fp32"), Context.named("ring", 2)
    plan = Plan(kind="train", cp=ring)
    assert explain(ring, training, line(2)) == explain(plan, training, line(2))
    assert "peak memory: " in explain(ring, training, line(2), diff=Context(ring=2))


@pytest.mark.parametrize(
    ("plan", "workload"),
    [(Plan(step=2), Workload.train("gpt-tiny", tokens=64)), (Context(ring=2), job())],
    ids=["a generation's plan", "a training plan"],
)
def test_a_plan_and_a_workload_of_two_kinds_are_refused(plan, workload):
    for clusters in ((line(2),), ()):
        with pytest.raises(ConfigError, match="and the workload is one to"):
            explain(plan, workload, *clusters)
    if isinstance(plan, Plan):
        with pytest.raises(ConfigError, match="to fix: Plan"):
            estimate(workload, line(2), plan)


class Attending(nn.Module):
    """What a layer of a model does: attention under a window, here of 16 keys."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, q, documents):
        return self.attention(q, q, q, causal=True, window=16, documents=documents)


@pytest.mark.parametrize("documents", [None, (150, 50, 56)], ids=["one", "packed"])
@pytest.mark.parametrize("layout", ["auto", "zigzag", "contiguous", "documents"])
def test_bytes_of_a_windowed_model_are_those_that_it_sends(layout, documents):
    plan = Plan(kind="train", cp=Context(ring=4, layout=layout))
    sizes = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8}
    arch = Arch(name="one layer", **sizes, feed_forward=1, vocab=1)
    job = {"dtype": "fp32", "window": 16, "documents": documents}
    training = Workload.train(arch, tokens=256, **job)
    rows = torch.ones(1, 256, 4, 8)

    def rank(mesh):
        counted, model = CountingMesh(mesh), Attending()
        with parallelize(model, plan, mesh=counted):
            own = shard(rows, counted, plan, documents=documents)
            model(own.transpose(1, 2).requires_grad_(), documents).sum().backward()
        return sum(count for lane, count in counted.traffic if lane.phase != "control")

    assert LocalWorld(plan.sizes).run(rank) == list(bytes_of(training, plan).per_rank)
