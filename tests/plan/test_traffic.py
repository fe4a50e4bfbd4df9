"""Traffic: adding, comparing and totals per phase and axis."""

from stretto.plan.traffic import Lane, Traffic


def traffic(*entries):
    found = Traffic()
    for entry in entries:
        found.add(*entry)
    return found


WINDOW = ("window", "all_gather", "step", 100)
SPLIT = ("exact", "broadcast", "step", 10)
GUIDED = ("guidance", "all_gather", "cfg", 1)


def test_bytes_of_one_lane_add_up():
    assert list(traffic(WINDOW, WINDOW)) == [(Lane("window", "all_gather", "step"), 200)]


def test_nothing_sent_is_no_lane():
    # Counters that hold zeros equal those that hold nothing: look at what is there.
    assert list(traffic(("window", "all_gather", "step", 0))) == list(Traffic()) == []
    assert Traffic().total() == 0


def test_sums_keep_their_terms():
    left, right = traffic(WINDOW), traffic(WINDOW, SPLIT)
    assert left + right == traffic(WINDOW, WINDOW, SPLIT)
    assert left == traffic(WINDOW)
    assert right == traffic(WINDOW, SPLIT)


def test_equal_means_lane_by_lane():
    assert traffic(WINDOW, SPLIT) == traffic(SPLIT, WINDOW)
    assert traffic(WINDOW) != traffic(("window", "broadcast", "step", 100))
    assert traffic(WINDOW) != traffic(("window", "all_gather", "step", 101))
    assert traffic(WINDOW) != 100


def test_lanes_come_in_order():
    phases = [lane.phase for lane, _ in traffic(WINDOW, GUIDED, SPLIT)]
    assert phases == ["exact", "guidance", "window"]


def test_totals_by_phase_and_axis():
    found = traffic(WINDOW, SPLIT, GUIDED)
    assert found.total() == 111
    assert found.total(axis="step") == 110
    assert found.total(phase="exact") == 10
    assert found.total(phase="exact", axis="cfg") == 0
