"""A progress bar for whatever turns out to take long."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 1.0  # seconds until the bar is shown


class Bar:
    """Counts up to `total` on stderr; appears only after `PATIENCE` seconds, and goes away.

    Args:
        title: what is counted.
        total: how many of it there are.
        shown: False for none at all, as on ranks other than the first.
    """

    def __init__(self, title: str, total: int, shown: bool = True) -> None:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task("", total=total)
        self.shown, self.started, self.done = shown, time.monotonic(), 0

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        self.progress.update(self.task, completed=self.done)
        is_late = time.monotonic() - self.started > PATIENCE
        if self.shown and is_late and not self.progress.live.is_started:
            self.progress.start()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.progress.live.is_started:
            self.progress.stop()
