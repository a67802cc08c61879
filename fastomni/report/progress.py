"""What a terminal shows of work under way: a bar, the time left, and the numbers of the last step.

Where the output is no terminal nothing is drawn: lines in a file cannot be redrawn, and the plain
lines of a stage say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

REFRESHES_PER_SECOND = 4
PAIRS_PER_ROW = 4


class StageDisplay:
    """A stage on a terminal; redrawn at every step, left standing at the end.

    Args:
        name: of the stage.
        first_step: steps done before.
        total_steps: steps of the stage.
        console: a terminal.
    """

    def __init__(self, name: str, first_step: int, total_steps: int, console: Console) -> None:
        self._progress = Progress(*_columns(), console=console)
        self._task = self._progress.add_task(name, total=total_steps, completed=first_step)
        # What is printed meanwhile appears above the display.
        self._live = Live(self._progress, console=console, refresh_per_second=REFRESHES_PER_SECOND)
        self._live.start()

    def update(
        self, step: int, metrics: Sequence[tuple[str, str]], shares: Mapping[str, float]
    ) -> None:
        """Shows a step.

        Args:
            step: 1-based.
            metrics: (name, value) as shown.
            shares: part of the step -> share of its time.
        """
        self._progress.update(self._task, completed=step)
        table = Table.grid(padding=(0, 1))
        for _ in range(PAIRS_PER_ROW):
            table.add_column(style="dim")
            table.add_column(justify="right", min_width=8)
        for start in range(0, len(metrics), PAIRS_PER_ROW):
            pairs = metrics[start : start + PAIRS_PER_ROW]
            table.add_row(*[text for name, value in pairs for text in (name, f"{value}  ")])
        times = "  ".join(f"{name} {share:.0%}" for name, share in shares.items())
        time_line = Table.grid(padding=(0, 1))
        time_line.add_row("[dim]time[/dim]", times)
        shown = Group(self._progress, Padding(Group(table, time_line), (0, 0, 0, 2)))
        self._live.update(shown, refresh=True)

    def close(self) -> None:
        """Draws the last state and gives the terminal back."""
        self._live.stop()


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that goes when it is done; nothing where the output is no terminal.

    Args:
        title: beside the bar.
        total: of what is advanced.

    Yields:
        A function to call with how many more are done.
    """
    console = Console()
    if not console.is_terminal:
        yield lambda done: None
        return
    with Progress(*_columns(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
