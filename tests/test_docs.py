"""Documentation that runs: fenced examples, links, generated pages, the tree of the README."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_examples import CodeExample, find_examples

ROOT = Path(__file__).parent.parent
WRITTEN = ["README.md", "CONTRIBUTING.md", "docs/learn", "docs/guides", "docs/concepts"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def render():
    """docs/render.py as a module; it is a script, whose folder python puts on the path."""
    sys.path.insert(0, str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs/render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", list(find_examples(*(ROOT / p for p in WRITTEN))), ids=str)
def test_fenced_python_runs(example: CodeExample):
    # Not EvalExample.run: a failing example ends pytest 9.2 with an internal error (0.0.18).
    source = "\n" * example.start_line + example.source  # tracebacks name the page's own lines
    exec(compile(source, str(example.path), "exec"), {"__name__": "__main__"})


def run_example(launcher, folder):
    """Run examples/generate.py at toy size; what it printed."""
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples/generate.py"],
        env={**os.environ, "STEPS": "6", "OUT": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_runs_on_one_rank(tmp_path):
    assert "one rank" in run_example([], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


@pytest.mark.ranks
def test_example_runs_under_torchrun(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert "2 ranks" in run_example(launcher, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_tree_of_the_readme_exists():
    """Every path of the annotated tree, folders by their indentation."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folders, missing = {}, []
    for line in block[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth] = folders.get(depth - 1, ROOT) / name
        if not folders[depth].exists():
            missing.append(str(folders[depth].relative_to(ROOT)))
    assert folders
    assert missing == []


def test_a_result_is_rendered_with_its_basis_and_all_rows(render):
    result = json.loads(RESULT)
    page, whole = render.measured({"ring-4": result}), render.whole("ring-4", result)
    for text in (page, whole):
        assert "- basis: measured" in text
        assert "| bytes_match | yes |" in text
    assert "[ring-4](measured/ring-4.md)" in page
    assert "| ours | 4.11 (4.09 to 4.15, n = 3) | 50331648 |" in whole
    assert "| peer 1.2 | 5.045 (5.02 to 5.07, n = 2) |" in whole


def test_a_result_that_was_cut_off_says_so_and_meets_no_target(render):
    page = render.measured({"ring-4": json.loads(RESULT) | {"complete": False}})
    assert "Cut off" in page
    assert "Bytes counted = declared" not in page


def test_every_target_belongs_to_results_that_have_a_section(render):
    assert {target.case for target in render.targets.TARGETS} <= set(render.SECTIONS)


def test_a_result_without_a_section_is_an_error(render):
    with pytest.raises(KeyError, match="no section for results of 'weather/today'"):
        render.kind_of("weather/today")
    assert render.kind_of("diffusion/steps-slices/svd") == "diffusion/steps-slices"
    assert render.kind_of("attention/gpus") == "attention/gpus"


def found(render, result):
    """What is said of each target that a result speaks of, and whether it is met."""
    return {what: met for what, _, _, met, _ in render.targets.lines({"x": result})}


def test_a_target_is_met_or_not(render):
    result = json.loads(RESULT)
    assert found(render, result) == {"Bytes counted = declared": True}
    summary = {"bytes_match": False, "max_err_fp64": 2e-12, "ring_over_best_bytes_p64": 10.7}
    assert found(render, result | {"summary": summary}) == {
        "Error in float64": False,
        "Bytes counted = declared": False,
        "Ring over the best plan, bytes, 64 ranks": True,
    }


def test_losing_to_plain_steps_is_not_met(render):
    point = {"steps": 50, "shift": 3.0, "degree": 8, "depth": 8, "ceiling": 6.2, "tail": 30.0}
    case = {"case": "diffusion/steps-fidelity", "summary": {"equal_depth_psnr_db": [point]}}
    point |= {"parastep": 29.0, "fewer steps": 28.0, "fewer steps, UniPCMultistep": 29.9}
    assert list(found(render, case).values()) == [True]
    point["fewer steps, UniPCMultistep"] = 30.1
    assert list(found(render, case).values()) == [False]


def test_numbers_keep_their_spread_and_losses_stand_out(render):
    cells = render.cells
    assert cells.cell({"median": 2.0, "low": 1.0, "high": 3.0, "all": [1.0, 2.0, 3.0]}) == (
        "2 (1 to 3, n = 3)"
    )
    assert cells.cell([1, 8, 8]) == "1 8 8"
    assert cells.cell([0.5]) == "0.5 (n = 1)"
    assert cells.cell([]) == ""
    assert cells.times(1.004) == "1.00x"
    assert cells.times(0.5) == "**0.50x**"
    assert cells.table(("a",), []) == []


def test_without_results_the_page_says_so(render):
    assert "No result is recorded yet" in render.measured({})


def test_pages_say_what_results_and_docstrings_say(render, capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_noticed(render, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(render, "DOCS", tmp_path)
    monkeypatch.setattr(render, "pages", lambda: {"measured.md": "new"})
    assert render.main(["--check"]) == 1
    assert "docs/measured.md is stale" in capsys.readouterr().err
    assert render.main([]) == 0
    assert render.main(["--check"]) == 0


def test_the_page_of_a_result_that_is_gone_is_removed(render, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(render, "DOCS", tmp_path)
    monkeypatch.setattr(render, "pages", lambda: {"measured/new.md": "new"})
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured/old.md").write_text("old")
    assert render.main(["--check"]) == 1
    assert "docs/measured/old.md is stale" in capsys.readouterr().err
    assert render.main([]) == 0
    assert [path.name for path in (tmp_path / "measured").iterdir()] == ["new.md"]


RESULT = """
{"stretto": "result/1", "case": "attention/ring-4", "basis": "measured", "device": "a machine",
 "command": "stretto bench", "commit": "0f3c9e1", "versions": {"torch": "2.11"}, "load": 0.4,
 "rows": [{"who": "ours", "ms": [4.11, 4.09, 4.15], "bytes_per_rank": 50331648},
          {"who": "peer 1.2", "ms": [5.02, 5.07]}],
 "summary": {"ratio_median": 1.22, "bytes_match": true}}
"""
