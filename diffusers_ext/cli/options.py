"""Types of options that several commands share."""

import math
import re

import click

from ..runs.lists import Listed


class Steps(click.ParamType):
    """A number of steps >= 1, or a respacing such as "10,10,5" or "ddim25", which goes to the pipeline as it is."""

    name = "N|RESPACING"

    def convert(self, value, param, ctx):
        try:
            steps = int(value)
        except ValueError:
            if re.fullmatch(r"ddim[1-9]\d*|\d+(\s*,\s*\d+)+", value):
                return value
            self.fail(
                f'{value!r} is neither a number of steps nor a respacing, such as "10,10,5" or "ddim25"', param, ctx
            )
        if steps < 1:
            self.fail(f"{steps} is not >= 1", param, ctx)
        return steps


class Finite(click.FloatRange):
    """A finite number of a range."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite", param, ctx)
        return number


class Device(click.ParamType):
    """A device that torch has here."""

    name = "DEVICE"

    def convert(self, value, param, ctx):
        from ..machine.versions import check_device

        try:
            return check_device(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Model(click.ParamType):
    """A shipped model, a folder or a Hub id by its form; whether the Hub has it is seen where it is loaded."""

    name = "MODEL"

    def convert(self, value, param, ctx):
        from ..shipped import check_name

        try:
            check_name(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return value


class Schedule(Listed):
    """How the edges of the steps are found: "table", "even", or the edges themselves."""

    def __init__(self):
        super().__init__(float, "table|even|1,...,T")

    def convert(self, value, param, ctx):
        return value if value in ("table", "even") else super().convert(value, param, ctx)


SEED = click.IntRange(0, 2**62)  # room for the number of a sample, which is added
DEVICE = click.option("--device", type=Device(), default=None, help="torch device; by default the fastest one here.")
MODEL = click.argument("model", type=Model())
