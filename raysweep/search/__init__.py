"""Search spaces, their published points, and the searcher over Optuna. The only package that imports Optuna."""
