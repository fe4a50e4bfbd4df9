"""Checks of values that are still being computed on the device, made a window later.

Reading a value at once would hold the host until the device is done, and then the device until the
host has queued work again: 1.5 ms a step on an H100 with a 64 ms denoiser, and the replay's small
kernels in full (measured, benchmarks/results). A window later the value has long been there.
Finding and copying it takes a GPU time as well; on a stream of its own, it runs beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        copies.append(copy.copy_(tensor.detach(), non_blocking=is_pinned))
    arrived = torch.cuda.Event() if any(t.device.type == "cuda" for t in tensors) else None
    if arrived is not None:
        arrived.record()

    def read() -> list[Tensor]:
        if arrived is not None:
            arrived.synchronize()
        return copies

    return read


class Deferred:
    """Checks in the order they were asked for. On the CPU each is made at once.

    All ranks of a run ask for the same checks of equal values and close the same windows, so a
    fault is raised on all of them at the same place.
    """

    def __init__(self) -> None:
        self._earlier: list[Callable[[], None]] = []
        self._current: list[Callable[[], None]] = []
        self._side: torch.cuda.Stream | None = None

    @contextmanager
    def aside(self, *used: Tensor) -> Iterator[None]:
        """Work with `used` that no later kernel waits for, until the window closes."""
        device = used[0].device
        if device.type != "cuda":
            yield
            return
        self._side = self._side or torch.cuda.Stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))
        for tensor in used:
            # Freed by its owner, its memory is not given away before this work is done.
            tensor.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

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
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        due, self._earlier, self._current = self._earlier, self._current, []
        for check in due:
            check()

    def finish(self) -> None:
        """Make all that are left."""
        self.close_window()
        self.close_window()
