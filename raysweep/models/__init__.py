"""Handles over the model families that raysweep serves."""
