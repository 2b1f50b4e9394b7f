"""SVAE+ for users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae._labels import hint
from pertvae.models.base import Capabilities, PerturbationModel, PerturbationTrainingPlan
from pertvae.models.base._requests import Request
from pertvae.models.samsvae._arguments import check_arguments, own_arguments, summary, without
from pertvae.models.samsvae._svaeplus_module import SVAEPlusModule

# ours, and the two published implementations where they differ
VARIANTS: dict[str | None, dict[str, Any]] = {
    None: {
        "mask_prior": 1 / 3,
        "mask_gradient": "identity",
        "mask_draws": "component",
        "mask_start": 0.0,
        "effect_start": 0.1,
        "global_kl": "full",
    },
    "insitro": {
        "mask_prior": 1 / 3,
        "mask_gradient": "gumbel",
        "mask_draws": "component",
        "mask_start": 0.0,
        "effect_start": 0.1,
        "global_kl": "plate",
    },
    "genentech": {
        "mask_prior": 0.5,
        "mask_gradient": "gumbel",
        "mask_draws": "cell",
        "mask_start": 5.0,
        "effect_start": 1.0,
        "global_kl": "full",
    },
}
GENENTECH_WARMUP = 10


class SVAEPlusTrainingPlan(PerturbationTrainingPlan):
    """The plan of all methods; counts the training cells of conditions, and knows the warm-up of ``"genentech"``.

    Parameters
    ----------
    module
        The module.
    n_epochs_kl_warmup
        ``None``: the variant's.
    **kwargs
        See :class:`~pertvae.models.base.PerturbationTrainingPlan`.
    """

    def __init__(self, module: SVAEPlusModule, *, n_epochs_kl_warmup: int | None = None, **kwargs: Any) -> None:
        if n_epochs_kl_warmup is None:
            n_epochs_kl_warmup = module.n_epochs_kl_warmup
        super().__init__(module, n_epochs_kl_warmup=n_epochs_kl_warmup, **kwargs)

    def on_fit_start(self) -> None:
        """Set the training statistics, those of conditions too."""
        super().on_fit_start()
        cells = getattr(getattr(self.trainer, "datamodule", None), "train_idx", None)
        if self.module.unique and self._manager is not None and cells is not None:
            doses = self._manager.get_from_registry(PERTURBATION_REGISTRY_KEY)[np.sort(np.asarray(cells))]
            self.module.set_condition_counts(doses)


class SVAEPlus(PerturbationModel):
    """SVAE+, a sparse mechanism shift variational autoencoder :cite:p:`Lopez23`.

    A perturbation moves the prior of the latent state: a mask says in which latents, an effect how far. The encoder
    reads expression only, so the posterior has to find out what was done to a cell. Unlike in SAMS-VAE there is no
    basal state of a cell that a perturbation could be added to: predicted cells are draws from the moved prior.

    In the paper every condition, a combination included, is a treatment of its own. By default effects of components
    add up here and scale with the dose (``combinations="sum"``), so that unseen combinations can be predicted.

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
        Posterior draws a training step; the re-implementation used 5.
    gene_likelihood
        ``"nb"`` (gene-wise dispersion), ``"poisson"``, or ``"normal"`` for real values.
    combinations
        ``"sum"``: the prior's mean is the sum of its components' effects, times their doses. ``"unique"`` (published):
        each combination has effects of its own and doses are ignored; predicting one without training cells raises.
    variant
        Published implementation that the defaults of the arguments below follow: ``"insitro"`` or ``"genentech"``, see
        Notes; ``None`` for ours.
    mask_prior
        Prior probability that a perturbation touches a latent: the mean ``1 / (1 + K)`` of ``pi ~ Beta(1, K)``, above 0
        and at most 0.5, where K = 1 and the prior is flat. 1/3 by default. A smaller one gives sparser masks and
        shrinks predicted effects.
    mask_gradient
        ``"identity"`` (default): a Bernoulli draw whose gradient is that of its probability. The penalty of pi is
        exact, and this gradient has its scale. ``"gumbel"`` (published): relaxed Bernoulli.
    mask_draws
        ``"component"`` (default): a training step draws one mask a component and particle. ``"cell"``: one a cell.
    mask_start
        Log-odds of inclusion at the start of training; 0 by default.
    effect_start
        Standard deviation of the random effects at the start of training; 0.1 by default.
    global_kl
        Weight of the penalty of pi: ``"full"`` (default), all components over the number of training cells, which draws
        components without training cells to no effect; ``"plate"``, a cell's components over their numbers of training
        cells.
    conditions
        Labels that are treatments, for ``combinations="unique"``; by default those of the registered data.

    Raises
    ------
    ValueError
        If an argument is not accepted, or the data were registered as real values and the likelihood needs counts.

    Notes
    -----
    ``variant="insitro"`` is the re-implementation that was compared with SAMS-VAE :cite:p:`Bereket23`:
    ``mask_prior=1/3`` (on Norman 2019), ``mask_gradient="gumbel"``, ``mask_draws="component"``, ``mask_start=0``,
    ``effect_start=0.1``, ``global_kl="plate"``, perceptrons without normalisation layers.

    ``variant="genentech"`` follows the original :cite:p:`Lopez23`: ``mask_prior=0.5`` (no sparsity unless asked for),
    ``mask_gradient="gumbel"``, ``mask_draws="cell"``, ``mask_start=5`` (masks start open), ``effect_start=1``,
    ``global_kl="full"`` and ten epochs of KL warm-up. Deviations from it: batch normalisation and dropout are not
    offered, and controls have the prior N(0, I) instead of a mask and effects of their own.

    Unlike in both publications, masks and effects have learning rates of their own, above that of the networks
    (``global_lr`` and ``mask_lr`` of ``plan_kwargs``).

    Both publications treat each combination as a treatment: add ``combinations="unique"``.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> pv.SVAEPlus.setup_anndata(adata, perturbation_key="perturbation", control="control")
    >>> model = pv.SVAEPlus(adata)
    >>> model.train()
    >>> predicted = model.predict_perturbation(["P001+P002"])
    """

    _module_cls = SVAEPlusModule
    _training_plan_cls = SVAEPlusTrainingPlan
    module: SVAEPlusModule
    capabilities = Capabilities(
        basal=("prior",),
        latent_kinds=("full", "basal", "perturbation"),
        credible_effects=False,
        marginal_ll=True,
        program="latent dimension; effect = mask probability times shift of the prior",
        inclusion="mask probability",
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
        combinations: Literal["sum", "unique"] = "sum",
        variant: Literal["insitro", "genentech"] | None = None,
        mask_prior: float | None = None,
        mask_gradient: Literal["gumbel", "identity"] | None = None,
        mask_draws: Literal["component", "cell"] | None = None,
        mask_start: float | None = None,
        effect_start: float | None = None,
        global_kl: Literal["full", "plate"] | None = None,
        conditions: Sequence[str] | None = None,
    ) -> None:
        arguments = own_arguments(locals())
        super().__init__(adata, registry)
        check_arguments({"variant": variant}, variant=tuple(VARIANTS))
        arguments |= {k: v for k, v in VARIANTS[variant].items() if arguments[k] is None}
        check_arguments(arguments)
        if not 0 < arguments["mask_prior"] <= 0.5:
            raise ValueError(f"mask_prior={mask_prior} is not above 0 and at most 0.5, where the prior is flat.")
        if conditions is not None and combinations == "sum":
            raise ValueError("conditions=... needs combinations='unique': with 'sum' effects belong to components.")
        if combinations == "unique":
            # kept as an argument, so that a loaded model has those of the training
            given_conditions = self._registered_conditions() if conditions is None else conditions
            canonical = dict.fromkeys(self.label_format.canonical(c) for c in given_conditions)
            conditions = [c for c in canonical if c not in self.label_format.control]
        self._conditions = conditions
        arguments["conditions"] = None if conditions is None else self._patterns(conditions)
        self.module = SVAEPlusModule(
            self._module_shape(gene_likelihood),
            n_epochs_kl_warmup=GENENTECH_WARMUP if variant == "genentech" else None,
            **without(arguments, ("combinations", "variant")),
        )
        self._model_summary_string = summary(self, f"combinations {combinations!r}", f"variant {variant!r}")
        self.init_params_ = self._get_init_params(locals())

    # ---------------------------------------------------------------- combinations as treatments of their own

    def _registered_conditions(self) -> list[str]:
        """Return the canonical labels of the registered cells, without the control."""
        if self.adata is None:
            raise ValueError(
                "combinations='unique' without data needs conditions=[...]: the labels that are treatments."
            )
        doses = sp.csr_matrix(self.adata_manager.get_from_registry(PERTURBATION_REGISTRY_KEY))
        ends = zip(doses.indptr[:-1], doses.indptr[1:], strict=True)
        present = {tuple(sorted(doses.indices[a:b])) for a, b in ends if b > a}
        names = self.perturbation_names
        return sorted(self.label_format.join([names[j] for j in row]) for row in present)

    def _patterns(self, conditions: Sequence[str]) -> torch.Tensor:
        """Return which components each condition has, conditions x components."""
        position = {c: j for j, c in enumerate(self.perturbation_names)}
        patterns = torch.zeros(len(conditions), len(position), dtype=torch.bool)
        for i, label in enumerate(conditions):
            for component in self.label_format.components(label):
                if component not in position:
                    raise ValueError(
                        f"conditions: {component!r} (in {label!r}) is not a registered perturbation."
                        f"{hint(component, position)}"
                    )
                patterns[i, position[component]] = True
        return patterns

    def _program_rows(self) -> list[str]:
        return super()._program_rows() if self._conditions is None else list(self._conditions)

    def _check_requests(self, requests: Sequence[Request]) -> None:
        if self._conditions is None:
            return
        counts = self.module.cells_per_condition
        seen = {c for c, n in zip(self._conditions, counts.tolist(), strict=True) if n > 0}
        for request in requests:
            label = self.label_format.join(request.doses)
            if request.doses and label not in seen:
                raise ValueError(
                    f"{request.label!r} has no training cells, and with combinations='unique' each combination has "
                    f"effects of its own.{hint(label, seen)} Use combinations='sum' to predict unseen combinations."
                )
