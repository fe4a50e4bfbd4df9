"""bench links: bounds beside its times, what its kernels leave alone, ranks and nodes that end."""

import multiprocessing
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from stretto.bench import links, links_nodes, links_ranks
from stretto.bench.links_cases import (
    FAST,
    FREE,
    NO_TIME,
    TIMED,
    Call,
    Layout,
    Rates,
    Wanted,
    interface_bytes,
    kernel_of,
    kernel_seconds,
    wanted,
)
from stretto.bench.links_ranks import Timing
from stretto.bench.links_summary import auto_over_best, cases, rank_correlation, summary
from stretto.cli.app import main
from stretto.errors import ConfigError, LaunchError, MissingDependency, RankLost, StrettoError
from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalWorld
from stretto.plan.context import named_points
from stretto.plan.model import Placement, Plan
from stretto.plan.options import Context

MHA, FEW = Call(8), Call(2)
RATES = Rates(
    network=25e6,
    inside=200e6,
    latency_inside=1e-3,
    latency_across=1e-3,
    step=1e-3,
    merge_rate=1e8,
    add_rate=1e9,
    overlap=0.9,
)


# ---- what is refused ---------------------------------------------------------------------------


def test_without_root_it_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(links_nodes, "_tool", lambda name: f"/sbin/{name}")
    with pytest.raises(
        ConfigError, match=r"need root, this is user 1000(.|\n)*to fix: run as root"
    ):
        links_nodes.check_able()
    out = tmp_path / "links.json"
    assert main(["bench", "links", "--out", str(out)]) == 2
    assert "need root" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_without_iproute2_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(links_nodes.shutil, "which", lambda name, path: None)
    with pytest.raises(MissingDependency, match=r"ip and tc not found(.|\n)*install iproute2"):
        links_nodes.check_able()


