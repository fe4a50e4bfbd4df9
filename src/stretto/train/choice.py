"""What `auto` means for a recipe: the attention plan with the least predicted time."""

from __future__ import annotations

import os
from typing import Any

from stretto.cluster.model import Cluster
from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.model import Origin
from stretto.plan.options import Context
from stretto.search.attention import TrainRanking, rank_plans
from stretto.train.dit import DitShape
from stretto.train.gpt import GptShape
from stretto.train.presets import PRESETS
from stretto.train.recipe import Recipe
from stretto.workload.arch import Arch
from stretto.workload.train import Training

#: Names of the dtypes where rates are kept.
_RATES = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}


def best_context(
    recipe: Recipe,
    ranks: int,
    fsdp: int,
    cluster: str | os.PathLike[str] | None = None,
    *,
    micro_batch: int = 1,
) -> tuple[Context, Origin]:
    """The attention plan for `ranks` ranks beside `fsdp` groups, and where it came from.

    Priced with `micro_batch` sequences at once: fewer and longer calls, more memory.
    Raises PlanMismatch where none is legal and fits; and as `ranked` does.
    """
    ranking = ranked(recipe, ranks * fsdp, cluster, micro_batch=micro_batch)
    fitting = [choice for choice in ranking.choices if choice.plan.dp.degree == fsdp]
    if not fitting:
        raise PlanMismatch(
            f"--cp auto: no plan of {fsdp} groups of {ranks} ranks among "
            f"{len(ranking.choices)} that are legal and fit; give --cp or another --fsdp"
        )
    seconds = fitting[0].estimate.seconds
    note = f"{seconds:.3g} s, {len(fitting)} plans compared, on {ranking.cluster.name}"
    return fitting[0].plan.cp, Origin(by="find_plans", basis="projected", note=note)


def ranked(
    recipe: Recipe,
    ranks: int,
    cluster: str | os.PathLike[str] | None = None,
    *,
    micro_batch: int = 1,
) -> TrainRanking:
    """All plans for a recipe. `cluster` None: CPU ranks of one machine, as measured on two cores.

    The documents of a sequence are taken to be one: what is packed together differs from step to
    step. Raises ConfigError, Infeasible.
    """
    fields: dict[str, Any] = {"sequences": recipe.sequences, "dtype": _RATES[recipe.dtype]}
    fields["window"] = recipe.window
    fields |= {"recompute": recipe.recompute, "state_bytes": state_bytes(recipe)}
    training = Training.of(arch_of(recipe), recipe.tokens, **fields)
    machine = Cluster.read("cpu-x2") if cluster is None else Cluster.read(cluster)
    return rank_plans(training, _of_size(machine, ranks), ranks=ranks, micro_batch=micro_batch)


def state_bytes(recipe: Recipe) -> int:
    """Bytes per parameter of what a step changes: weight, gradient, and AdamW's two moments."""
    moments = {"adamw": 2, "sgd": 0}[recipe.descent.optimizer]
    return (2 + moments) * (8 if recipe.dtype == "float64" else 4)


def arch_of(recipe: Recipe) -> Arch | str:
    """The model of a recipe as arithmetic; a folder stays a path to its config.json."""
    preset = PRESETS.get(recipe.model)
    if preset is None:
        return os.path.join(recipe.model, "config.json")
    shape = preset.shape
    common: dict[str, Any] = {"layers": shape.layers, "width": shape.width, "heads": shape.heads}
    common |= {"name": recipe.model, "head_dim": shape.head_dim}
    if isinstance(shape, GptShape):
        common |= {"kv_heads": shape.kv_heads, "feed_forward": shape.hidden, "mlp_matrices": 3}
        return Arch(**common, vocab=shape.vocabulary, tied=False)
    assert isinstance(shape, DitShape)
    common |= {"kv_heads": shape.heads, "feed_forward": 4 * shape.width, "vocab": 0}
    return Arch(**common, causal=False)


def _of_size(cluster: Cluster, ranks: int) -> Cluster:
    """A cluster of one node with more devices like its own, where it is too small.

    Raises ConfigError for one device: nothing says what two of them would talk over.
    """
    if cluster.size >= ranks or len(cluster.nodes) > 1:
        return cluster
    (node,) = cluster.nodes
    if not any(link.within == node.name for link in cluster.links):
        raise ConfigError(
            f"{cluster.name} has {cluster.size} device and no link within {node.name}, the run has "
            f"{ranks} ranks\n"
            "  why: the plan depends on what ranks talk over\n"
            "  to fix: a cluster with such a link, --cp with a plan by name, or one rank"
        )
    grown = node.model_copy(update={"devices": (node.devices[0], ranks)})
    name = f"{ranks} devices like those of {cluster.name}"
    return cluster.model_copy(update={"nodes": (grown,), "name": name})
