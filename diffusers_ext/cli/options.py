"""Types of options that several commands share."""

import math
import re
from importlib import import_module

import click

from ..runs.lists import Listed

SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class DType(click.Choice):
    """A dtype by its name in torch; accelerate's short names are the same."""

    def convert(self, value, param, ctx):
        return super().convert(SHORT_DTYPES.get(value, value), param, ctx)


class Words(click.Choice):
    """Words between commas, of those that are known."""

    def convert(self, value, param, ctx):
        """The list; fails as a choice does for another word."""
        return [super(Words, self).convert(word.strip(), param, ctx) for word in value.split(",")]


class Names(click.ParamType):
    """Words between commas, of those that a module of this package lists; it is imported when they are read.

    known: the module and its list, "comparing.GUIDERS". single: one word alone.
    """

    def __init__(self, known: str, name: str, single: bool = False):
        self.known, self.name, self.single = known, name, single

    def convert(self, value, param, ctx):
        """The list, or the single word; fails as click does for a word that is not known."""
        if isinstance(value, list):
            return value
        module, _, name = self.known.rpartition(".")
        known = list(getattr(import_module(f"diffusers_ext.{module}"), name))
        words = [value] if self.single else [word.strip() for word in value.split(",")]
        if unknown := [word for word in words if word not in known]:
            self.fail(f"{', '.join(map(repr, unknown))} is none of {', '.join(known)}", param, ctx)
        return value if self.single else words


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
        from ..model_names import check_name

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
DTYPE = click.option(
    "--dtype", type=DType(["float32", "float16", "bfloat16"]), default="float32", show_default=True,
    help="Of the weights.",
)  # fmt: skip
MODEL = click.argument("model", type=Model())
MIXED_PRECISION = click.option(
    "--mixed-precision", type=DType(["no", "float16", "bfloat16"]), default="no", show_default=True,
    callback=lambda ctx, param, dtype: {long: short for short, long in SHORT_DTYPES.items()}.get(dtype, dtype),
    help="Of training.",
)  # fmt: skip
PIPELINE = click.option(
    "--pipeline", type=click.Choice(["boost-and-skip"]), default=None,
    help="Load the model as this pipeline; by default as its own.",
)  # fmt: skip
CPU_THREADS = click.option(
    "--cpu-threads", type=click.IntRange(min=1), default=1, show_default=True,
    help="Of each process on a CPU; round-off depends on it. Many processes use many cores better.",
)  # fmt: skip
TRUST_REMOTE_CODE = click.option(
    "--trust-remote-code", is_flag=True, help="Run the .py files of the model's repository while loading it."
)