@pytest.mark.parametrize("flags", [["--rate", "0"], ["--repeats", "0"], ["--rate", "fast"]])
def test_flags_that_make_no_sense(flags, tmp_path, capsys):
    assert main(["bench", "links", "--out", str(tmp_path / "l.json"), *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_a_layout_that_is_none(tmp_path, capsys):
    out = tmp_path / "l.json"
    assert main(["bench", "links", "--out", str(out), "--layouts", "3x3"]) == 2
    assert "no layout 3x3" in capsys.readouterr().err
    assert not out.exists()


# ---- bounds ------------------------------------------------------------------------------------


def blocks(name, layout, call=MHA):
    """Blocks through the busiest interface, forward and backward, to a hundredth."""
    context = named_points(layout.ranks, call.heads, call.kv_heads)[name]
    found = interface_bytes(Plan(kind="train", cp=context), call, layout)
    return tuple(round(n / call.block_bytes, 2) for n in found.values())


def test_a_block_is_64_kib():
    assert MHA.block_bytes == FEW.block_bytes == 64 * 1024


@pytest.mark.parametrize(
    ("name", "layout", "right"),
    [
        # Two keys-and-values blocks per hop leave a node at one boundary: 2 (P - 1), and in
        # backward the same and gradients on P hops.
        ("ring", Layout(2, 8), (30, 62)),
        ("ring", Layout(4, 4), (30, 62)),
        ("ring", Layout(2, 4), (14, 30)),
        ("startrail(2)", Layout(2, 8), (16, 32)),
        ("startrail(2)", Layout(4, 4), (40, 72.19)),
        ("usp(4)", Layout(2, 8), (24, 56)),
        ("kv-allgather", Layout(2, 8), (128, 256)),
    ],
)
def test_what_a_plan_must_carry_over_the_busiest_link(name, layout, right):
    assert blocks(name, layout) == right


def test_few_key_heads_make_a_ring_cheaper():
    assert blocks("ring", Layout(2, 8), FEW) == (7.5, 15.5)


def test_nothing_crosses_within_one_node():
    assert blocks("ring", Layout(1, 8)) == (0, 0)


def test_a_placement_changes_what_crosses():
    """Heads across nodes, rings within: less than the ring of two across."""
    plain = Plan(kind="train", cp=Context(ulysses=2, ring=8))
    placed = plain.model_copy(update={"placement": Placement(order=("ulysses", "ring_out"))})
    crossing = [interface_bytes(plan, MHA, Layout(2, 8)) for plan in (plain, placed)]
    # A half of every rank's q, k, v and out; their gradients with one scalar per row and head.
    assert crossing[1]["forward"] == 16 * MHA.block_bytes
    assert crossing[0]["forward"] > crossing[1]["forward"]


@pytest.mark.parametrize("name", ["ring", "tile(2)", "startrail(2)", "usp(2)", "kv-allgather"])
def test_kernels_sleep_as_long_as_is_said_and_bytes_are_the_plans(name, monkeypatch):
    """The busiest of four virtual ranks, forward and backward."""
    slept = Counter()
    clock = SimpleNamespace(
        sleep=lambda s: slept.update({threading.get_ident(): s}), monotonic=None
    )
    monkeypatch.setattr(links_ranks, "time", clock)
    call, flop_rate = Call(2, heads=4, rows=8, head_dim=16), 1e6
    context, kernel = named_points(4, 4, 2)[name], kernel_of(flop_rate)

    def rank(mesh):
        worker, counting = links_ranks.Worker(), CountingMesh(mesh)
        worker.meshes[tuple(context.sizes.items())] = counting
        case, found = call.of(context), []
        worker.prepare(1, context.sizes, context, case, (kernel.forward, kernel.backward))
        for run in ("forward", "backward"):
            before, sent = slept[threading.get_ident()], sum(counting.traffic.lanes.values())
            run_untimed(worker, run)
            after = sum(counting.traffic.lanes.values())
            found.append((slept[threading.get_ident()] - before, after - sent))
        place = mesh.rank("cp")
        wire = [sum(context.wire(case.at(place), (p,)).lanes.values()) for p in links.PASSES]
        return found, wire

    told = LocalWorld(context.sizes).run(rank)
    for at, name in enumerate(links.PASSES):
        longest = max(found[at][0] for found, _ in told)
        assert longest == pytest.approx(kernel_seconds(context, call, flop_rate)[name])
        assert [found[at][1] for found, _ in told] == [wire[at] for _, wire in told]


def run_untimed(worker, name):
    """A pass of task 1 whose clock is not looked at."""
    task = worker.tasks[1]
    if name == "forward":
        *_, task.saved = links_ranks.forward_rank(
            *task.tensors,
            mesh=task.mesh,
            context=task.context,
            case=task.case,
            backend=task.backend,
        )
    else:
        links_ranks.backward_rank(task.dout, task.saved)


# ---- what is run, and what is made of it -------------------------------------------------------


@pytest.mark.parametrize("call", [MHA, FEW], ids=lambda call: call.name)
@pytest.mark.parametrize("flop_rate", [NO_TIME, links.FULL.flop_rate])
def test_every_named_plan_and_auto_are_wanted_once(call, flop_rate):
    layout = Layout(4, 4)
    found = wanted(layout, call, RATES.cluster(layout, flop_rate))
    names = [name for each in found for name in each.names]
    assert len(set(names)) == len(names)
    assert len({each.plan for each in found}) == len(found)
    assert set(named_points(16, call.heads, call.kv_heads)) | {"auto"} <= set(names)
    auto = next(each for each in found if "auto" in each.names)
    assert auto.estimate.seconds <= min(each.estimate.seconds for each in found) * 1.001


def test_layouts_and_calls_of_the_full_run():
    assert {str(layout) for layout in links.FULL.layouts} == {"4x4", "2x4", "2x8", "8x2"}
    assert {call.name for call in links.FULL.calls} == {"MHA", "4:1"}
    shares = links.FULL.shares()
    assert sum(shares.values()) == pytest.approx(60 * links.FULL.minutes)
    assert shares[Layout(2, 8), MHA] > shares[Layout(2, 8), FEW] > shares[Layout(2, 4), FEW]


def test_some_layouts_have_the_minutes_that_they_have_among_all():
    some = links.FULL.only(["4x4", "2x4"])
    assert {str(layout) for layout in some.layouts} == {"4x4", "2x4"}
    assert some.shares() == pytest.approx(
        {case: links.FULL.shares()[case] for case in some.shares()}
    )
    with pytest.raises(ConfigError, match=r"no layout 3x3\n(.|\n)*any of 2x8, 4x4, 2x4, 8x2"):
        links.FULL.only(["3x3", "4x4"])


def task(name, mode, seconds, ideal):
    """One repeat of a named plan on two nodes of eight."""
    each = Timing(seconds / 2, 0.0, 1.0, 0.0)
    plan = Wanted((name,), Plan(kind="train"), None)
    times = [(each, each)] if seconds else []
    return links._Task(
        1, mode, plan, dict.fromkeys(links.PASSES, ideal / 2), Counter(), {}, [], times
    )


def due(tasks, layout=Layout(2, 8)):
    bench = links._Bench({}, links.FULL, layout, None, None, None)
    return [each.plan.names[0] for each in tasks if bench._due(each, tasks)]


def test_repeated_is_what_may_be_the_best_or_is_quoted():
    measured = [("tile(2)", 1.0), ("usp(2)", 1.1), ("usp(4)", 1.2), ("ring", 3.0)]
    measured += [("startrail(2)", 2.0), ("startrail(4)", 2.5)]
    tasks = [task(name, FREE, seconds, 0.5) for name, seconds in measured]
    assert due(tasks) == ["tile(2)", "usp(2)", "ring", "startrail(2)"]
    assert due(tasks, Layout(4, 4)) == ["tile(2)", "usp(2)"]


def test_left_out_is_only_what_its_links_keep_from_being_the_best():
    tasks = [task("auto", TIMED, 1.0, 0.5), task("usp(2)", TIMED, 0, 0.9)]
    tasks += [task("pass-q", TIMED, 0, 1.1)]
    assert due(tasks) == ["auto", "usp(2)"]
    assert due([replace(each, mode=FREE) for each in tasks]) == ["auto", "usp(2)", "pass-q"]


def row(who, median, *, least=None, predicted=None, layout="2x8", mode=FREE, ideal=1.0):
    times = {"median": median, "min": least or median}
    return {
        "layout": layout,
        "heads": "MHA",
        "mode": mode,
        "who": who,
        "named": not who.startswith("auto"),
        "measured_ms": {"total": times, "forward": {k: v / 4 for k, v in times.items()}},
        "predicted_ms": {"total": predicted or median},
        "ideal_ms": {"total": ideal, "forward": ideal / 2},
        "others": 0.1,
    }


ROWS = [
    row("ring", 1200, ideal=920, least=1100),
    row("startrail(2)", 600, ideal=480, least=500),
    row("startrail(4)", 900, ideal=960),
    row("tile(2)", 500, ideal=400),
    row("auto", 400, ideal=320),
    row("auto, keep none", 480, ideal=480),
]


def test_ratios_are_of_medians_and_the_better_startrail():
    found = summary(ROWS)
    assert found["ring_over_startrail_2x8"] == 2.0
    assert found["ring_over_startrail_2x8_min"] == 2.2
    assert found["ring_over_startrail_2x8_ideal"] == pytest.approx(920 / 480)
    assert found["ring_over_auto_2x8"] == 3.0
    assert found["ring_over_auto_2x8_forward"] == 3.0
    assert found["ring_over_auto_keep_none_2x8"] == 2.5
    assert found["auto_within_10pct_of_best"] is True
    assert found["auto_over_best_worst"] == pytest.approx(0.8)


def test_one_case_in_which_auto_is_late_is_enough():
    late = [row("ring", 100, layout="4x4", mode=TIMED), row("auto", 111, layout="4x4", mode=TIMED)]
    found = summary([*ROWS, *late])
    assert found["auto_within_10pct_of_best"] is False
    assert found["auto_over_best_worst"] == pytest.approx(1.11)
    assert [auto_over_best(case) for case in cases([*ROWS, *late])] == pytest.approx([0.8, 1.11])


def test_fast_links_have_ratios_of_their_own_and_no_part_in_the_best():
    fast = [row("ring", 900, mode=FAST), row("startrail(2)", 300, mode=FAST)]
    found = summary([*ROWS, *fast, row("auto", 600, mode=FAST)])
    assert found["ring_over_startrail_2x8"] == 2.0
    assert found["ring_over_startrail_2x8_fast_links"] == 3.0
    assert found["ring_over_auto_2x8_fast_links"] == 1.5
    assert found["auto_within_10pct_of_best"] is True


def test_without_two_nodes_of_eight_there_are_no_ratios():
    found = summary([row("ring", 3, layout="2x4"), row("auto", 1, layout="2x4")])
    assert found["ring_over_auto_2x8"] is None
    assert summary([])["auto_within_10pct_of_best"] is None


def test_predictions_are_ranked_against_times():
    order = [
        row("ring", 1, predicted=10),
        row("startrail(2)", 2, predicted=20),
        row("c", 3, predicted=30),
    ]
    assert rank_correlation(order) == pytest.approx(1.0)
    reverse = [
        row("ring", 1, predicted=30),
        row("startrail(2)", 2, predicted=20),
        row("c", 3, predicted=10),
    ]
    assert rank_correlation(reverse) == pytest.approx(-1.0)
    found = summary([*reverse, row("auto", 4, predicted=2)])
    assert found["predicted_low_high"] == pytest.approx([0.5, 30.0])


def test_repeats_beside_other_work_are_discarded_while_three_are_left():
    quiet, loud = (Timing(1.0, 0.0, 1.0, others) for others in (0.1, 0.9))
    assert links.quiet_of([(quiet, quiet)] * 3 + [(quiet, loud)]) == [(quiet, quiet)] * 3
    few = [(quiet, quiet)] * 2 + [(loud, quiet)] * 2
    assert links.quiet_of(few) == few


# ---- ranks and nodes ---------------------------------------------------------------------------


def alive(pid):
    """Whether a process is there and not only waited for."""
    try:
        return Path("/proc", str(pid), "stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.ranks
def test_two_ranks_without_nodes_of_their_own():
    size = links.Size(
        layouts=(Layout(1, 2),),
        calls=(Call(2, heads=2, rows=8, head_dim=16),),
        repeats=2,
        floor_repeats=1,
        flop_rate=1e9,
        emulated=False,
    )
    kept = []
    found = links.run(size, keep=lambda result: kept.append(len(result["rows"])))
    assert found["complete"] is True
    assert kept == [len(found["rows"])]
    assert {row["mode"] for row in found["rows"]} == {FREE, TIMED}
    assert {"ring", "ulysses", "pass-q", "auto"} <= {row["who"] for row in found["rows"]}
    for each in found["rows"]:
        assert each["ideal_ms"]["total"] == 0
        assert 0 < each["measured_ms"]["total"]["min"] <= each["measured_ms"]["total"]["median"]
        assert each["measured_ms"]["total"]["min"] >= each["kernel_ms"]["total"]
        assert len(each["ms"]) == each["repeats"] in (1, 2)
    rates = found["rates"]["1x2"]["MHA"]
    assert min(rates["inside"], rates["merge_rate"], rates["add_rate"]) > 0


@pytest.mark.ranks
def test_an_error_of_a_rank_is_told_and_all_ranks_end():
    with links_ranks.Fleet([links_nodes.HERE] * 2) as fleet:
        pids = fleet.pids
        with pytest.raises(LaunchError, match=r"rank \d raised KeyError: 7"):
            fleet.ask("forward", 0.0, 7)
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.fixture
def needs_nodes():
    """Skip where network namespaces cannot be made: as a user, in most containers."""
    try:
        links_nodes.check_able()
        with links_nodes.made(1):
            pass
    except StrettoError as error:
        pytest.skip(str(error))


def ours():
    return {file.name for file in links_nodes._FOLDER.glob(f"{links_nodes.PREFIX}-*")}


@pytest.mark.ranks
@pytest.mark.usefixtures("needs_nodes")
def test_nodes_are_removed_after_a_failure_and_those_left_behind_with_them():
    gone = f"{links_nodes.PREFIX}-4194305-hub"  # one more than the largest process id
    links_nodes._ip("netns", "add", gone)
    names = set()

    def failing():
        with links_nodes.made(2) as nodes:
            names.update(ours())
            nodes.limit(1e6)
            nodes.limit(None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert gone not in names
    assert len(names) >= 3
    assert not names & ours()


def test_an_error_is_told_before_the_silence_that_it_causes():
    fleet = links_ranks.Fleet([])
    pairs = [multiprocessing.Pipe() for _ in range(3)]
    fleet._pipes = [here for here, _ in pairs]
    pairs[2][1].send(("error", "KeyError: 7"))
    with pytest.raises(LaunchError, match="rank 2 raised KeyError: 7"):
        fleet._answers(60)
    pairs[0][1].send(("answer", 1))
    with pytest.raises(RankLost, match=r"rank 1, 2 gave no answer within 0\.1 s"):
        fleet._answers(0.1)
    for rank, (_, there) in enumerate(pairs):
        there.send(("answer", rank))
    assert fleet._answers(60) == [0, 1, 2]
