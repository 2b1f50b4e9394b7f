"""Kinds of simulated screens by name.

A kind is a function of keyword arguments, ``seed`` among them. Kinds of counts share their parts
(:mod:`pertvae.datasets._count_screens`) and differ where they say so.
"""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad

from pertvae.datasets._artifact import artifact, artifact_confounded
from pertvae.datasets._authors import samsvae_authors
from pertvae.datasets._causal import causal
from pertvae.datasets._codes import codes
from pertvae.datasets._sparse import interacting_random, interacting_structured, sparse_additive

KINDS: dict[str, Callable[..., ad.AnnData]] = {
    "sparse_additive": sparse_additive,
    "interacting_structured": interacting_structured,
    "interacting_random": interacting_random,
    "artifact": artifact,
    "artifact_confounded": artifact_confounded,
    "codes": codes,
    "causal": causal,
    "samsvae_authors": samsvae_authors,
}
"""Every kind of screen."""
