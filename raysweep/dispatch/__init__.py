"""How tasks reach workers that may die at any time, and how outcomes come back. Used by `train` and by `auditing`."""
