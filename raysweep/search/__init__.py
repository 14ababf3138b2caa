"""Search spaces, released values, the Tune searcher, and the Optuna study below it."""
