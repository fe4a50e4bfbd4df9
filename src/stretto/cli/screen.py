"""What commands that start ranks share: a bar of their progress."""

from __future__ import annotations

from typing import Any


class Screen:
    """The progress of rank 0 as a bar, where somebody can see it."""

    def __init__(self, *, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[far]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, far="")

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def note(self, rank: int, note: dict[str, Any]) -> None:
        if rank:
            return
        done, total = note.get("done"), note.get("total")
        far = f"{done}/{total} steps" if total else ""
        if "loss" in note:
            far += f", loss {note['loss']:.3f}"
        self._bar.update(
            self._task, description=note["stage"], completed=done or 0, total=total, far=far
        )
