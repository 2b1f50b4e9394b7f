"""What the modules of all methods share: covariates, training statistics, likelihood, sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import BaseModuleClass, auto_move_data
from torch import Tensor
from torch.nn import functional as F

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.nn import ExpressionDecoder

SD_FLOOR, COUNT_SD_FLOOR = 1e-6, 1.0


@dataclass(frozen=True)
class ModuleShape:
    """Sizes read from a registration.

    Parameters
    ----------
    n_genes, n_components
        Genes and perturbations.
    n_batch, n_labels
        Categories of batch and context; 1 means that none was registered.
    n_cats_per_cov
        Categories of each further categorical covariate.
    n_continuous_cov
        Continuous covariates.
    """

    n_genes: int
    n_components: int
    n_batch: int = 1
    n_labels: int = 1
    n_cats_per_cov: tuple[int, ...] = ()
    n_continuous_cov: int = 0

    @property
    def n_covariates(self) -> int:
        """Width of the covariate vector: one-hot batch, context and categories, then continuous covariates."""
        return sum(n for n in (self.n_batch, self.n_labels, *self.n_cats_per_cov) if n > 1) + self.n_continuous_cov


@dataclass
class TrainingStatistics:
    """Numbers from the training cells alone.

    Parameters
    ----------
    input_mean, input_sd
        Of the encoder's input for each gene (log1p counts, or the values themselves), ddof 1.
    output_bias, output_log_scale
        Where the decoder's gene-wise parameters start: log share of all counts and log inverse dispersion by moments
        (real values: mean and log standard deviation).
    cells_per_component
        Training cells with a non-zero dose of each component.
    n_cells
        Training cells.
    max_active
        Non-zero doses a training cell has at most; 0 when not known.
    cells_per_dose
        Training cells of each pair of a component (its index) and a dose; ``None`` if not known.
    """

    input_mean: np.ndarray
    input_sd: np.ndarray
    output_bias: np.ndarray
    output_log_scale: np.ndarray
    cells_per_component: np.ndarray
    n_cells: int
    cells_per_dose: Mapping[tuple[int, float], int] | None = None
    max_active: int = 0

    def dose_sizes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the largest dose and the root mean square of the non-zero doses of each component, 0 without any."""
        if self.cells_per_dose is None:
            return None
        largest, squares = np.zeros((2, len(self.cells_per_component)))
        for (component, dose), n in self.cells_per_dose.items():
            largest[component] = max(largest[component], dose)
            squares[component] += n * dose**2
        return largest, np.sqrt(squares / np.maximum(self.cells_per_component, 1))


