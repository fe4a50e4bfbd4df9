"""How the commands lay out tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def table_of(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table: `left` columns of words, `right` columns of numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_whole(console: Console, table: Table) -> None:
    """A table at its own width: cut columns would lose numbers; a narrower terminal folds lines."""
    before = console.width
    console.width = max(console.width, 1000)
    natural = console.measure(table).maximum
    console.width = max(natural, before)
    console.print(table)
    console.width = before
