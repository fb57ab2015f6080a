"""How much memory a run will take, from config.json alone."""

from utils.memory.planner import Estimate, Planner, Setting, estimate

__all__ = ["Estimate", "Planner", "Setting", "estimate"]
