"""RG: restricted gradient on plain retain minibatches.

Source: Ko et al., "Boosting Alignment for Post-Unlearning Text-to-Image Generative Models", NeurIPS 2024,
arXiv:2412.07808, Theorem 4, the ablation without a diversified retain set. The direction is that of `methods.rgd`:
    delta_f + lam * delta_r,  each the other gradient's normal part where <g_f, g_r> < 0
The released code gives RG the same class-balanced retain set as RGD, in minibatches; that is `retain_pass: balanced`.
"""

from __future__ import annotations

from methods.rgd import RGD, RestrictedSettings


class RG(RGD):
    """Descends the restricted gradient on retain minibatches; arXiv:2412.07808, Theorem 4."""

    name = "rg"
    source = "Ko et al., NeurIPS 2024, arXiv:2412.07808, Theorem 4, without diversity"
    Hyperparameters = RestrictedSettings
