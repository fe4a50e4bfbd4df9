"""What this machine has, and what NVML says where it can be asked."""

import os
import sys
from types import SimpleNamespace

from stretto.cluster import detect
from tests.fresh import modules_after


def nvml(names, memory=80 * 2**30):
    """Bindings of a machine with these GPUs, that note whether they were closed."""
    calls = []
    return SimpleNamespace(
        NVMLError=RuntimeError,
        calls=calls,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: names[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=memory),
    )


def test_the_cpu_comes_last_and_has_memory():
    found = detect.detect()[-1]
    assert found.kind == "cpu"
    assert found.count == len(os.sched_getaffinity(0))
    assert 2**28 < found.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_equal_gpus_are_one_kind(monkeypatch):
    bindings = nvml([b"H100", "H100", "T4"])
    monkeypatch.setitem(sys.modules, "pynvml", bindings)
    assert [(f.name, f.count) for f in detect.gpus()] == [("H100", 2), ("T4", 1)]
    assert bindings.calls == ["init", "shutdown"]


def test_without_driver_or_library_there_are_no_gpus(monkeypatch):
    broken = nvml([])

    def fail():
        raise broken.NVMLError("driver not loaded")

    broken.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert detect.gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect.gpus() == []


def test_a_container_limit_below_physical_memory_counts(monkeypatch):
    monkeypatch.setattr(detect, "_first_line", lambda path: str(2**20))
    assert detect.memory_bytes() == 2**20
    monkeypatch.setattr(detect, "_first_line", lambda path: "max")
    assert detect.memory_bytes() > 2**28


def test_looking_needs_no_torch():
    loaded = modules_after("from stretto.cluster import detect\ndetect.detect()")
    assert not loaded & {"torch", "pydantic", "numpy"}
