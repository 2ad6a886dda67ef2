"""Timestep tables in a scheduler's config: what they may hold, for what they were made, and edges between them."""

import math
from collections.abc import Mapping
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np

# What must agree between the scheduler that a table was made for and the one that uses it: a time means another amount
# of noise otherwise.
NOISE = {
    "loglinear": ("eps",),
    "cosine": ("eps",),
    "arccos": ("eps",),
    "geometric": ("sigma_min", "sigma_max"),
    "exponential": ("time_base", "time_exponential"),
    "constant": ("constant_rate",),
}
ORDERED = ("rate_sigma", "Q_sigma")


def chain_of(config: Mapping) -> dict:
    """The settings of a scheduler's config that a table depends on: kernel, vocabulary and noise."""
    names = ["kernel", "vocab_size", "noise_schedule", *NOISE[config["noise_schedule"]]]
    if config["kernel"] == "gaussian":
        names += ORDERED
    return {name: config[name] for name in names}


def check_chain(chain: Mapping, config: Mapping, name: str) -> None:
    """Raise ValueError naming every setting of a config that differs from what tables were made for."""
    here = chain_of(config)
    different = [f"{key}={chain[key]!r}, not {here.get(key)!r}" for key in chain if chain[key] != here.get(key)]
    if different:
        raise ValueError(
            f"these timestep tables were made for {'; '.join(different)} as this {name} has; optimise tables for this"
            ' model, pass the scheduler that they belong to, or space steps evenly with timestep_spacing="uniform"'
        )


def check_edges(edges: list[float], name: str, steps: str | None = None) -> None:
    """Raise ValueError unless the edges of a schedule decrease strictly in (0, 1], n + 1 of them for n steps."""
    numbers = isinstance(edges, list | tuple) and all(isinstance(t, Real) and not isinstance(t, bool) for t in edges)
    if not numbers or len(edges) < 2 or not all(a > b for a, b in pairwise(edges)) or edges[0] > 1 or edges[-1] <= 0:
        raise ValueError(f"{name} must be at least two strictly decreasing numbers in (0, 1], got {edges!r:.200}")
    if steps is not None and str(len(edges) - 1) != str(steps):
        raise ValueError(f"{name} must be named by its number of steps and hold one edge more, got {len(edges)} edges")
    if steps is not None and edges[0] != 1:
        raise ValueError(f"{name} must begin at 1, where the prior is drawn, got {edges[0]!r}")


def check_tables(tables: Any, info: Any) -> None:
    """Raise ValueError, with the name, unless these are tables by number of steps and what is known of each."""
    for name, entries in (("timestep_tables", tables), ("timestep_table_info", info)):
        if not isinstance(entries, dict | None):
            raise ValueError(f"{name} must be a dictionary by number of steps or None, got {entries!r:.200}")
    for steps, edges in (tables or {}).items():
        check_edges(edges, f"timestep_tables[{steps!r}]", steps=str(steps))
    for steps, entry in (info or {}).items():
        if not (str(steps).isdecimal() and str(int(str(steps))) == str(steps)):
            raise ValueError(f"timestep_table_info must be named by numbers of steps, got {steps!r}")
        kinds = isinstance(entry, dict) and isinstance(entry.get("chain", {}), dict)
        if not kinds or not isinstance(entry.get("sampler", ""), str):
            raise ValueError(
                f"timestep_table_info[{steps!r}] must be a dictionary, its chain one too and its sampler a name, got"
                f" {entry!r:.200}"
            )


def tables_for(config: Mapping, counts_tokens: bool, chain: Any) -> dict[int, list[float]]:
    """The tables of a CTMCScheduler's config by number of steps, as its sampler takes them.

    counts_tokens: whether that is k-Gillespie, whose edges are shares of masked tokens; of the others they are times.
    With loglinear noise that is the same, and tables are right for both. Else times become shares by the noise,
    chain.sigma_bar(t).

    Raises:
        ValueError: for a table of another chain, and for one of shares where times are needed.
    """
    info, tables = {str(n): entry for n, entry in (config.get("timestep_table_info") or {}).items()}, {}
    for name, edges in (config["timestep_tables"] or {}).items():
        entry = info.get(str(name), {})
        check_chain(entry.get("chain", {}), config, "scheduler")
        made_for = entry.get("sampler")
        if config["noise_schedule"] != "loglinear" and made_for and (made_for == "gillespie") != counts_tokens:
            if not counts_tokens:
                raise ValueError(
                    f"timestep_tables[{name!r}] was made for sampler='gillespie', whose edges are shares of masked"
                    f" tokens and with noise_schedule={config['noise_schedule']!r} no times; optimise tables for"
                    f" sampler={config['sampler']!r}, or use 'gillespie'"
                )
            masked = [-math.expm1(-chain.sigma_bar(t)) for t in edges]
            shares = [max(config["min_timestep"], one / masked[0]) for one in masked]
            edges = shares if edges[-1] > config["min_timestep"] else [*shares[:-1], edges[-1]]
        tables[int(name)] = list(edges)
    return tables


