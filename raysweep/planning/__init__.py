"""Dry runs: the plan and the cost of a sweep, without starting it."""
