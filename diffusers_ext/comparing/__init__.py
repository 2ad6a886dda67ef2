"""A model's settings side by side: one image for each, with equal seeds, in a grid with named axes."""

from .comparison import Cell, Comparison, compare
from .settings import AXES, COLUMNS, GUIDERS

__all__ = ["AXES", "COLUMNS", "GUIDERS", "Cell", "Comparison", "compare"]
