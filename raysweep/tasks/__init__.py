"""Tasks: what to forget, what to keep, what was held out."""
