"""Latent arithmetic with scVI: what can be had today without a perturbation model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from pertvae._expression import mean_profile
from pertvae.reference._base import DEFAULT_N_CELLS, choose
from pertvae.reference._means import SumOfSingles
from pertvae.reference._render import label_key
from pertvae.reference._source import Source
from pertvae.reference._training import Training
from pertvae.reference._vae import LIKELIHOODS, Expected, TrainedVAE, train_vae

BLOCK = 256
"""Cells that are decoded together: always so many, so that a cell does not depend on how many were asked for."""


class SCVIArithmetic(SumOfSingles):
    """Additive in the latent space of scVI: what a user of scvi-tools can do without a perturbation model.

    ``scvi.model.SCVI`` is trained on the training cells, without their labels. The latent shift of a perturbation is
    the mean latent (posterior mean) of its cells as singles minus that of the controls. To predict a set of components,
    latents are sampled from the posteriors of source controls, the components' latent shifts are added, and counts are
    sampled from the decoder's likelihood at the observed library and batch of the source cell.

    It is not a perturbation model: the encoder never saw a label, a shift is one vector for all cells, and components
    that occur in training only inside combinations are unknown. Combinations are still used, unlabelled, to train
    scVI.

    Parameters
    ----------
    n_latent
        Latent dimensions. Default 10, that of scvi-tools.
    max_epochs
        Epochs at most; ``None`` (default) for scvi-tools' heuristic, 400 up to 20,000 cells and fewer above.
    model_kwargs
        Further arguments of ``scvi.model.SCVI``, whose defaults hold otherwise: ``gene_likelihood`` (``"zinb"``;
        ``"nb"`` and ``"poisson"`` work too), ``n_hidden``, ``n_layers``, ...
    train_kwargs
        Further arguments of ``SCVI.train``: ``batch_size``, ``plan_kwargs``, ``early_stopping_patience``, ... Unlike
        there, early stopping is on by default; its validation cells are the random 10% of the training cells that
        scvi-tools sets aside.

    Notes
    -----
    Cells outside of the training split are in nothing that scVI is given. With ``labels_key`` latent shifts are taken
    against the controls of the same context and averaged over contexts by cell numbers; with ``batch_key`` scVI
    corrects for the batch. The latent values before the softmax are used if ``latent_distribution="ln"``.

    The shift is that of models: mean log1p CP10k over generated cells minus the same for no latent shift with the same
    latents and libraries. :meth:`predict_shift` gives that of the default cells, 500 training controls at seed 0. There
    is no ``control_profile`` in the provenance, so metrics score the generated cells: ask for 2,000 or more.

    Training uses ``seed`` of :meth:`fit`, and leaves ``scvi.settings.seed`` and all global random states as they were.
    scvi-tools and torch are imported by :meth:`fit`.

    ``params_``: ``n_singles``, ``n_latent``, ``gene_likelihood``, ``epochs`` trained, ``n_batches``.
    """

    _needs_cells = True
    _needs_batches = True

    def __init__(
        self,
        n_latent: int = 10,
        *,
        max_epochs: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        train_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if n_latent < 1:
            raise ValueError(f"n_latent={n_latent!r}: pass 1 or more.")
        if max_epochs is not None and max_epochs < 1:
            raise ValueError(f"max_epochs={max_epochs!r}: pass 1 or more, or None.")
        self.n_latent = int(n_latent)
        self.max_epochs = max_epochs
        self.model_kwargs = dict(model_kwargs or {})
        self.train_kwargs = dict(train_kwargs or {})
        likelihood = self.model_kwargs.get("gene_likelihood", LIKELIHOODS[0])
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"gene_likelihood={likelihood!r} gives no counts: pass one of {', '.join(map(repr, LIKELIHOODS))}."
            )
        for name in ("n_latent", "max_epochs"):
            if name in self.model_kwargs | self.train_kwargs:
                raise ValueError(f"{name} is an argument of SCVIArithmetic itself: SCVIArithmetic({name}=...).")

    def _fit(self, training: Training) -> None:
        names = list(training.singles)
        if not names:
            raise ValueError("SCVIArithmetic needs single perturbations in training, and there are none.")
        cells = training.cells
        assert cells is not None  # asked for by _needs_cells
        x = cells.read()
        self._vae: TrainedVAE = train_vae(
            x,
            cells.batches,
            max_epochs=self.max_epochs,
            model_kwargs={"n_latent": self.n_latent, **self.model_kwargs},
            train_kwargs=self.train_kwargs,
            seed=cells.seed,
        )
        latents, _ = self._vae.encode(x, self._vae.codes(cells.batches, x.shape[0]))
        shifts = cells.shifts(latents)
        self._singles = {c: shifts[training.singles[c]] for c in names}  # latent values, here, not genes
        self.params_.update(
            n_singles=len(names),
            n_latent=self.n_latent,
            gene_likelihood=self._vae.module.gene_likelihood,
            epochs=self._vae.epochs,
            n_batches=max(1, len(self._vae.batches)),
        )

    def _shifts(self, parts: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        source = self._source(None, None, None)
        n = source.x.shape[0]
        return self._generate(parts, source, choose(n, min(n, DEFAULT_N_CELLS), 0), 0)[1]

    def _scored_with(self, source: Source) -> dict[str, np.ndarray]:
        return {}

    def _generate(
        self, parts: Mapping[str, tuple[str, ...]], source: Source, chosen: np.ndarray, seed: int
    ) -> tuple[list[sp.csr_matrix], np.ndarray]:
        blocks = self._basal(source, chosen, seed)

        def decoded(label: str, shift: np.ndarray) -> sp.csr_matrix:
            made = []
            for number, (latents, libraries, batches, n) in enumerate(blocks):
                rng = np.random.default_rng([seed, label_key(label), number])
                expected = self._vae.decode(latents + shift, libraries, batches)
                made.append(sp.csr_matrix(_first(expected, n).sample(rng), dtype=np.float32))
            return sp.vstack(made, format="csr")

        none = np.zeros(self.n_latent)
        base = mean_profile(decoded(self._fmt.control[0], none))
        cells, shifts = [], []
        for name, components in parts.items():
            shift = self._shift(components) if components else none
            cells.append(decoded(self._fmt.canonical(name), shift))
            shifts.append(mean_profile(cells[-1]) - base)
        return cells, np.stack(shifts)

    def _basal(
        self, source: Source, chosen: np.ndarray, seed: int
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """Return in blocks what does not depend on the label: latents, libraries, batch codes, and how many count."""
        libraries = np.asarray(source.x.sum(axis=1), dtype=np.float64).ravel()
        batches = self._vae.codes(source.batches, source.x.shape[0])
        blocks = []
        for number, start in enumerate(range(0, len(chosen), BLOCK)):
            some = chosen[start : start + BLOCK]
            rows = np.resize(some, BLOCK)  # filled up by repeating
            mean, sd = self._vae.encode(source.x[rows], batches[rows])
            noise = np.random.default_rng([seed, 4, number]).standard_normal(mean.shape)
            blocks.append((mean + sd * noise, libraries[rows], batches[rows], len(some)))
        return blocks


def _first(expected: Expected, n: int) -> Expected:
    """Return the expectations of the first cells."""
    mean, zeros, inverse = expected.mean, expected.zeros, expected.inverse_dispersion
    if inverse is not None and inverse.ndim == 2:
        inverse = inverse[:n]
    return Expected(mean[:n], inverse, None if zeros is None else zeros[:n])
