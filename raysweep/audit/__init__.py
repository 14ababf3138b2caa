"""Judges one model: audit actors, what they measure, objectives, verdict, audit card."""
