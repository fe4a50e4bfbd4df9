"""Make a large model run well on the devices at hand.

Public names load on first use (PEP 562), so `import stretto` costs milliseconds and imports
no torch. What is not in `__all__` is not API.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto import errors, testing
    from stretto.cluster.model import Cluster
    from stretto.cost.estimate import Estimate
    from stretto.diffusion.api import parallelized
    from stretto.mesh.join import init_mesh
    from stretto.mesh.mesh import Mesh
    from stretto.ops.attention.dist import attention
    from stretto.parallel.api import parallelize
    from stretto.parallel.batch import shard
    from stretto.plan.context import Context
    from stretto.plan.model import Plan
    from stretto.plan.options import Data, Guidance, Steps
    from stretto.search.judge import estimate, explain
    from stretto.search.space import find_plans
    from stretto.workload.model import Workload

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "Context",
    "Data",
    "Estimate",
    "Guidance",
    "Mesh",
    "Plan",
    "Steps",
    "Workload",
    "attention",
    "errors",
    "estimate",
    "explain",
    "find_plans",
    "init_mesh",
    "parallelize",
    "parallelized",
    "shard",
    "testing",
]

#: Where each public name lives; a name that is itself a module has no entry.
_HOMES = {
    "Cluster": "stretto.cluster.model",
    "Context": "stretto.plan.context",
    "Data": "stretto.plan.options",
    "Estimate": "stretto.cost.estimate",
    "Guidance": "stretto.plan.options",
    "Mesh": "stretto.mesh.mesh",
    "Plan": "stretto.plan.model",
    "Steps": "stretto.plan.options",
    "Workload": "stretto.workload.model",
    "attention": "stretto.ops.attention.dist",
    "estimate": "stretto.search.judge",
    "explain": "stretto.search.judge",
    "find_plans": "stretto.search.space",
    "init_mesh": "stretto.mesh.join",
    "parallelize": "stretto.parallel.api",
    "parallelized": "stretto.diffusion.api",
    "shard": "stretto.parallel.batch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stretto' has no attribute {name!r}")
    if name not in _HOMES:
        return import_module(f"stretto.{name}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
