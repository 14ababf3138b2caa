"""Judges one model: requests, audit actors and their manager, measurements, objectives, verdict, audit card."""
