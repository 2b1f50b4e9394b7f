"""The model class all methods derive from: registration, training, saving."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from typing import Any, Self

import numpy as np
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import Timer
from mudata import MuData
from scvi import REGISTRY_KEYS, settings
from scvi.model.base import RNASeqMixin, VAEMixin
from scvi.train import TrainRunner

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae._expression import row_sums
from pertvae.data import PerturbationDataSplitter
from pertvae.models.base._access import covariate_groups
from pertvae.models.base._getters import GettersMixin
from pertvae.models.base._library import LibraryEffects, fit_library_effects
from pertvae.models.base._module import PerturbationModule
from pertvae.models.base._phases import FreshPhase, Phase, all_or_nothing, divide_epochs, number_epochs
from pertvae.models.base._plan import MONITOR, KeepBest, PerturbationTrainingPlan
from pertvae.models.base._prediction import PredictionMixin
from pertvae.models.base._registration import RegistrationMixin
from pertvae.models.base._results import Capabilities

# Optimiser steps of a default run, and how many of them without a better validation objective end it.
DEFAULT_STEPS = 4000
MIN_EPOCHS, MAX_EPOCHS = 20, 1000
PATIENCE_STEPS = 600
STEPS_BETWEEN_VALIDATIONS = 20


class PerturbationModel(PredictionMixin, GettersMixin, RNASeqMixin, VAEMixin, RegistrationMixin):
    """Base of the perturbation models.

    A method sets ``_module_cls`` and ``capabilities`` and builds its module in ``__init__`` from
    :meth:`_module_shape`; everything else is here.
    """

    _module_cls: type[PerturbationModule]
    _data_splitter_cls = PerturbationDataSplitter
    _training_plan_cls = PerturbationTrainingPlan
    _train_runner_cls = TrainRunner
    capabilities: Capabilities

    module: PerturbationModule
    library_effects_: LibraryEffects | None

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict | None = None) -> None:
        super().__init__(adata, registry)
        self.library_effects_ = None

    def _validate_anndata(self, adata: AnnData | MuData | None = None, copy_if_view: bool = True) -> AnnData | MuData:
        if adata is None and self.adata is None:
            raise ValueError("The model has no data: pass adata=..., or load it with load(path, adata).")
        return super()._validate_anndata(adata, copy_if_view=copy_if_view)

    # ---------------------------------------------------------------- training

    def train(
        self,
        max_epochs: int | None = None,
        split_key: str | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 512,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        early_stopping: bool | None = None,
        load_sparse_tensor: bool = False,
        datasplitter_kwargs: dict | None = None,
        plan_kwargs: dict | None = None,
        resume: bool = False,
        datamodule: PerturbationDataSplitter | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. By default as many as give 4,000 optimiser steps, between 20 and 1,000; for
            a method that trains in phases, and divides them over these, 10,000 steps and at most 2,500 (14,000 and
            3,500 where it trains in two ways).
        split_key
            Column of ``obs`` with ``train``, ``valid``, ``test`` (or ``val``, ``validation``, ``ood``). Test cells
            enter no statistic. Without ``valid`` cells 10% of the training cells are held out, stratified by
            condition, seeded by ``scvi.settings.seed``.
        train_size, validation_size, shuffle_set_split
            scvi-tools' random split, instead of ``split_key``.
        batch_size
            Cells a step.
        accelerator, devices
            As in scvi-tools.
        early_stopping
            Stop when the validation objective (reconstruction + local KL + global KL / training cells, nats a cell)
            has not improved for about 600 steps, and keep the best weights. ``None``: on when there are validation
            cells.
        load_sparse_tensor
            Send sparse minibatches to the device and make them dense there.
        datasplitter_kwargs
            For :class:`~pertvae.data.PerturbationDataSplitter`, for example ``external_indexing``.
        plan_kwargs
            For the training plan: ``lr`` (1e-3), ``global_lr`` (1e-2, of effects and the genes' bias and dispersion),
            ``mask_lr`` (1e-1), ``weight_decay`` (1e-6), ``eps`` (1e-8), ``n_epochs_kl_warmup`` (``None``: full KL
            weight throughout), ...
        resume
            Go on from the last checkpoint of a killed run. Checkpoints are not written yet, so ``True`` raises; to
            train a model further call ``train`` again.
        datamodule
            Use this :class:`~pertvae.data.PerturbationDataSplitter` of the registered data instead of a new one; then
            the arguments of the split, ``batch_size`` and ``load_sparse_tensor`` belong to it.
        **trainer_kwargs
            For :class:`scvi.train.Trainer`, for example ``gradient_clip_val`` or ``enable_progress_bar``.

        Raises
        ------
        ValueError
            If the split is not usable, ``max_epochs`` is below 1, or early stopping is asked for without validation
            cells.

        Notes
        -----
        Writes ``history``: a dict of DataFrames, one row an epoch.

        A method may train in phases. ``plan_kwargs`` and ``callbacks`` then go to each of them (a warm-up of the KL
        only to those that begin with untrained weights), and early stopping acts in those that may end early. Training
        a trained model again goes on from its weights, in a single phase.

        Your callbacks are the same objects in all phases, and act in all. Those with a state that Lightning saves
        (``state_dict`` and ``load_state_dict``: early stopping, checkpoints) begin each phase with the state they had
        before the first, because objectives of two phases do not compare; afterwards they tell of the last phase, and
        checkpoints of earlier phases are still on disk. Other callbacks are left alone, so a recorder sees all phases,
        and a Lightning ``Timer`` counts over all, as ``max_time`` does.

        A trained model is left as it was, with its weights, history and split, when training it further breaks off, by
        an error or from the keyboard. A first training that breaks off leaves the model untrained: the next call
        starts the phases anew, from the weights there are.
        """
        if resume:
            raise ValueError("resume=True: there is no checkpoint to go on from. Call train again to train further.")
        self._validate_anndata()
        if datamodule is None:
            datamodule = self._data_splitter_cls(
                self.adata_manager,
                split_key=split_key,
                train_size=train_size,
                validation_size=validation_size,
                shuffle_set_split=shuffle_set_split,
                batch_size=batch_size,
                distributed_sampler="ddp" in str(trainer_kwargs.get("strategy", "")),
                load_sparse_tensor=load_sparse_tensor,
                **(datasplitter_kwargs or {}),
            )
        elif (split_key, train_size, validation_size, shuffle_set_split, datasplitter_kwargs) != (
            None, None, None, True, None,
        ) or getattr(datamodule, "adata_manager", None) is not self.adata_manager:  # fmt: skip
            raise ValueError(
                f"datamodule={type(datamodule).__name__} must be a PerturbationDataSplitter of this model's "
                "adata_manager, and then the split belongs to it: PerturbationDataSplitter(model.adata_manager, "
                "split_key=...)."
            )
        batch_size = datamodule.data_loader_kwargs.get("batch_size") or batch_size
        steps = max(1, math.ceil(datamodule.n_train / batch_size))
        if max_epochs is None:
            wanted = self._default_steps(early_stopping is not False and datamodule.n_val > 0)
            most = math.ceil(MAX_EPOCHS * wanted / DEFAULT_STEPS)
            max_epochs = int(np.clip(math.ceil(wanted / steps), MIN_EPOCHS, most))
        if early_stopping is None:
            early_stopping = datamodule.n_val > 0
            if not early_stopping:
                warnings.warn(
                    f"Early stopping is off, because there are no validation cells: training runs for all "
                    f"{max_epochs} epochs.",
                    UserWarning,
                    stacklevel=settings.warnings_stacklevel,
                )
        elif early_stopping and not datamodule.n_val:
            raise ValueError(
                "early_stopping=True needs validation cells: label some cells 'valid' in the split column."
            )
        if max_epochs < 1:
            raise ValueError(f"max_epochs={max_epochs}: at least 1 is needed.")
        phases = self._training_phases(bool(early_stopping))
        max_steps = trainer_kwargs.get("max_steps") or -1
        if len(phases) > 1 and max_steps > 0:  # the trainer of each phase counts from zero
            max_epochs = min(max_epochs, math.ceil(max_steps / steps))
        epochs_of = divide_epochs(phases, max_epochs)
        if early_stopping:
            # every phase is validated: a metric that the first one lacks would be lost from the history
            shortest = min(n for n in epochs_of if n)
            between = trainer_kwargs.setdefault(
                "check_val_every_n_epoch", max(1, min(STEPS_BETWEEN_VALIDATIONS // steps, shortest))
            )
            trainer_kwargs.setdefault("early_stopping_monitor", MONITOR)
            trainer_kwargs.setdefault("early_stopping_patience", max(5, math.ceil(PATIENCE_STEPS / (steps * between))))
        callbacks = list(trainer_kwargs.pop("callbacks", []))
        if (max_time := trainer_kwargs.pop("max_time", None)) is not None:  # a trainer's own counts one phase
            callbacks.append(Timer(duration=max_time))
        fresh = FreshPhase(self, callbacks)
        best: int | None = None
        started = False
        with all_or_nothing(self):
            for phase, planned in zip(phases, epochs_of, strict=True):
                if phase.begin is not None:
                    phase.begin()
                epochs = phase.limit(planned, best)
                if not epochs:
                    continue
                may_stop = early_stopping and phase.may_stop
                keep = [KeepBest(trainer_kwargs["early_stopping_monitor"])] if may_stop else []
                self.module.train()  # getters and earlier fits leave it in evaluation mode
                # a warm-up of the KL belongs to the start of the run, not of each phase
                warm = phase.restarts or not started
                chosen = {k: v for k, v in (plan_kwargs or {}).items() if warm or "kl_warmup" not in k}
                plan = self._training_plan_cls(self.module, manager=self.adata_manager, **chosen)
                started = True
                # the history of a training that broke off is replaced
                earlier = {k: len(v) for k, v in (self.history_ or {}).items()} if self.is_trained_ else {}
                runner = self._train_runner_cls(
                    self,
                    training_plan=plan,
                    data_splitter=datamodule,
                    max_epochs=epochs,
                    accelerator=accelerator,
                    devices=devices,
                    early_stopping=may_stop,
                    callbacks=[fresh, *callbacks, *phase.callbacks(epochs), *keep],
                    **trainer_kwargs,
                )
                runner()
                number_epochs(self.history_ or {}, earlier, trainer_kwargs.get("check_val_every_n_epoch"))
                if keep and keep[0].best_epoch is not None:
                    best = keep[0].best_epoch + 1
            self._after_training()
            self.library_effects_ = self._fit_library_effects()

    def _default_steps(self, early_stopping: bool) -> int:
        """Return the optimiser steps of a default run."""
        return DEFAULT_STEPS

    def _training_phases(self, early_stopping: bool) -> list[Phase]:
        """Return the phases that ``max_epochs`` is divided over; whether there are validation cells may matter."""
        return [Phase("training")]

    def _after_training(self) -> None:
        """Compute what a method derives from the trained weights."""

    def _fit_library_effects(self) -> LibraryEffects:
        """Fit the perturbations' effects on total counts; see :mod:`pertvae.models.base._library`."""
        manager = self.adata_manager
        if REGISTRY_KEYS.SIZE_FACTOR_KEY in manager.data_registry:
            totals = np.asarray(manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY), dtype=np.float64).ravel()
        elif self.module.gene_likelihood == "normal":
            totals = np.zeros(manager.adata.n_obs)
        else:
            totals = row_sums(manager.get_from_registry(REGISTRY_KEYS.X_KEY))
        return fit_library_effects(
            totals,
            manager.get_from_registry(PERTURBATION_REGISTRY_KEY),
            covariate_groups(manager),
            np.asarray(self.train_indices, dtype=np.int64),
            np.asarray(self.validation_indices, dtype=np.int64),
        )

    # ---------------------------------------------------------------- saving

    def save(self, dir_path: str, prefix: str | None = None, overwrite: bool = False, **kwargs: Any) -> None:
        """Save the model as scvi-tools does, but whole or not at all.

        Parameters
        ----------
        dir_path
            Folder to write.
        prefix
            Of the file names.
        overwrite
            Replace files of the same names in an existing folder.
        **kwargs
            See :meth:`scvi.model.base.BaseModelClass.save`, for example ``save_anndata``.

        Raises
        ------
        ValueError
            If the folder exists and ``overwrite`` is false.
        """
        dir_path = os.fspath(dir_path)
        if os.path.exists(dir_path) and not overwrite:
            raise ValueError(f"{dir_path} already exists: choose another folder or pass overwrite=True.")
        parent = os.path.dirname(os.path.abspath(dir_path))
        os.makedirs(parent, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".saving-", dir=parent)
        try:
            super().save(scratch, prefix=prefix, overwrite=True, **kwargs)
            os.makedirs(dir_path, exist_ok=True)
            for name in os.listdir(scratch):
                os.replace(os.path.join(scratch, name), os.path.join(dir_path, name))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def load(cls, dir_path: str, adata: AnnData | MuData | bool | None = None, **kwargs: Any) -> Self:
        """Load a saved model. Model files are pickles: load only those you trust.

        Parameters
        ----------
        dir_path
            Folder that :meth:`save` wrote.
        adata
            Data organised as those of the training (no setup needed); ``None`` loads data saved with the model,
            ``False`` loads none.
        **kwargs
            See :meth:`scvi.model.base.BaseModelClass.load`, for example ``device``.

        Returns
        -------
        The model.

        Raises
        ------
        FileNotFoundError
            If there is no model in the folder.
        ValueError
            If the file is truncated, foreign, or of another class.
        """
        path = os.path.join(os.fspath(dir_path), f"{kwargs.get('prefix') or ''}model.pt")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist: {dir_path!r} is not a folder that save() wrote.")
        _check_model_file(path, cls.__name__)
        return super().load(os.fspath(dir_path), adata, **kwargs)


def _check_model_file(path: str, class_name: str) -> None:
    """Raise a ValueError that says what is wrong with a model file."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or is not a saved model: save the model again.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        saved = content["attr_dict"]["registry_"]["model_name"]
    except (pickle.UnpicklingError, EOFError, RuntimeError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by this package ({type(error).__name__}: {error}).") from error
    if saved != class_name:
        raise ValueError(f"{path} holds a {saved}, not a {class_name}: load it with {saved}.load.")
