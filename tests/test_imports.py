"""What an import really loads, asked of a fresh interpreter.

import-linter reads source: it sees neither that a submodule runs its package's `__init__` nor
an import by string. These tests do.
"""

import importlib
import importlib.util
import pkgutil

import pytest

from tests.fresh import modules_after
from tests.test_contracts import DECIDE as DECIDING_ROOMS

DECIDE = [f"stretto.{room}" for room in DECIDING_ROOMS.split()]
DEVICES = {"torch", "triton", "transformers", "diffusers"}


def tree(name):
    """Dotted names of a module and all below it."""
    module = importlib.import_module(name)
    below = pkgutil.walk_packages(getattr(module, "__path__", ()), name + ".")
    return [name, *(info.name for info in below)]


def imports(*roots):
    return "\n".join(f"import {name}" for root in roots for name in tree(root))


def test_deciding_loads_no_device_library():
    loaded = modules_after(imports(*DECIDE))
    assert "stretto.plan.model" in loaded
    assert not loaded & DEVICES


def test_mesh_and_operators_need_only_torch():
    code = imports("stretto.mesh", "stretto.ops")
    if importlib.util.find_spec("triton") is None:
        # Kernels are imported where a GPU is, and torch brings Triton there.
        code = "\n".join(line for line in code.splitlines() if not line.endswith(".triton"))
    loaded = modules_after(code, blocked=["pydantic", "yaml"])
    assert {"torch", "stretto.ops.attention.backends"} <= loaded


def test_a_blocked_library_is_noticed():
    with pytest.raises(AssertionError, match="pydantic is blocked in this test"):
        modules_after("import stretto.plan.model", blocked=["pydantic"])


def test_help_stays_within_its_import_budget():
    """`stretto --help` in 0.6 s: no heavy library, no command, few modules (310 measured)."""
    code = "from stretto.cli.app import main\nassert main(['--help']) == 0"
    loaded = modules_after(code)
    assert not loaded & (DEVICES | {"numpy", "pydantic", "yaml", "PIL", "plotly"})
    commands = {name for name in loaded if name.startswith("stretto.cli.")}
    assert commands == {"stretto.cli.app"}
    assert len(loaded) < 450


def test_import_has_no_effect_on_the_environment():
    """No variable set, nothing printed, no default group made, by importing all of stretto."""
    code = "import os\nbefore = dict(os.environ)\n" + imports("stretto.mesh", "stretto.plan")
    code += "\nimport torch.distributed as dist"
    code += "\nassert dict(os.environ) == before and not dist.is_initialized()"
    modules_after(code)
