"""Jump Your Steps (2410.07761): timestep tables for discrete diffusion, optimised once and kept in the scheduler."""

from .costs import Cost
from .klub import KLUB
from .search import optimize_timesteps
from .statistics import RateStatistics
from .tables import TimestepTables

__all__ = ["KLUB", "Cost", "RateStatistics", "TimestepTables", "optimize_timesteps"]
