"""From tables to an answer: the audited front, its uncertainty, the recommendation."""
