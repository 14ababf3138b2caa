"""Train workers: jobs, the loop that does them, and the executors that run workers on Ray."""
