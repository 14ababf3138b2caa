"""Composes Ray, training, search and audit: runs sweeps, audits single models, trains shadows."""
