"""The support table: what it says of each verdict, and how it goes on behind a failing family."""

import json
from pathlib import Path

import pytest

from stretto.bench import families
from stretto.errors import ConfigError, LaunchError
from stretto.testing import support


@pytest.fixture
def ranks(monkeypatch):
    """No processes: a script of verdicts by family; a family without one takes the ranks down.

    Returns the script and the lists of families that each group of ranks was given.
    """
    script, given = {}, []

    def run(body, sizes, names, plan, report, **limits):
        assert body is support.on_ranks
        given.append(list(names))
        for name in names:
            with Path(report).open("a") as file:
                file.write(json.dumps({"family": name, "verdict": "started"}) + "\n")
                if name not in script:
                    raise LaunchError("rank 1 raised ZeroDivisionError: division by zero\ntrace")
                row = support.Verdict(family=name, verdict=script[name], gradient_error=1e-15)
                row.loss_error = row.logits_error = 0.0
                file.write(json.dumps(row.as_dict()) + "\n")

    monkeypatch.setattr(families, "run_ranks", run)
    return script, given


def test_counts_of_every_verdict(ranks):
    ranks[0].update(llama="equal", gpt2="equal", bloom="refused", git="not built", lfm2="wrong")
    found = families.run(["llama", "gpt2", "bloom", "git", "lfm2"])
    summary = found["summary"]
    assert summary["families"] == 5
    counts = [summary[name] for name in ("equal", "refused", "not_built", "wrong", "failed")]
    assert counts == [2, 1, 1, 1, 0]
    assert summary["max_gradient_error"] == 1e-15
    assert found["complete"]


def test_a_family_that_takes_the_ranks_down_is_one_row(ranks):
    script, given = ranks
    script.update(llama="equal", mistral="equal")
    found = families.run(["llama", "bloom", "mistral"])
    assert [row["verdict"] for row in found["rows"]] == ["equal", "failed", "equal"]
    assert "ZeroDivisionError" in found["rows"][1]["reason"]
    assert given == [["llama", "bloom", "mistral"], ["mistral"]]


def test_ranks_that_never_start_are_no_verdict(monkeypatch):
    def run(*args, **options):
        raise LaunchError("rank 0 raised OSError: no space")

    monkeypatch.setattr(families, "run_ranks", run)
    with pytest.raises(LaunchError, match="no space"):
        families.run(["llama"])


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"named 'lama'; the nearest: llama"):
        families.chosen(["lama"])
    assert len(families.chosen(())) > 150


@pytest.mark.ranks
@pytest.mark.slow
def test_no_family_is_wrong():
    """All of them; minutes."""
    found = families.run()
    bad = [row for row in found["rows"] if row["verdict"] in ("wrong", "failed")]
    assert bad == []
    assert found["summary"]["equal"] >= 100
