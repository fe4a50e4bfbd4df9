"""A process joins the mesh that a plan asks for, or is alone in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from stretto import axes
from stretto.errors import ConfigError, PlanMismatch
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import TIMEOUT_S, Mesh
from stretto.mesh.process import ProcessMesh
from stretto.mesh.symmetric import SymmetricMesh, require_one_node, share_devices

CARRIERS = ("auto", "nccl", "symmetric", "gloo")
#: What torch does after an error of NCCL: 1, set by torchrun, and 3 end the process by a signal,
#: before it can say which rank it lost; 2 ends the waits, and what follows raises.
_ON_NCCL_ERROR, _ENDS_PROCESS = "TORCH_NCCL_ASYNC_ERROR_HANDLING", ("1", "3")


class Sized(Protocol):
    """What a mesh needs of a plan: the axis sizes."""

    @property
    def sizes(self) -> Mapping[str, int]: ...


def init_mesh(
    plan: Sized,
    *,
    device: torch.device | str | None = None,
    timeout_s: float = TIMEOUT_S,
    carrier: str = "auto",
) -> Mesh:
    """The mesh a plan asks for, over the ranks that torchrun (or the caller) started.

    `device` None takes `cuda:LOCAL_RANK` where there is one, else the CPU. Without a launcher a
    plan of one rank needs no process group. `carrier` moves GPU tensors: nccl wants a GPU per
    rank, symmetric (torch's symmetric memory) all ranks on one node, gloo copies through the
    host. auto: nccl where it can; else, for ranks that share GPUs, symmetric if the plan splits
    sequences, else gloo. Raises PlanMismatch when degrees and ranks differ, ConfigError for a
    carrier that cannot.
    """
    if not isinstance(getattr(plan, "sizes", None), Mapping):
        raise PlanMismatch(
            f"plan {plan!r} is a {type(plan).__name__}; expected a Plan or a Context\n"
            "  to fix: Plan(cp=...), or Plan() for one rank"
        )
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not 0 < timeout_s < float("inf"):
        raise ConfigError(f"timeout_s={timeout_s!r}: seconds that a wait may last, above 0")
    device = None if device is None else present(device)
    if carrier not in CARRIERS:
        raise ConfigError(f"carrier {carrier!r} is unknown; known are {', '.join(CARRIERS)}")
    wanted = axes.world_size(plan.sizes)
    if not dist.is_initialized() and "RANK" not in os.environ:
        return _alone(plan, wanted, device, timeout_s)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(device) if device else _own_device(local)
    store = _join(chosen, timeout_s, carrier)
    if dist.get_world_size() != wanted:
        degrees = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1)
        raise PlanMismatch(
            f"the plan needs {wanted} ranks ({degrees or 'one'}) but {dist.get_world_size()} were "
            "started; change the degrees or the number of ranks"
        )
    return _carried(plan, chosen, carrier)(plan.sizes, chosen, store, timeout_s=timeout_s)


def present(device: torch.device | str) -> torch.device:
    """The device, if this process has it. Raises ConfigError."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is unknown to torch; give cpu or cuda:0") from None
    if wanted.type == "cpu":
        if wanted.index:
            raise ConfigError(f"device {wanted}: the processor is one device\n  to fix: cpu")
        return wanted
    if wanted.type != "cuda":
        raise ConfigError(
            f"device {wanted}: ranks work on cpu or cuda, no mesh moves tensors of "
            f"{wanted.type}\n  to fix: cpu, cuda:0, or None for what is there"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (wanted.index or 0) >= count:
        raise ConfigError(
            f"device {wanted}: this process sees {count} CUDA devices\n"
            "  why: none is built in, driven, or let through by CUDA_VISIBLE_DEVICES;\n"
            "  `stretto doctor` says more\n"
            f"  to fix: {f'cuda:0 to cuda:{count - 1}, or ' if count else ''}cpu, or None for "
            "what is there"
        )
    return wanted


def _carried(plan: Sized, device: torch.device, carrier: str) -> Callable[..., Mesh]:
    """Which kind of mesh moves tensors of this device."""
    if device.type != "cuda":
        if carrier in ("nccl", "symmetric"):
            raise ConfigError(f"carrier {carrier} moves GPU tensors, the mesh is on {device.type}")
        return ProcessMesh
    torch.cuda.set_device(device)
    ranks, local_ranks = dist.get_world_size(), _local_ranks()
    shared = local_ranks > torch.cuda.device_count()
    splits = axes.size("cp", axes.ordered(plan.sizes)) > 1
    if carrier == "auto" and shared and splits and local_ranks == ranks:
        carrier = "symmetric"
    if carrier == "nccl" and "nccl" not in dist.get_backend_config():
        raise ConfigError(
            f"carrier nccl wants a GPU per rank, but {local_ranks} ranks have "
            f"{torch.cuda.device_count()} here\n  to fix: carrier symmetric, or auto"
        )
    if carrier != "symmetric":
        return ProcessMesh
    require_one_node(ranks, local_ranks)
    if shared:
        share_devices()
    return SymmetricMesh


def _alone(plan: Sized, wanted: int, device, timeout_s: float) -> Mesh:
    if wanted != 1:
        raise PlanMismatch(
            f"the plan needs {wanted} ranks but this process was started alone; start it with "
            f"torchrun --nproc-per-node {wanted}, or use stretto generate --ranks {wanted}"
        )
    return LocalWorld(plan.sizes, device=device or _own_device(0), timeout_s=timeout_s).mesh(0)


def _own_device(local: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local % torch.cuda.device_count())


def _join(device: torch.device, timeout_s: float, carrier: str) -> dist.Store:
    """Enter the job's process group unless the caller did; its store carries our records."""
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_s)
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        backend = "gloo" if carrier == "gloo" else _backend(device)
        if os.environ.get(_ON_NCCL_ERROR, "1") in _ENDS_PROCESS:
            os.environ[_ON_NCCL_ERROR] = "2"
        dist.init_process_group(
            backend=backend, store=store, rank=rank, world_size=world, timeout=limit
        )
    else:
        store = dist.distributed_c10d._get_default_store()
    # Ranks make their meshes in the same order; each mesh has records of its own.
    own = dist.PrefixStore("stretto", store)
    number = own.add(f"meshes/{dist.get_rank()}", 1)
    return dist.PrefixStore(f"stretto/{number}", store)


def _backend(device: torch.device) -> str:
    """NCCL wants a GPU per rank; ranks that share one talk through gloo."""
    if device.type == "cuda" and _local_ranks() <= torch.cuda.device_count():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
