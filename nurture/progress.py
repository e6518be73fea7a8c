"""What a person sees while long work runs: a bar with what is done, how fast, and when it ends.

In a terminal, a live bar; elsewhere (a log file, a pipe) a plain line now and then. Only the main process shows any.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

PLAIN_EVERY = 20.0
"""Seconds between lines where there is no terminal."""


class Bar:
    """One piece of work of known or unknown length."""

    def __init__(self, label: str, total: float | None, console: Console, live: Progress | None) -> None:
        self.label, self.total, self.done = label, total, 0.0
        self._console, self._live = console, live
        self._task = live.add_task(label, total=total, facts="") if live else None
        self._started = self._shown = time.monotonic()

    def advance_to(self, done: float, facts: str = "") -> None:
        """Say that `done` of `total` is done, and `facts` to show beside it."""
        self.done = done
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, facts=facts)
        elif time.monotonic() - self._shown >= PLAIN_EVERY:
            self._shown = time.monotonic()
            self._console.print(self._plain_line(facts), highlight=False)

    def advance(self, amount: float = 1.0, facts: str = "") -> None:
        """Say that `amount` more is done."""
        self.advance_to(self.done + amount, facts)

    def _plain_line(self, facts: str) -> str:
        elapsed = time.monotonic() - self._started
        share = f"{self.done / self.total:4.0%}" if self.total else f"{self.done:,.0f}"
        left = (
            f", {elapsed / self.done * (self.total - self.done):.0f} s left"
            if self.total and self.done
            else ""
        )
        return f"{self.label}: {share} {facts}, {elapsed:.0f} s{left}"


@contextmanager
def progress_bar(label: str, total: float | None, *, show: bool = True, stays: bool = True) -> Iterator[Bar]:
    """Yield a `Bar` that is shown while the block runs.

    Args:
        label: what the work is.
        total: how much there is to do, in any unit; None if that is unknown.
        show: False in processes that are not the main one.
        stays: whether the finished bar remains in the terminal; False for short work of which there is much.
    """
    console = Console(stderr=True, quiet=not show)
    if not (show and console.is_terminal):
        yield Bar(label, total, console, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=not stays) as live:
        yield Bar(label, total, console, live)


def tracked(items: Sequence[Item], label: str, *, show: bool = True, stays: bool = True) -> Iterator[Item]:
    """Yield `items` while a bar shows how many were done with; arguments as of `progress_bar`."""
    with progress_bar(label, len(items), show=show, stays=stays) as bar:
        for item in items:
            yield item
            bar.advance()
