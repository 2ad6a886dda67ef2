"""Boost-and-Skip by target: the largest boost of which enough samples are valid."""

from .choice import BoostChoice, MeasuredBoost, choose_boost

__all__ = ["BoostChoice", "MeasuredBoost", "choose_boost"]
