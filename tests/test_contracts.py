"""The architecture's contracts, and that each of them can fail."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/stretto").rglob("*.py"))
LONGEST = 80
DECIDE = "errors axes documents quantities cluster workload plan cost search"

PLANTED = {
    "one direction": ("plan/io.py", "import stretto.cli.app"),
    "deciding needs no device": ("axes.py", "import torch"),
    "doing does not search": ("mesh/mesh.py", "import stretto.search.windows"),
    "kernels need only torch": ("mesh/mesh.py", "import pydantic"),
    "one door per library": ("testing/ranks.py", "import rich"),
}


def lint_imports(root):
    """Run import-linter with its working tree at `root`; its report and exit code."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr, done.returncode


def functions(path):
    """(name, line, number of lines, node) of every function in a file, methods included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1, node


def prints(tree):
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]


def test_contracts_hold():
    report, code = lint_imports(ROOT)
    assert code == 0, report


@pytest.mark.parametrize("contract", PLANTED)
def test_contract_notices_a_wrong_import(contract, tmp_path):
    file, line = PLANTED[contract]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src/stretto" / file).open("a", encoding="utf-8") as target:
        target.write(f"\n\n{line}\n")
    report, code = lint_imports(tmp_path)
    assert code == 1
    assert f"{contract} BROKEN" in report


def test_contracts_cover_every_deciding_and_doing_room():
    """A room that appears in src must be named in the contracts that are about its kind."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rooms = {path.stem for path in (ROOT / "src/stretto").iterdir()}
    for contract, kind in {
        "deciding needs no device": set(DECIDE.split()),
        "doing does not search": {"mesh", "ops", "parallel"},
        "kernels need only torch": {"mesh", "ops"},
    }.items():
        section = text.split(f'name = "{contract}"')[1].split("forbidden_modules")[0]
        assert [r for r in sorted(kind & rooms) if f'"stretto.{r}"' not in section] == []


def test_only_cli_prints():
    rooms = ("cli", "testing")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        if path.relative_to(ROOT / "src/stretto").parts[0] not in rooms
        for line in prints(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_no_function_is_longer_than_a_screen_or_two():
    lengths = sorted(
        (lines, f"{path.relative_to(ROOT)}:{line} {name}")
        for path in SOURCES
        if path.name != "triton.py"  # kernels may be long, and say so
        for name, line, lines, _ in functions(path)
    )
    p90 = lengths[int(0.9 * len(lengths))][0]
    print(f"{len(lengths)} functions, 90th percentile {p90} lines, longest {lengths[-3:]}")
    assert [where for lines, where in lengths if lines > LONGEST] == []
    assert p90 <= 30


def test_inner_packages_hold_a_docstring_and_nothing_else():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent.name != "stretto":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{path} holds more than a docstring"
            assert isinstance(body[0], ast.Expr), f"{path} has no docstring"


def test_names_say_something():
    empty = {"utils", "util", "core", "common", "helpers", "misc", "base", "manager"}
    assert [str(path) for path in SOURCES if path.stem in empty or path.parent.name in empty] == []
