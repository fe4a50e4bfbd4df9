"""What devices this machine has, without torch: the operating system, and NVML where it is.

NVML (package nvidia-ml-py) is optional: where it or the driver is missing there are no GPUs.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Found:
    """One kind of device of this machine; `count` of them, `memory_bytes` each."""

    kind: str
    name: str
    count: int
    memory_bytes: int


def detect() -> list[Found]:
    """GPUs grouped by name, then the CPU: its cores, and all of its memory."""
    return [*gpus(), cpu()]


def cpu() -> Found:
    """Cores that this process may run on, and the memory of the machine or its container."""
    return Found("cpu", _processor(), usable_cores(), memory_bytes())


def usable_cores() -> int:
    """Cores this process may run on, which in a container is fewer than the host has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is smaller."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(Path("/sys/fs/cgroup/memory.max"))
    return min(physical, int(limit)) if limit.isdigit() else physical


def gpus() -> list[Found]:
    """NVIDIA GPUs by name, none where NVML cannot be asked."""
    counts: dict[tuple[str, int], int] = {}
    with _nvml() as nvml:
        for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            name = name.decode() if isinstance(name, bytes) else name
            key = (name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
            counts[key] = counts.get(key, 0) + 1
    return [Found("cuda", name, count, memory) for (name, memory), count in counts.items()]


@contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML bindings while they are open, None without library or driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _processor() -> str:
    """The processor's model name; Linux has it in a file, others in `platform`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
