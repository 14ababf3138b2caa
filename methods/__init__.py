"""Unlearning methods in plain PyTorch, one file per method, readable against its paper."""
