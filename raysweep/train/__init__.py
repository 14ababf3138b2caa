"""Train workers: what they do, and how they are kept."""