def check_table_settings(spacing: str, tables: Any, info: Any) -> None:
    """Raise ValueError for what a scheduler's timestep_spacing, timestep_tables and timestep_table_info may not be."""
    if spacing not in ("uniform", "table"):
        raise ValueError(f'timestep_spacing must be "uniform" or "table", got {spacing!r}')
    check_tables(tables, info)


def table_edges(config: Mapping, steps: int) -> list[float] | None:
    """The edges of a number of steps whose last one ends at 0; None where a scheduler's own steps hold.

    config: of a scheduler of diffusers with tables. The last edge of a table counts as 0, and is no further step.
    """
    tables = {int(n): edges for n, edges in (config["timestep_tables"] or {}).items()}
    if not tables or config["timestep_spacing"] == "uniform":
        return None
    return interpolated_edges(tables, steps, end=1.0)  # no edge is above it: nothing is left


def check_vocabulary(config: Mapping, num_tokens: int) -> None:
    """Raise ValueError unless the tables of a config were made for networks of this number of real tokens."""
    for steps, entry in (config["timestep_table_info"] or {}).items():
        chain = entry.get("chain", {})
        size = chain.get("vocab_size")
        made_for = size - (chain.get("kernel") == "absorbing") if isinstance(size, int) else num_tokens
        if made_for != num_tokens:
            raise ValueError(
                f"timestep_tables[{steps!r}] was made for a network of {made_for} tokens, model_output has"
                f' {num_tokens}; optimise tables for this model, or use timestep_spacing="uniform"'
            )


def masked_counts(edges: list[float], length: int) -> list[int]:
    """How many of `length` tokens are masked after each step of a masked model; the last one leaves none.

    An edge is the share of tokens that are masked there, rounded to tokens so that every step unmasks at least one as
    long as there are any.
    """
    counts, left = [], length
    for later, share in zip(range(len(edges) - 2, -1, -1), [*edges[1:-1], 0.0], strict=True):
        left = max(0, min(left - 1, max(later, round(length * share))))
        counts.append(left)
    return counts


def interpolated_edges(tables: Mapping[int, list[float]], steps: int, end: float) -> list[float]:
    r"""Edges for a number of steps out of tables: the one for it, or between the next smaller and the next larger.

    A table is a curve over the share of its steps, of straight pieces between its edges. Where the last edge lies
    above `end` (the smallest time), what is left there is removed at once, which is one more step down to `end`: the
    curve of n steps then has n + 1 pieces. m pieces between curves of a < m < b mix the two, with the weight
    log(m / a) / log(b / a) of the larger. Beyond the smallest and the largest table their own curve is cut into m
    pieces, so that twice as many are the old ones cut in two.
    """
    if steps in tables:
        return [float(t) for t in tables[steps]]
    near = max((n for n in tables if n < steps), default=min(tables))
    far = min((n for n in tables if n > steps), default=max(tables))
    curves = [[*tables[n], end] if tables[n][-1] > end else tables[n] for n in (near, far)]
    free = any(tables[n][-1] > end for n in (near, far))
    low, high = (len(curve) - 1 for curve in curves)
    share = 0.0 if low == high else min(1.0, max(0.0, math.log((steps + free) / low) / math.log(high / low)))
    places = np.linspace(0, 1, steps + free + 1)
    first, second = (np.interp(places, np.linspace(0, 1, len(curve)), curve) for curve in curves)
    edges = ((1 - share) * first + share * second).tolist()
    return [1.0, *edges[1 : steps + 1]]
