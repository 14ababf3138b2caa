"""The glossary of reports: a sentence for each term that readers may not know."""

from __future__ import annotations

from raysweep.results import pareto
from raysweep.results.choice import MEANING

GLOSSARY = {
    "base": "the model before unlearning",
    "oracle": "a model retrained from scratch without the forgotten data: what perfect forgetting would give",
    "anchors": "the measured models that fix the scales: the base, the oracles, and a destroyed model (untrained weights)",
    "candidate": "the model that one trial made",
    "probe": "the cheap measurement of every candidate; it steers the search",
    "audit": "the full measurement of the best candidates, on samples that the search never saw",
    "view": "one check of how much is left of the forgotten data",
    "residue": f"{MEANING['residue']}; the largest over all views, so that no easy view hides another",
    "damage": f"{MEANING['damage']}; over-forgetting counts as damage",
    "over-forgetting": "how far a view lies beyond the oracles, on the side away from the base",
    "front": "the audited candidates that no other candidate dominates; one dominates another if it is no worse in residue "
    "and in damage and better in one of them",
    "hypervolume": "the area that the front dominates, up to the reference point of residue {:g} and damage {:g}; larger is "
    "better, and the point is the same in every sweep".format(*pareto.REFERENCE),
    "noise floor": "residue and damage of the oracles, each placed by the others: how far from 0 a model that never saw the forgotten "
    "data lies by chance",
    "attack": "an attempt to bring the forgotten data back, for example by a little further training",
    "presence": "how much of the forgotten data a model shows, from 0 to 1: the share of samples in which the judge sees "
    "the forgotten class, or the correlation of what the model rebuilds with the forgotten image",
    "excess": "presence minus the mean presence of the oracles after the same attack",
    "null": "what an attack has to beat: a random prompt of the same length in place of the one that it searched for, or part of a "
    "picture that was not to be forgotten in place of a forgotten one; it counts in no verdict",
    "gain": "presence after an attack minus presence after its null; above 0 if what the attack found or was given brings more back than "
    "chance does",
}
