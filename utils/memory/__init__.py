"""Estimates the GPU memory of a run from config.json alone, without the weights.

In reading order: planner, layout, states, activations, fake, live, search, report.
"""

from utils.memory.planner import Estimate, Planner, Setting, estimate

__all__ = ["Estimate", "Planner", "Setting", "estimate"]
