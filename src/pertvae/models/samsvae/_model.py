"""SAMS-VAE for users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from anndata import AnnData
from mudata import MuData

from pertvae.models.base import Capabilities, PerturbationModel
from pertvae.models.base._phases import Phase
from pertvae.models.samsvae._additive import ADDITIVE, AdditiveMixin
from pertvae.models.samsvae._arguments import check_arguments, own_arguments, summary, without
from pertvae.models.samsvae._auto import Chooser
from pertvae.models.samsvae._evidence import heed_validation_cells
from pertvae.models.samsvae._module import SAMSVAEModule
from pertvae.models.samsvae._sparsify import Sparsifier


class SAMSVAE(AdditiveMixin, PerturbationModel):
    """Sparse additive mechanism shift variational autoencoder :cite:p:`Bereket23`.

    A cell's latent state is a basal state plus, for each perturbation it received, a sparse shift: a mask says which
    latents the perturbation touches, an effect how far. Combinations add up, so unseen combinations of seen
    perturbations can be predicted.

    Parameters
    ----------
    adata
        Registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    registry
        A registration without data (for datamodules and loading).
    n_latent
        Latent dimensions, each a program.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    n_layers_decoder
        Hidden layers of the decoder, if not ``n_layers``. 0: linear in the latent state, before the softmax over genes.
    n_particles
        Posterior draws a training step; the paper used 5.
    gene_likelihood
        ``"nb"`` (gene-wise dispersion), ``"poisson"``, or ``"normal"`` for real values.
    mask_prior
        Prior probability that a perturbation touches a latent. The paper's reported value; a larger one finds weaker
        effects and more that are not there.
    effect_prior_scale
        Prior standard deviation of the effects of a dose of 1, in units of the basal state's prior standard deviation:
        scale doses to about 1, or this to their inverse.
    embedding_inference
        Posterior of the effects: ``"mean_field"``, or ``"correlated"`` with the mask (a network reads it), ``"gated"``
        by the mask (effects that are off keep the prior and cost nothing), or ``"low_rank"`` (the effects of one
        perturbation are correlated among each other).
    basal_inference
        Posterior of the basal state: ``"mean_field"`` reads expression only; ``"correlated"`` also reads the cell's
        shift, which lets it explain only what the perturbation does not.
    mask_gradient
        ``"gumbel"`` (published: relaxed Bernoulli, KL through the same sample) or ``"identity"`` (exact KL).
    global_kl
        ``"full"`` or ``"plate"`` (published); see :class:`~pertvae.models.samsvae._module.SAMSVAEModule`.
    embedding_rank
        Rank of the covariance of ``embedding_inference="low_rank"``.
    mask_hyperprior
        ``None``: ``mask_prior`` is the same for all. ``"perturbation"``: each perturbation has its own inclusion
        probability, ``Beta(1, 1 / mask_prior - 1)``. ``"latent"``: each latent has its own, ``Beta(a / n_latent, 1)``
        (finite Indian buffet process), which prunes latents that no perturbation uses. Both have the mean
        ``mask_prior``.
    sparsify
        How training finds the masks. ``"rotate"``: effects without masks first, then a turn of the latent space to the
        basis in which they are sparse (Jennrich 2006), then masks; ``train`` divides its epochs over these phases, and
        closes masks that the validation cells speak against.
        ``"published"``: masks learn from the start, undecided; they hardly find the true programs, but where a
        perturbation has few cells they may predict better. ``"auto"``: trains both, in 1.4 times the steps, and keeps
        the published way if it describes validation cells better, by more than two standard errors (``sparsify_`` says
        which was kept); ``"rotate"`` without validation cells or early stopping.
    dose_response
        ``"linear"``: a shift is the dose times the effect. ``"hill"``: the effect is that of the perturbation's
        largest training dose, and smaller doses have a share of it that follows a Hill curve of their perturbation,
        learned with it (not in the paper). ``"categories"``: each training dose of a perturbation has an effect of its
        own, whose size the dose says nothing about: the perturbation's effect plus a deviation, under one mask (not in
        the paper). Other doses cannot be predicted.
    dose_deviation_scale
        Prior standard deviation of the deviations of ``"categories"``, as a share of ``effect_prior_scale``.
    dose_levels
        Perturbation and dose of each category, by default all doses that occur in the registered data (kept when the
        model is saved).
    basal_posterior
        ``"gaussian"``: diagonal Gaussian. ``"flow"``: a conditional normalising flow on top of it, for posteriors that
        are correlated, curved or have two modes; its KL is estimated at the draws (not in the paper).
    objective
        ``"elbo"``, or ``"iwae"``: ``n_particles`` draws of a cell's basal state are weighed by importance, for one
        draw of masks and effects, whose KL stays outside: a tighter bound (not in the paper).
    leak_correction
        Whether what sparse effects leave in the basal states of the training cells goes to the perturbation's shift
        when training ends: a regression of their posterior means on doses, shrunken by its noise. For predictions and
        latents; masks, programs and the likelihood are not touched.

    Raises
    ------
    ValueError
        If an argument is not accepted, or counts are needed and the data were registered as real values.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    >>> model = pv.SAMSVAE(adata)
    >>> model.train()
    >>> predicted = model.predict_perturbation(["P001+P002"])
    """

    _module_cls = SAMSVAEModule
    capabilities = Capabilities(
        **ADDITIVE,
        program="latent dimension; effect = expected mask times effect",
        inclusion="posterior mask probability",
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
        mask_prior: float = 0.001,
        effect_prior_scale: float = 1.0,
        embedding_inference: Literal["mean_field", "correlated", "gated", "low_rank"] = "mean_field",
        basal_inference: Literal["mean_field", "correlated"] = "correlated",
        mask_gradient: Literal["gumbel", "identity"] = "gumbel",
        global_kl: Literal["full", "plate"] = "full",
        sparsify: Literal["rotate", "published", "auto"] = "rotate",
        embedding_rank: int = 4,
        mask_hyperprior: Literal["perturbation", "latent"] | None = None,
        dose_response: Literal["linear", "hill", "categories"] = "linear",
        dose_deviation_scale: float = 0.5,
        dose_levels: Sequence[tuple[str, float]] | None = None,
        basal_posterior: Literal["gaussian", "flow"] = "gaussian",
        objective: Literal["elbo", "iwae"] = "elbo",
        leak_correction: bool = True,
    ) -> None:
        arguments = own_arguments(locals())
        super().__init__(adata, registry)
        check_arguments(arguments)
        dose_levels = self._dose_levels(dose_response, dose_levels)
        arguments["dose_levels"] = self._indexed_levels(dose_levels)
        shape = self._module_shape(gene_likelihood)
        self.module = SAMSVAEModule(shape, **without(arguments, ("sparsify", "leak_correction")))
        self.sparsify = sparsify
        self.sparsify_: str | None = None
        self._chooser: Chooser | None = None
        self.leak_correction = leak_correction
        self._model_summary_string = summary(self, f"mask prior {mask_prior}")
        self.init_params_ = self._get_init_params(locals())

    def _default_steps(self, early_stopping: bool) -> int:
        if self.sparsify == "published":
            return super()._default_steps(early_stopping)
        return 14_000 if self.sparsify == "auto" and early_stopping else 10_000

    def _training_phases(self, early_stopping: bool) -> list[Phase]:
        self._chooser = None
        if not self.is_trained_:  # a trained model goes on with the masks it has
            if self.sparsify == "auto" and early_stopping:
                self._chooser = Chooser(self)
                return self._chooser.phases()
            self.sparsify_ = "published" if self.sparsify == "published" else "rotate"
            if self.sparsify_ == "rotate":
                return Sparsifier(self.module).phases()
        return super()._training_phases(early_stopping)

    def _after_training(self) -> None:
        if self._chooser is not None:
            self.sparsify_ = self._chooser.choose()
            self._chooser = None
        elif self.sparsify_ == "rotate":
            heed_validation_cells(self)
        super()._after_training()

    def get_masks(self) -> pd.DataFrame:
        """Return the posterior probability that each perturbation touches each program.

        Returns
        -------
        DataFrame, perturbations x programs, values between 0 and 1.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        """
        self._check_if_trained(warn=False)
        inclusion = self.module.program_tables()[1].detach().cpu().numpy()
        names = [f"program_{k}" for k in range(inclusion.shape[1])]
        return pd.DataFrame(inclusion, index=self.perturbation_names, columns=names)
