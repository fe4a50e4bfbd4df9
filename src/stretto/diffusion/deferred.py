"""Checks of values that are still being computed on the device, made a window later.

Reading a value at once would hold the host until the device is done, and then the device until the
host has queued work again: 1.5 ms a step on an H100 with a 64 ms denoiser, and the replay's small
kernels in full (measured, benchmarks/results). A window later the value has long been there.
Finding and copying it takes a GPU time as well; on a stream of its own, it runs beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

#: Raises an error of the tree for a host tensor that shows a fault.
Check = Callable[[Tensor], None]


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; from pageable memory the host would wait for a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def reading(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to read tensors; the call waits for host copies of what they hold now."""
    copies = []
    for tensor in tensors:
        is_pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinned)
        copies.append(copy.copy_(tensor.detach(), non_blocking=is_pinned))
    # Of the devices they lie on: a thread's current one may be another.
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    arrivals = [torch.cuda.current_stream(device).record_event() for device in devices]

    def read() -> list[Tensor]:
        for arrived in arrivals:
            arrived.synchronize()
        return copies

    return read


class Aside:
    """A second stream of a GPU, for work that the kernels after it need not wait for.

    One for all calls of a pipeline: a stream keeps memory of its own, and gives it to nobody else.
    What is made there is of use after `join`. On the CPU work is done in its turn.
    Only what is made inside and what is named as used may be read inside: the memory of anything
    else goes, when freed, to kernels that do not wait for this stream.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def work(self, *used: Tensor) -> Iterator[None]:
        """Inside, work with `used`, and what came before it, is done on that stream."""
        device = used[0].device
        if device.type != "cuda":
            yield
            return
        stream = self._streams.get(device) or torch.cuda.Stream(device)
        self._streams[device] = stream
        stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in used:
            # Freed by its owner, its memory is not given away before this work is done.
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """What follows waits for all work until here; the host does not."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)


class Deferred:
    """Checks in the order they were asked for. On the CPU each is made at once.

    All ranks of a run ask for the same checks of equal values and close the same windows, so a
    fault is raised on all of them at the same place.
    """

    def __init__(self, aside: Aside) -> None:
        self._aside = aside
        self._earlier: list[Callable[[], None]] = []
        self._current: list[Callable[[], None]] = []

    def aside(self, *used: Tensor) -> AbstractContextManager[None]:
        """Work with `used` that no later kernel waits for, until the window closes."""
        return self._aside.work(*used)

    def check(self, value: Tensor, check: Check) -> None:
        """Call `check` with a host copy of `value`: now, or when the next window has closed."""
        if value.device.type != "cuda":
            check(value)
            return
        with self.aside(value):
            read = reading([value])
        self._current.append(lambda: check(*read()))

    def close_window(self) -> None:
        """Make the checks of the window before: the device is at most one window behind."""
        self._aside.join()
        due, self._earlier, self._current = self._earlier, self._current, []
        for check in due:
            check()

    def finish(self) -> None:
        """Make all that are left."""
        self.close_window()
        self.close_window()
