"""The progress bar of a training."""

from collections.abc import Callable, Iterator

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

LINES = 20  # of a training, where there is no terminal to draw a bar on


def steps_left(first: int, steps: int, shown: bool, loss: Callable[[], float | None] = lambda: None) -> Iterator[int]:
    """The steps from `first` on, with a bar over all of them, or lines in a file.

    Args:
        first: the first step.
        steps: in all.
        shown: whether there is a bar.
        loss: asked after each step, None at first.
    """
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            yield step
            value = loss()
            words = "training" if value is None else f"training, loss {value:.4f}"
            progress.update(task, completed=step + 1, description=words)
            if shown and not progress.console.is_terminal and (step + 1) % -(-steps // LINES) == 0:
                progress.console.print(f"{words}, {step + 1} of {steps} steps")
