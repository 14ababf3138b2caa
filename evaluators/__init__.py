"""Checks of an unlearned diffusion model in plain PyTorch and NumPy, one file per family of checks."""
