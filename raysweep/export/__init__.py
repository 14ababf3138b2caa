"""Hands over a chosen model: whole, or as a delta, with its model card."""
