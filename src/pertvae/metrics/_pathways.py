"""Do perturbations of one pathway look alike? A random forest on what a model learned of each perturbation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict


@dataclass(frozen=True)
class PathwayScore:
    """Cross-validated accuracy of pathways, beside that of always naming the largest one.

    Parameters
    ----------
    accuracy
        Share of perturbations whose pathway is named right, mean over repeats.
    accuracy_sd
        Standard deviation of that over repeats; NaN with one repeat.
    balanced_accuracy
        Mean over pathways of the share named right, mean over repeats.
    balanced_accuracy_sd
        Standard deviation of that over repeats.
    majority_accuracy
        Share of the largest pathway: the accuracy of always naming it.
    majority_balanced_accuracy
        Its balanced accuracy: one over the number of pathways.
    n_perturbations
        Annotated perturbations that were used.
    n_pathways
        Pathways they fall into.
    n_splits
        Folds that were used.
    repeats
        One row a repeat: ``accuracy``, ``balanced_accuracy``.
    """

    accuracy: float
    accuracy_sd: float
    balanced_accuracy: float
    balanced_accuracy_sd: float
    majority_accuracy: float
    majority_balanced_accuracy: float
    n_perturbations: int
    n_pathways: int
    n_splits: int
    repeats: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """Return accuracy and balanced accuracy of the forest and of the majority baseline.

        Returns
        -------
        DataFrame, rows ``random forest`` and ``majority``, columns ``accuracy``, ``accuracy_sd``,
        ``balanced_accuracy``, ``balanced_accuracy_sd``.
        """
        columns = ["accuracy", "accuracy_sd", "balanced_accuracy", "balanced_accuracy_sd"]
        found = [self.accuracy, self.accuracy_sd, self.balanced_accuracy, self.balanced_accuracy_sd]
        baseline = [self.majority_accuracy, 0.0, self.majority_balanced_accuracy, 0.0]
        return pd.DataFrame([found, baseline], index=["random forest", "majority"], columns=columns)

    def __repr__(self) -> str:
        """Return one line with the baseline beside each number."""
        return (
            f"PathwayScore(accuracy {self.accuracy:.3f} \N{PLUS-MINUS SIGN} {self.accuracy_sd:.3f}, majority "
            f"{self.majority_accuracy:.3f}; balanced {self.balanced_accuracy:.3f} \N{PLUS-MINUS SIGN} "
            f"{self.balanced_accuracy_sd:.3f}, majority {self.majority_balanced_accuracy:.3f}; {self.n_perturbations} "
            f"perturbations in {self.n_pathways} pathways)"
        )


def pathway_accuracy(
    features: pd.DataFrame,
    annotation: pd.Series | Mapping[str, str],
    *,
    n_splits: int = 5,
    n_repeats: int = 5,
    n_trees: int = 500,
    seed: int = 0,
) -> PathwayScore:
    """Predict the pathway of each perturbation from its row of features, cross-validated.

    A random forest is trained on four fifths of the annotated perturbations and names the pathways of the last fifth,
    in turn and stratified; the division is repeated. As in the "mask pathway accuracy" of SAMS-VAE (arXiv
    2311.02794), whose numbers of trees, folds and repeats are not published; those here are ours.

    Parameters
    ----------
    features
        One row a perturbation, for example mask probabilities (``model.get_perturbation_programs().inclusion``,
        perturbations x programs) or effects. Indexed by perturbation.
    annotation
        Pathway of each perturbation, by name. Perturbations that it leaves out or gives as missing are not used, and
        names without features are ignored. One pathway a perturbation.
    n_splits
        Folds. With a pathway of fewer perturbations, as many folds as it has (with a warning); a pathway of a single
        perturbation can not be learned and predicted, and is an error.
    n_repeats
        Divisions into folds.
    n_trees
        Trees of each forest.
    seed
        Of the forests and the divisions; the global random state is untouched. The order of rows does not matter.

    Returns
    -------
    PathwayScore
        Accuracy and balanced accuracy with their spread over repeats, and the same for always naming the largest
        pathway, which printing shows. The spread is that of divisions and trees, not of other perturbations.

    Raises
    ------
    ValueError
        If fewer than two pathways are left, a pathway has a single perturbation, names repeat, values are missing, or
        ``n_splits``, ``n_repeats`` or ``n_trees`` is too small.

    Examples
    --------
    >>> masks = model.get_perturbation_programs().inclusion
    >>> pv.metrics.pathway_accuracy(masks, adata.var["pathway"])
    """
    for name, number, least in (("n_splits", n_splits, 2), ("n_repeats", n_repeats, 1), ("n_trees", n_trees, 1)):
        if number < least:
            raise ValueError(f"{name}={number}: at least {least} is needed.")
    x, pathways = _annotated(features, annotation)
    sizes = pathways.value_counts()
    if len(sizes) < 2:
        raise ValueError(
            f"{len(pathways)} of {len(features)} perturbations are annotated, in {len(sizes)} pathway(s): two pathways "
            f"are needed. Perturbations of features: {list(features.index[:5])}; annotated: {_names(annotation)[:5]}."
        )
    smallest = int(sizes.min())
    if smallest < 2:
        alone = sorted(str(p) for p in sizes.index[sizes == 1])
        raise ValueError(
            f"These pathways have a single perturbation, which can not be both learned and predicted: {alone[:10]}. "
            "Leave them out of the annotation."
        )
    if smallest < n_splits:
        warnings.warn(
            f"{smallest} folds instead of {n_splits}: the pathway {str(sizes.idxmin())!r} has {smallest} members.",
            UserWarning,
            stacklevel=2,
        )
        n_splits = smallest
    rows = []
    # one stream of seeds, so that the first repeats do not depend on how many follow
    for state in np.random.default_rng(seed).integers(2**31 - 1, size=(n_repeats, 2)).tolist():
        forest = RandomForestClassifier(n_estimators=n_trees, random_state=state[0])
        folds = StratifiedKFold(n_splits, shuffle=True, random_state=state[1])
        found = cross_val_predict(forest, x, pathways.to_numpy(), cv=folds)
        rows.append((accuracy_score(pathways, found), balanced_accuracy_score(pathways, found)))
    repeats = pd.DataFrame(rows, columns=["accuracy", "balanced_accuracy"])
    mean, sd = repeats.mean(), repeats.std(ddof=1)
    return PathwayScore(
        accuracy=float(mean["accuracy"]),
        accuracy_sd=float(sd["accuracy"]),
        balanced_accuracy=float(mean["balanced_accuracy"]),
        balanced_accuracy_sd=float(sd["balanced_accuracy"]),
        majority_accuracy=float(sizes.max() / len(pathways)),
        majority_balanced_accuracy=1.0 / len(sizes),
        n_perturbations=len(pathways),
        n_pathways=len(sizes),
        n_splits=n_splits,
        repeats=repeats,
    )


def _annotated(features: pd.DataFrame, annotation: pd.Series | Mapping[str, str]) -> tuple[np.ndarray, pd.Series]:
    """Return features and pathway of the annotated perturbations, sorted by name."""
    named = pd.Series(annotation, dtype=object)
    for what, index in (("features", features.index), ("annotation", named.index)):
        if not index.is_unique:
            raise ValueError(f"{what} names {str(index[index.duplicated()][0])!r} more than once.")
    named.index = named.index.astype(str)
    table = features.set_axis(features.index.astype(str), axis=0)
    pathways = named.reindex(sorted(table.index)).dropna().astype(str)
    x = table.loc[pathways.index].to_numpy(dtype=np.float64)
    if not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0, 0])
        raise ValueError(f"The features of {pathways.index[row]!r} are missing or not finite.")
    return x, pathways


def _names(annotation: pd.Series | Mapping[str, str]) -> list[str]:
    return [str(name) for name in (annotation.index if isinstance(annotation, pd.Series) else annotation)]
