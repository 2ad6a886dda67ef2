"""What stands in networks and schedulers while pipelines are called under a run, and sends their calls to it.

A run is found through a context variable, so that networks may be shared: by threads, by a pipeline that is called in
a callback, and by pipelines without a run. An interceptor stays as long as one run needs it.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

RUN: ContextVar[Any] = ContextVar("guidance_run", default=None)
_LOCK = threading.Lock()
_INTERCEPTED: dict[int, list] = {}  # by id: the object, the number of runs, and how to take the interceptor away


def intercept(target: Any, put: Callable[[Any], Callable[[], None]]) -> None:
    """Put an interceptor into a network or a scheduler with `put`, unless another run has; each `release`s it once."""
    with _LOCK:
        if id(target) not in _INTERCEPTED:
            _INTERCEPTED[id(target)] = [target, 0, put(target)]
        _INTERCEPTED[id(target)][1] += 1


def release(target: Any) -> None:
    """Take the interceptor away if no other run needs it."""
    with _LOCK:
        entry = _INTERCEPTED[id(target)]
        entry[1] -= 1
        if not entry[1]:
            del _INTERCEPTED[id(target)]
            entry[2]()


def into_network(module: torch.nn.Module) -> Callable[[], None]:
    """Put an interceptor into a network; returns what takes it away."""
    before = {name: module.__dict__[name] for name in _PLACES if name in module.__dict__}
    # nn.Module.__call__ runs this in place of itself. Set past __setattr__, which torch.compile's wrapper passes on to
    # the module inside.
    call, named = module._compiled_call_impl or module._call_impl, getattr(module, "cache_context", None)

    def intercepted(*args, **kwargs):
        run = RUN.get()
        stage = None if run is None else run.stages.get(id(module))
        return call(*args, **kwargs) if stage is None else stage.call(module, call, args, kwargs)

    @contextmanager
    def cache_context(name, **kwargs):
        run = RUN.get()
        with named(name, **kwargs):
            outer = None if run is None else run.contexts.get(id(module))
            if run is not None:
                run.contexts[id(module)] = name
            try:
                yield
            finally:
                if run is not None:
                    run.contexts[id(module)] = outer

    module.__dict__["_compiled_call_impl"] = intercepted
    if named is not None:
        module.__dict__["cache_context"] = cache_context

    def restore():
        for name in _PLACES:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)

    return restore


_PLACES = ("_compiled_call_impl", "cache_context")


def into_scheduler(scheduler: Any) -> Callable[[], None]:
    """Put an interceptor into a scheduler; returns what takes it away. Copies of the scheduler are seen as well."""
    stock = type(scheduler)
    if isinstance(stock, _SameType):  # a copy that the run has made
        stock = stock.__mro__[1]
    scheduler.__class__ = _seen_class(stock)

    def restore():
        scheduler.__class__ = stock

    return restore


class _SameType(type):
    """The type of a class that is equal to its parent, since a pipeline may compare the type of its scheduler."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[1]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


@functools.cache
def _seen_class(stock: type) -> type:
    """A subclass of a scheduler's class, of the same name, whose steps a run gets to see."""

    @functools.wraps(stock.step)
    def step(self, *args, **kwargs):
        if (run := RUN.get()) is None:
            return stock.step(self, *args, **kwargs)
        return run.stepped(self, functools.partial(stock.step, self), args, kwargs)

    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        if (run := RUN.get()) is not None:
            run.prepared.add(id(self))
        return stock.set_timesteps(self, *args, **kwargs)

    names = {"step": step, "set_timesteps": set_timesteps, "__doc__": stock.__doc__}
    names |= {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return _SameType(stock.__name__, (stock,), names)


def outside_callback(value: Any, name: str = "") -> Any:
    """A callback that is run outside of the run, so that a pipeline called in it is none of ours."""
    if isinstance(value, PipelineCallback | MultiPipelineCallbacks):
        seen = object.__new__(_outside_class(type(value)))
        seen.__dict__ = value.__dict__
        return seen
    plain = inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, functools.partial)
    # Of objects those alone that are named so, since a pipeline may use an argument as more than a function.
    return _outside(value) if plain or ("callback" in name and callable(value)) else value


@functools.cache
def _outside_class(stock: type) -> type:
    return type(stock.__name__, (stock,), {"__call__": _outside(stock.__call__)})


def _outside(function: Callable) -> Callable:
    @functools.wraps(function)
    def outside(*args, **kwargs):
        token = RUN.set(None)
        try:
            return function(*args, **kwargs)
        finally:
            RUN.reset(token)

    return outside
