"""`stretto bench`: tables, files, exit codes."""

import json

import pytest

from stretto.bench import attention, attention_table, exactness, families, speed, steps
from stretto.cli.app import main
from stretto.testing import support
from tests.bench.test_steps import laps_of


def document(**fields):
    base = {"load": {"before": 0.1, "after": 0.2}, "busy": False, "cores": 2, "device": "a device"}
    return base | fields


def exactness_result(**changes):
    row = exactness.Row(case="sd15-ddim", pipeline="StableDiffusionPipeline", scheduler="DDIM")
    row.degree_one, row.restored, row.perfect = True, True, {2: True, 3: True, 4: True}
    for name, value in changes.items():
        setattr(row, name, value)
    counts = {kind: int(row.verdict == kind) for kind in ("exact", "refused", "wrong")}
    summary = {"cases": 1} | counts
    return document(case="exactness", ranks=3, rows=[row.as_dict()], summary=summary)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "1 cases: 1 exact, 0 refused, 0 wrong"),
        ({"refused": "it edits latents"}, 0, "sd15-ddim refused: it edits latents"),
        ({"wrong": ["bytes counted are not those declared"]}, 1, "sd15-ddim wrong: bytes counted"),
    ],
    ids=["exact", "refused", "wrong"],
)
def test_exactness_table_and_exit_code(changes, code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exactness, "run", lambda *args, **options: exactness_result(**changes))
    out = tmp_path / "e.json"
    assert main(["bench", "exactness", "--out", str(out)]) == code
    assert json.loads(out.read_text())["summary"]["wrong"] == code
    printed = capsys.readouterr().out
    assert words in printed
    assert f"written: {out}" in " ".join(printed.split())


def families_result(verdict):
    row = support.Verdict(family="llama", verdict=verdict, reason="short of words", seconds=1.0)
    counts = dict.fromkeys(("equal", "refused", "not_built", "wrong", "failed"), 0) | {verdict: 1}
    facts = {"ranks": 2, "plan": "cp2(ring2, auto)", "library": "transformers 5", "tokens": 22}
    summary = {"families": 1} | counts
    facts |= {"tolerance": 2e-5, "summary": summary, "rows": [row.as_dict()]}
    return document(case="families", **facts)


@pytest.mark.parametrize(("verdict", "code"), [("equal", 0), ("refused", 0), ("wrong", 1)])
def test_families_table_and_exit_code(verdict, code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(families, "run", lambda *args, **options: families_result(verdict))
    assert main(["bench", "families", "--out", str(tmp_path / "f.json")]) == code
    printed = capsys.readouterr().out
    assert f"1 {verdict}" in printed
    assert ("llama refused: short of words" in printed) == (verdict == "refused")


def test_exactness_refuses_before_it_measures(tmp_path, capsys):
    assert main(["bench", "exactness", "--out", str(tmp_path)]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["bench", "exactness", "--only", "sd16", "--out", str(tmp_path / "e.json")]) == 2
    assert "no case 'sd16' among" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_steps_tables(tmp_path, capsys, monkeypatch):
    timed = speed.rows(steps.QUICK.race, [laps_of(0, 12.0), laps_of(1, 12.0)], half=0.6)
    drawn = [
        {
            "part": "fidelity",
            "model": "dit",
            "who": who,
            "degree": 4,
            "steps": 6,
            "images": 2,
            "depth": 3,
            "psnr_db": db,
            "psnr_worst_item_db": db - 2,
            "relative_l2": 0.1,
        }
        for who, db in (("parastep", 20.5), ("tail", 30.5), ("calibrated", 34.5))
    ]
    drawn.append(drawn[0] | {"who": "fewer steps", "psnr_db": 25.5})
    seconds = {"median": 0.25, "low": 0.2, "high": 0.3}
    facts = {"denoiser_seconds": seconds, "half_batch_cost": 0.6}
    monkeypatch.setattr(speed, "measure", lambda race, on_note: (timed, facts))
    out = tmp_path / "s.json"
    on_the_way = []

    def measure(setting, on_note, keep):
        for count in range(len(drawn) + 1):
            on_the_way.append(json.loads(out.read_text()))
            keep(drawn[:count])
        return drawn

    monkeypatch.setattr(steps.fidelity, "measure", measure)
    assert main(["bench", "steps", "--quick", "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for words in ("step2 tail", "1.85x", "34.5 dB", "half a batch 0.60", f"written: {out}"):
        assert words in printed
    summary = json.loads(out.read_text())["summary"]
    assert summary["psnr_tail_db"] == {"dit": {"p4": 30.5}}
    assert summary["margin_calibrated_over_parastep_db"] == {"dit": {"p4": 14.0}}
    assert {"speedup_2ranks", "ceiling_2ranks", "bytes_per_rank"} <= summary.keys()
    # Whole and readable from the timed part on, and richer with every row.
    assert [len(found["rows"]) - len(timed) for found in on_the_way] == [0, 0, 1, 2, 3]
    assert all("speedup_2ranks" in found["summary"] for found in on_the_way)
    assert on_the_way[2]["summary"]["psnr_tail_db"] == {}
    assert on_the_way[3]["summary"]["margin_tail_over_parastep_db"] == {"dit": {"p4": 10.0}}
    assert not any(found["complete"] for found in on_the_way)
    assert json.loads(out.read_text())["complete"]


def attention_result(**changes):
    row = {
        "part": "exact", "carrier": "threads", "ranks": 4, "plan": "ring", "ulysses": 1, "runs": 9,
        "cases": ["causal", "full"], "max_err": 1e-15, "forward_bytes": 1, "backward_bytes": 1,
        "declared": 9, "closed": 3, "closed_of": 3, "right": True,
    }  # fmt: skip
    row |= changes
    rows = [row, *attention_table.byte_rows()]
    summary = dict.fromkeys(attention.summary([]), None) | {
        "runs": 9, "plans": 1, "wrong": int(not row["right"]), "gloo_ranks": 0, "virtual_ranks": 4,
    }  # fmt: skip
    more = {"notes": ["a note"], "left_out": 3}
    return document(case="attention", rows=rows, summary=summary, **more)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "9 runs of 1 plans, up to 4 virtual and 0 gloo ranks: 0 wrong"),
        ({"right": False, "wrong": "causal: dq off by 1.0e+00"}, 1, "WRONG threads 4 ring: causal"),
    ],
)
def test_attention_tables_and_exit_code(changes, code, words, tmp_path, capsys, monkeypatch):
    result = attention_result(**changes)
    monkeypatch.setattr(attention, "run", lambda *args, **options: result)
    out = tmp_path / "a.json"
    assert main(["bench", "attention", "--out", str(out)]) == code
    printed = capsys.readouterr().out
    assert words in printed
    assert "8.016! (2)" in printed  # StarTrail at 4 ranks sends more than the ring
    assert "3 runs left out: the time was up" in printed
    assert json.loads(out.read_text())["case"] == "attention"


@pytest.mark.parametrize("name", ["steps", "links"])
def test_the_least_number_of_repeats_is_in_the_help_and_is_what_is_taken(name, tmp_path, capsys):
    assert main(["bench", name, "--help"]) == 0
    assert "1 at least" in " ".join(capsys.readouterr().out.split())
    assert main(["bench", name, "--repeats", "0", "--out", str(tmp_path / "r.json")]) == 2
    assert "repeats" in capsys.readouterr().err
