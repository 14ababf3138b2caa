"""What a trial's function reports to the searcher. Light to import: the process of every trial loads it, and not Optuna."""

from __future__ import annotations

OBJECTIVES = ("residue", "damage")  # both are minimised
FINAL = "raysweep_final"  # key of a trial's last result; a trial that ends without it was stopped early