class PerturbationModule(BaseModuleClass):
    """Base of the modules.

    Parameters
    ----------
    shape
        Sizes.
    n_latent
        Width of the latent that the decoder reads.
    n_hidden, n_layers
        Of encoder and decoder.
    n_layers_decoder
        Hidden layers of the decoder if not ``n_layers``; 0 for one linear in the latents.
    n_particles
        Posterior draws a training step.
    gene_likelihood
        ``"nb"``, ``"poisson"`` or ``"normal"``.
    n_decoder_extra
        Width of what the decoder reads beside latents and covariates, see :meth:`decoder_extra`.
    """

    def __init__(
        self,
        shape: ModuleShape,
        *,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        n_particles: int,
        gene_likelihood: Any,
        n_layers_decoder: int | None = None,
        n_decoder_extra: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.n_latent, self.n_particles = shape, n_latent, n_particles
        self.gene_likelihood = gene_likelihood
        self.decoder = ExpressionDecoder(
            n_latent,
            n_decoder_extra + shape.n_covariates,
            shape.n_genes,
            n_hidden=n_hidden,
            n_layers=n_layers if n_layers_decoder is None else n_layers_decoder,
            gene_likelihood=gene_likelihood,
        )
        self.input_mean: Tensor
        self.input_sd: Tensor
        self.cells_per_component: Tensor
        self.register_buffer("input_mean", torch.zeros(shape.n_genes))
        self.register_buffer("input_sd", torch.ones(shape.n_genes))
        self.register_buffer("cells_per_component", torch.ones(shape.n_components))
        self.started: Tensor
        self.register_buffer("started", torch.tensor(False))

    def set_training_statistics(self, statistics: TrainingStatistics) -> None:
        """Fill the buffers from the training cells when the fit starts; the first fit also starts the decoder there.

        The first thing a decoder learns are the genes' means and dispersions. From zero that takes thousands of small
        steps, in which sparse data are learned by heart instead.
        """
        # log1p counts of genes seen in few cells must not be blown up to unit variance: the encoder would read them
        # as names of cells
        floor = SD_FLOOR if self.gene_likelihood == "normal" else COUNT_SD_FLOOR
        sd = np.where(statistics.input_sd < SD_FLOOR, 1.0, np.maximum(statistics.input_sd, floor))
        for buffer, value in (
            (self.input_mean, statistics.input_mean),
            (self.input_sd, sd),
            (self.cells_per_component, statistics.cells_per_component),
        ):
            buffer.copy_(torch.as_tensor(value, dtype=torch.float32))
        if not bool(self.started):
            with torch.no_grad():
                self.decoder.out.bias.copy_(torch.as_tensor(statistics.output_bias, dtype=torch.float32))
                if self.decoder.log_scale is not None:
                    start = torch.as_tensor(statistics.output_log_scale, dtype=torch.float32)
                    self.decoder.log_scale.copy_(start)
            self.started.fill_(True)

    def encoder_input(self, x: Tensor) -> Tensor:
        """Return what the encoder reads before standardisation: log1p counts, or the values themselves."""
        return x if self.gene_likelihood == "normal" else torch.log1p(x)

    def covariates(
        self, batch_index: Tensor | None, labels: Tensor | None, cat_covs: Tensor | None, cont_covs: Tensor | None
    ) -> Tensor | None:
        """Return the covariate vector of each cell, ``(cells, n_covariates)``, or ``None`` when there is none."""
        parts = []
        for n, index in ((self.shape.n_batch, batch_index), (self.shape.n_labels, labels)):
            if n > 1 and index is not None:
                parts.append(F.one_hot(index.long().squeeze(-1), n).float())
        for j, n in enumerate(self.shape.n_cats_per_cov):
            if n > 1 and cat_covs is not None:
                parts.append(F.one_hot(cat_covs[:, j].long(), n).float())
        if self.shape.n_continuous_cov and cont_covs is not None:
            parts.append(cont_covs)
        return torch.cat(parts, dim=-1) if parts else None

    def covariates_of(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return :meth:`covariates` of the output of ``_get_inference_input``."""
        return self.covariates(*(inputs[k] for k in ("batch_index", "labels", "cat_covs", "cont_covs")))

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        return {
            "x": tensors[REGISTRY_KEYS.X_KEY],
            "doses": tensors[PERTURBATION_REGISTRY_KEY],
            "size_factor": tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY),
            "batch_index": tensors.get(REGISTRY_KEYS.BATCH_KEY),
            "labels": tensors.get(REGISTRY_KEYS.LABELS_KEY),
            "cat_covs": tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
            "cont_covs": tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
        }

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        inputs = self._get_inference_input(tensors)
        return {
            "z": inference_outputs[MODULE_KEYS.Z_KEY],
            "library": inference_outputs[MODULE_KEYS.LIBRARY_KEY],
            "doses": inputs["doses"],
            **{k: inputs[k] for k in ("batch_index", "labels", "cat_covs", "cont_covs")},
        }

    @staticmethod
    def library_size(x: Tensor, size_factor: Tensor | None) -> Tensor:
        """Return the library of each cell, ``(cells, 1)``: its total counts, or its size factor if registered."""
        return x.sum(-1, keepdim=True) if size_factor is None else size_factor

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        doses: Tensor,
        batch_index: Tensor | None = None,
        labels: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        transform_batch: int | None = None,
    ) -> dict[str, Any]:
        """Return the distribution of expression given latents."""
        if transform_batch is not None and batch_index is not None:
            batch_index = torch.full_like(batch_index, transform_batch)
        covariates = self.covariates(batch_index, labels, cat_covs, cont_covs)
        return {MODULE_KEYS.PX_KEY: self.decode(z, doses, covariates, library)}

    def decoder_extra(self, doses: Tensor) -> Tensor | None:
        """Return what the decoder reads beside latents and covariates, one row for each row of doses."""
        return None

    def decode(self, z: Tensor, doses: Tensor, covariates: Tensor | None, library: Tensor) -> Any:
        """Return the distribution of expression; everything that decodes goes through here.

        Parameters
        ----------
        z
            ``(..., cells, latents)``.
        doses
            ``(cells, components)``, or one row for all cells. Only methods whose decoder is told the perturbation
            read it; with the others it has moved ``z`` already.
        covariates
            ``(cells, n_covariates)`` or ``None``.
        library
            ``(cells, 1)``, counts.
        """
        extra = self.decoder_extra(doses)
        if extra is not None:
            extra = extra.expand(z.shape[-2], -1)
            covariates = extra if covariates is None else torch.cat([extra, covariates], dim=-1)
        return self.decoder(z, covariates, library)

    @torch.inference_mode()
    def sample(
        self,
        tensors: dict[str, Tensor],
        n_samples: int = 1,
        max_poisson_rate: float = 1e8,
        generative_kwargs: dict | None = None,
    ) -> Tensor:
        """Return posterior predictive draws of each cell's expression, ``(cells, genes[, n_samples])``."""
        _, generative = self.forward(
            tensors,
            inference_kwargs={"n_samples": n_samples},
            generative_kwargs=generative_kwargs,
            compute_loss=False,
        )
        px = generative[MODULE_KEYS.PX_KEY]
        if self.gene_likelihood == "poisson":
            draws = torch.poisson(px.rate.clamp(max=max_poisson_rate))
        else:
            draws = px.sample()
        return (draws.permute(1, 2, 0) if n_samples > 1 else draws).cpu()

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that belong to one gene or one perturbation; they have a learning rate of their own."""
        scale = [] if self.decoder.log_scale is None else [self.decoder.log_scale]
        return [self.decoder.out.bias, *scale]

    def mask_parameters(self) -> list[torch.nn.Parameter]:
        """Return the log-odds of masks; they have a learning rate of their own."""
        return []

    def latent(self, inputs: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of a kind of latent of each cell under its own label.

        Parameters
        ----------
        inputs
            Output of ``_get_inference_input``.
        kind
            One of the method's ``capabilities.latent_kinds``.
        """
        shift = self.offset(inputs["doses"])
        if kind == "perturbation":
            return shift, torch.zeros_like(shift)
        mean, sd = self.basal_posterior(inputs)
        return (mean if kind == "basal" else shift + mean), sd

    @abstractmethod
    def basal_posterior(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each cell's basal latent under its own label: where predictions start.

        Parameters
        ----------
        inputs
            Output of ``_get_inference_input``.
        """

    def basal_sampler(self, inputs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Encode cells once; return what turns noise into draws of their basal latent under their own labels.

        The function takes standard normal noise ``(..., cells, latents)`` and returns as many draws.

        Parameters
        ----------
        inputs
            Output of ``_get_inference_input``.
        """
        mean, sd = self.basal_posterior(inputs)
        return lambda noise: mean + sd * noise

    def draw_latent(self, inputs: dict[str, Any], kind: str, noise: Tensor) -> Tensor:
        """Return one draw of a kind of latent of each cell, with the expected shift, from given noise.

        Parameters
        ----------
        inputs, kind
            See :meth:`latent`.
        noise
            Standard normal, ``(cells, latents)``.
        """
        mean, sd = self.latent(inputs, kind)
        return mean + sd * noise

    @abstractmethod
    def offset(self, doses: Tensor) -> Tensor:
        """Return the posterior mean of the latent shift by a dose row, ``(cells, latents)``."""

    @abstractmethod
    def draw_offset(self, components: Tensor, doses: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Return one posterior draw a cell of the latent shift by some components, ``(cells, latents)``.

        Parameters
        ----------
        components, doses
            Indices and doses of the components of one label.
        uniform, normal
            Noise, ``(cells, components, latents)``.
        """

    def leak_shift(self, components: Tensor, doses: Tensor) -> Tensor | float:
        """Return the part of ``draw_offset`` that is no draw of the effects but a correction; none by default."""
        return 0.0

    def leak_spread(self, components: Tensor, doses: Tensor) -> Tensor | float:
        """Return the posterior standard deviation of :meth:`leak_shift`, which ``draw_offset`` does not draw."""
        return 0.0

    @abstractmethod
    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return effects and inclusion of the programs, both components x programs."""

    @abstractmethod
    def draw_globals(self, n_samples: int, generator: torch.Generator) -> Any:
        """Draw the global latents once for an estimate that goes over many minibatches."""

    @abstractmethod
    def log_weights(self, tensors: dict[str, Tensor], globals_: Any, generator: torch.Generator) -> Tensor:
        """Return log p(x | z) + log p(z) - log q(z) of each cell for each global draw, ``(samples, cells)``."""
