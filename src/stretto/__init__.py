"""Make a large model run well on the devices at hand.

Public names load on first use (PEP 562), so `import stretto` costs milliseconds and imports
no torch. What is not in `__all__` is not API.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Guidance": "stretto.plan.options",
    "Mesh": "stretto.mesh.mesh",
    "Plan": "stretto.plan.model",
    "Steps": "stretto.plan.options",
    "init_mesh": "stretto.mesh.mesh",
    "parallelized": "stretto.diffusion.api",
}
_MODULES = ("errors", "testing")

__all__ = sorted([*_HOMES, *_MODULES])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"stretto.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'stretto' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
