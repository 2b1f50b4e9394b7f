"""Conditional VAE for users."""

from __future__ import annotations

from typing import Literal

import torch
from anndata import AnnData
from mudata import MuData

from pertvae.models.base import Capabilities, PerturbationModel
from pertvae.models.base._posterior_shifts import posterior_shifts
from pertvae.models.samsvae._arguments import check_arguments, own_arguments, summary
from pertvae.models.samsvae._conditionalvae_module import ConditionalVAEModule
from pertvae.models.samsvae._leak import training_posteriors


class ConditionalVAE(PerturbationModel):
    """Conditional variational autoencoder, as compared with in :cite:t:`Bereket23`.

    Encoder and decoder are told which perturbations a cell received; the latent state has one prior for all cells, so
    that it holds what the perturbation does not say. Doses enter the first layers linearly: combinations never seen are
    extrapolated there. Predictions encode a cell under its own label and decode it with the doses swapped.

    The latent state has no part that belongs to a perturbation. What the programs report is what is left of it in the
    posterior: :meth:`get_perturbation_programs` has as ``effects`` the mean posterior shift of the training cells with
    a perturbation against the controls (least squares on doses and batch means; a cell with a combination counts for
    all its components, whose shifts add up), and as ``inclusion`` one minus the false discovery rate at which that
    shift would be called, from permutations of the controls. Both are computed when training ends and saved with the
    model. A model that tells the decoder everything has no such shifts: read what a perturbation does to genes from
    :meth:`predict_perturbation`.

    Parameters
    ----------
    adata
        Registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    registry
        A registration without data (for datamodules and loading).
    n_latent
        Latent dimensions.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    n_layers_decoder
        Hidden layers of the decoder, if not ``n_layers``. 0: linear in the latent state, before the softmax over genes.
    n_particles
        Posterior draws a training step; the encoder is evaluated once for all. The paper used 5.
    gene_likelihood
        ``"nb"`` (gene-wise dispersion), ``"poisson"``, or ``"normal"`` for real values.

    Raises
    ------
    ValueError
        If an argument is not accepted, or the data were registered as real values and the likelihood needs counts.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> pv.ConditionalVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    >>> model = pv.ConditionalVAE(adata)
    >>> model.train()
    >>> predicted = model.predict_perturbation(["P001+P002"])
    """

    _module_cls = ConditionalVAEModule
    capabilities = Capabilities(
        basal=("control", "prior"),
        latent_kinds=("full", "basal", "perturbation"),
        credible_effects=False,
        marginal_ll=True,
        program="latent dimension; effect = mean posterior shift of the training cells",
        inclusion="one minus the false discovery rate of the shift, from permutations of the controls",
    )

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict | None = None,
        n_latent: int = 32,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_layers_decoder: int | None = None,
        n_particles: int = 1,
        gene_likelihood: Literal["nb", "poisson", "normal"] = "nb",
    ) -> None:
        arguments = own_arguments(locals())
        super().__init__(adata, registry)
        check_arguments(arguments)
        self.module = ConditionalVAEModule(self._module_shape(gene_likelihood), **arguments)
        self._model_summary_string = summary(self)
        self.init_params_ = self._get_init_params(locals())

    @torch.inference_mode()
    def _after_training(self) -> None:
        """Compute the shifts of the posterior means of the training cells."""
        tables = posterior_shifts(*training_posteriors(self))
        for parameter, table in zip(
            (self.module.posterior_shift, self.module.posterior_inclusion), tables, strict=True
        ):
            parameter.copy_(torch.as_tensor(table, dtype=torch.float32))
