"""Registration: one for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    MuDataCategoricalJointObsField,
    MuDataCategoricalObsField,
    MuDataNumericalJointObsField,
    MuDataNumericalObsField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model.base import BaseModelClass

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae._labels import LabelFormat
from pertvae.data import (
    CountField,
    MuDataCountField,
    MuDataPerturbationField,
    PerturbationField,
    PerturbationManager,
)
from pertvae.models.base._module import ModuleShape


class RegistrationMixin(BaseModelClass):
    """``setup_anndata``, ``setup_mudata`` and what a registration says."""

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        perturbation_key: str | None = None,
        control: str | Sequence[str] | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        dosage_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        sep: str | None = "+",
        perturbation_obsm_key: str | None = None,
        is_count_data: bool = True,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData: which counts, which perturbations, which covariates.

        Nothing of the user's is changed or copied; generated columns have the prefix ``_scvi_``.

        Parameters
        ----------
        adata
            Cells x genes with raw counts, in memory or backed.
        perturbation_key
            Column of ``obs`` with the label of each cell, for example ``"A+B"``. Components are sorted and
            de-duplicated, control tokens dropped: ``"A+ctrl"`` is ``"A"``, ``"B+A"`` is ``"A+B"``.
        control
            Label of the control cells, or several. Required with ``perturbation_key``.
        layer
            Layer with the counts; ``X`` by default.
        batch_key
            Column with the technical batch.
        labels_key
            Column with the cell type or context; effects are shared across contexts.
        dosage_key
            Column with doses: a number, or ``"1.0+0.5"`` aligned with the components as written. A dose of 0 means
            that the perturbation was not applied.
        size_factor_key
            Column used as library size; by default the total over the registered genes.
        categorical_covariate_keys, continuous_covariate_keys
            Further covariates of decoder and basal encoder.
        sep
            Separator between components; ``None`` when every label is one perturbation.
        perturbation_obsm_key
            A ready design matrix in ``obsm`` (DataFrame, array or CSR; rows of zeros are controls) instead of labels.
        is_count_data
            ``False`` allows real values, with ``gene_likelihood="normal"`` only.
        **kwargs
            Used by scvi-tools when a setup is replayed.

        Raises
        ------
        KeyError
            If a column or layer is missing; the nearest names are given.
        ValueError
            If there is no control cell, labels are missing, counts or doses are negative or not finite, or a
            component contains ``sep``. Nothing has been written then.

        Notes
        -----
        Writes ``obsm["_scvi_perturbation"]`` (CSR float32 doses), ``obs["_scvi_condition"]`` (canonical labels),
        scvi-tools' own ``_scvi_`` columns and ids in ``uns``.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        fields = [
            CountField(REGISTRY_KEYS.X_KEY, layer, is_count_data=is_count_data),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys),
            PerturbationField(perturbation_key, control, sep, dosage_key, perturbation_obsm_key),
        ]
        manager = PerturbationManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        perturbation_key: str | None = None,
        control: str | Sequence[str] | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        dosage_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        sep: str | None = "+",
        perturbation_obsm_key: str | None = None,
        is_count_data: bool = True,
        modalities: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a MuData; arguments as in :meth:`setup_anndata`.

        Parameters
        ----------
        mdata
            Cells with counts in one modality.
        perturbation_key, control, layer, batch_key, labels_key, dosage_key, size_factor_key
            See :meth:`setup_anndata`.
        categorical_covariate_keys, continuous_covariate_keys, sep, perturbation_obsm_key, is_count_data
            See :meth:`setup_anndata`.
        modalities
            Modality of each argument, for example ``{"layer": "rna", "perturbation_key": "rna"}``; ``layer`` is
            required and says where the counts are (in ``X`` when ``layer=None``). Arguments not named are looked up
            in ``mdata.obs``. Labels, doses and design matrix share the modality of ``perturbation_key`` (of
            ``perturbation_obsm_key`` when that is used).
        **kwargs
            Used by scvi-tools when a setup is replayed.

        Raises
        ------
        KeyError, ValueError
            As :meth:`setup_anndata`; also when ``modalities`` lacks ``layer`` or names what is not there.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        chosen = modalities or {}
        if chosen.get("layer") not in mdata.mod:
            raise ValueError(
                f"modalities must say where the counts are: modalities={{'layer': ...}} with one of {list(mdata.mod)}; "
                f"got {chosen.get('layer')!r}."
            )
        mods = cls._create_modalities_attr_dict(chosen, setup_method_args)
        where = mods.perturbation_key if perturbation_obsm_key is None else mods.perturbation_obsm_key
        fields = [
            MuDataCountField(
                REGISTRY_KEYS.X_KEY, layer, is_count_data=is_count_data, mod_key=mods.layer, mod_required=True
            ),
            MuDataCategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key, mod_key=mods.batch_key),
            MuDataCategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key, mod_key=mods.labels_key),
            MuDataNumericalObsField(
                REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, mod_key=mods.size_factor_key, required=False
            ),
            MuDataCategoricalJointObsField(
                REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys, mod_key=mods.categorical_covariate_keys
            ),
            MuDataNumericalJointObsField(
                REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys, mod_key=mods.continuous_covariate_keys
            ),
            MuDataPerturbationField(perturbation_key, control, sep, dosage_key, perturbation_obsm_key, mod_key=where),
        ]
        manager = PerturbationManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(mdata, **kwargs)
        cls.register_manager(manager)

    @property
    def _perturbation_state(self) -> Any:
        return self.registry_["field_registries"][PERTURBATION_REGISTRY_KEY]["state_registry"]

    @property
    def perturbation_names(self) -> list[str]:
        """Components the model was registered with, in the order of the dose matrix."""
        return [str(c) for c in self._perturbation_state["components"]]

    @property
    def label_format(self) -> LabelFormat:
        """Control tokens and separator of the registration."""
        return LabelFormat(tuple(self._perturbation_state["control"]), self._perturbation_state["sep"])

    def _module_shape(self, gene_likelihood: str) -> ModuleShape:
        """Return the sizes of the registration; real values go with the normal likelihood only."""
        if self.registry_["setup_args"].get("is_count_data") is False and gene_likelihood != "normal":
            raise ValueError(
                f"gene_likelihood={gene_likelihood!r} needs counts, but the data were registered with "
                "is_count_data=False: use gene_likelihood='normal'."
            )
        stats = self.summary_stats
        cats = self.registry_["field_registries"].get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
        return ModuleShape(
            n_genes=stats["n_vars"],
            n_components=stats[f"n_{PERTURBATION_REGISTRY_KEY}"],
            n_batch=stats.get("n_batch", 1),
            n_labels=stats.get("n_labels", 1),
            n_cats_per_cov=tuple(int(n) for n in cats.get("n_cats_per_key", ())),
            n_continuous_cov=stats.get("n_extra_continuous_covs", 0),
        )
