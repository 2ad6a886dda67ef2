"""Lists of numbers on a command line, with commas or apart."""

from collections.abc import Callable
from typing import Any

import click


class Listed(click.ParamType):
    """Numbers of one type between commas."""

    def __init__(self, number: Callable, name: str):
        self.number, self.name = number, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        """The list; fails as click does for anything else."""
        if isinstance(value, list | tuple):
            return list(value)
        try:
            return [self.number(part) for part in value.split(",")]
        except ValueError:
            kind = "numbers" if self.number is float else "integers"
            self.fail(f"{value!r} is not {kind} between commas", param, ctx)


class Labels(Listed):
    """Class labels between commas, None for the word none: without a label."""

    def __init__(self) -> None:
        super().__init__(lambda part: None if part.strip() == "none" else int(part), "0,1,...|none")


class Interval(Listed):
    """The two ends of an interval of noise levels, LO:HI, or as in a list."""

    def __init__(self) -> None:
        super().__init__(float, "LO:HI")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        """[LO, HI]; raises ValueError unless 0 <= LO < HI."""
        from ..pipelines.interval import Interval as Checked

        interval = super().convert(value.replace(":", ",") if isinstance(value, str) else value, param, ctx)
        Checked(guidance_interval=interval)
        return interval


INTEGERS, NUMBERS = Listed(int, "0,1,..."), Listed(float, "1.5,2,...")
LABELS, INTERVAL = Labels(), Interval()


class ListsCommand(click.Command):
    """A command whose `Listed` options also take their numbers apart: --guidance-scales 1 2 3."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with commas between the numbers of a list."""
        return super().parse_args(ctx, self._joined(args))

    def _joined(self, args: list[str]) -> list[str]:
        lists = {name for option in self.params if isinstance(option.type, Listed) for name in option.opts}
        joined, rest = [], list(args)
        while rest:
            joined.append(rest.pop(0))
            if joined[-1] in lists:
                numbers = []
                while rest and _is_list_of_numbers(rest[0]):
                    numbers.append(rest.pop(0))
                joined += [",".join(numbers)] if numbers else []
        return joined


def _is_list_of_numbers(word: str) -> bool:
    try:
        return [float(part) for part in word.split(",")] != []
    except ValueError:
        return False
