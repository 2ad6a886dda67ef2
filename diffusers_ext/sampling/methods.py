"""What a call asks for and its pipeline does not take: put around it, by the scheduler or as a guidance interval."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..pipelines.guidance_interval import GuidanceInterval
from ..pipelines.interval import Interval
from ..schedulers import boost_and_skip

BOOST = ("gamma", "skip_steps", "skip_to_sigma")


def applied(pipe: DiffusionPipeline, call: dict) -> tuple[AbstractContextManager, dict]:
    """What to draw in, and the arguments that are left for the call.

    An interval that the call does not take is applied; gamma, skip_steps and skip_to_sigma that it does not take make
    a Boost-and-Skip scheduler of the pipeline's own, for the time of the block.

    Raises:
        ValueError: for an interval that is none, pipelines that cannot be limited, schedulers that cannot be boosted
            and pipelines whose initial noise gamma does not reach.
    """
    limited, call = _limited(pipe, call)
    boosted, call = _boosted(pipe, call)
    return _both(boosted, limited), call


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def _limited(pipe: DiffusionPipeline, call: dict) -> tuple[AbstractContextManager, dict]:
    interval = call.get("guidance_interval")
    if interval is None:
        return nullcontext(), call
    Interval(guidance_interval=interval)  # says what is allowed
    if "guidance_interval" in inspect.signature(pipe.__call__).parameters:
        return nullcontext(), call
    others = {name: value for name, value in call.items() if name != "guidance_interval"}
    return GuidanceInterval(pipe, guidance_interval=interval), others


def _boosted(pipe: DiffusionPipeline, call: dict) -> tuple[AbstractContextManager, dict]:
    taken = inspect.signature(pipe.__call__).parameters
    given = {name: call[name] for name in BOOST if name in call and name not in taken}
    if not given:
        return nullcontext(), call
    others = {name: value for name, value in call.items() if name not in given}
    if given.get("gamma", 1) != 1 and not _multiplies_its_noise(pipe):
        raise ValueError(
            f"{type(pipe).__name__} does not take gamma, nor multiply its initial noise by scheduler.init_noise_sigma;"
            " pixel-space UNets are boosted by BoostAndSkipPipeline (--pipeline boost-and-skip)"
        )
    return scheduled(pipe, boosted_scheduler(pipe, given, call.get("num_inference_steps"))), others


def boosted_scheduler(pipe: DiffusionPipeline, given: dict, steps: int | str | None = None) -> SchedulerMixin:
    """The Boost-and-Skip scheduler of a pipeline.

    Args:
        pipe: whose scheduler.
        given: of `BOOST`.
        steps: of the schedule, whose skip is tried.

    Raises:
        ValueError: as `boost_and_skip`, and for a skip that leaves no step.
    """
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler that takes {', '.join(given)}; leave it out")
    boosted = boost_and_skip(pipe.scheduler, **given)
    if isinstance(steps, int):
        type(boosted).from_config(boosted.config).set_timesteps(steps)
    return boosted


@contextmanager
def scheduled(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """Another scheduler for a block."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def _multiplies_its_noise(pipe: DiffusionPipeline) -> bool:
    """Whether the source of the pipeline's class, or of one that it inherits from, reads init_noise_sigma."""
    for cls in type(pipe).__mro__:
        if cls is not DiffusionPipeline and issubclass(cls, DiffusionPipeline):
            try:
                if "init_noise_sigma" in inspect.getsource(cls):
                    return True
            except (OSError, TypeError):  # made while the program runs, as a limited pipeline's class is
                continue
    return False
