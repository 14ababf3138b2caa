"""raysweep: Pareto sweeps and audits of unlearning methods for diffusion models, on Ray."""
