"""Arc's cell-eval as an external referee: its metrics, its code, our cells."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._labels import LabelFormat, hint
from pertvae.metrics._labelled import Labelled, same_genes
from pertvae.metrics._pairing import choose_conditions, choose_genes

SLOW = ("pearson_edistance", "clustering_agreement")
LOGGERS = ("cell_eval", "pdex")
KEY = "perturbation"


@dataclass(frozen=True)
class CellEvalResult:
    """What cell-eval says of a prediction.

    Parameters
    ----------
    per_condition
        One row a condition (canonical labels), one column a metric, by cell-eval's names. Where cell-eval gives one
        value for all conditions together (``de_spearman_sig``, ``pearson_edistance``, ``clustering_agreement``), it
        stands in every row. NaN where cell-eval gives none.
    summary
        cell-eval's own aggregate: the same columns, with rows ``count``, ``null_count``, ``mean``, ``std``, ``min``,
        quartiles and ``max``. ``summary.loc["mean"]`` is what leaderboards quote.
    version
        Version of cell-eval. Definitions moved between its versions: quote it with the numbers.
    """

    per_condition: pd.DataFrame
    summary: pd.DataFrame
    version: str


def cell_eval(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    *,
    profile: str = "minimal",
    sep: str | None = "+",
    layer: str | None = None,
    genes: Any = None,
    conditions: Sequence[str] | None = None,
    skip_metrics: Sequence[str] = SLOW,
    n_threads: int = 1,
) -> CellEvalResult:
    """Run Arc's cell-eval (MIT licence) on a prediction, with the real control cells on both sides.

    cell-eval subtracts from each side the mean of that side's control cells and tests each side's perturbed cells
    against them. Scores then move when a model rescales the controls it returns, so the observed control cells stand
    on both sides here and those of ``predicted`` are not used. Their noise is shared by both shifts, which makes
    ``pearson_delta`` higher than in :func:`pertvae.metrics.evaluate`, where controls must be disjoint: do not mix the
    two. Cells, not the exact shifts that a prediction carries, are scored: log1p CP10k, over all genes of
    ``predicted``, on both sides. The metrics of differential expression need as many predicted cells a condition as
    were observed, and cells that vary like cells: a mean copied into every cell makes nearly all genes significant.

    Parameters
    ----------
    predicted
        What ``predict_perturbation`` returns, or any AnnData of counts with the label column. Not changed.
    observed
        Observed cells, counts in ``X`` or ``layer``, with at least the genes of ``predicted`` and with control cells.
        Not changed.
    perturbation_key
        Label column, in both.
    control
        Control label or labels. Labels are matched as canonical labels (``B+A`` is ``A+B``).
    profile
        cell-eval's list of metrics: ``"minimal"`` (pearson_delta, mse, mae, discrimination_score_l1, overlap_at_N,
        precision_at_N, de_nsig_counts), ``"vcc"`` (mae, discrimination_score_l1, overlap_at_N), ``"de"``,
        ``"anndata"``, ``"pds"`` or ``"full"``. Differential expression takes most of the time.
    sep
        Separator of components; ``None`` when every label is one perturbation.
    layer
        Layer of the counts in ``observed``; ``None`` for ``X``. ``predicted`` is read from ``X``.
    genes
        Names, or a boolean mask over ``predicted.var_names``, of the genes scored; ``None`` for all. cell-eval itself
        leaves a gene with the name of the condition out of its discrimination scores.
    conditions
        Conditions to score; ``None`` for all predicted ones that were observed.
    skip_metrics
        Metrics of the profile to leave out; by default the two that take longest. ``()`` leaves none out.
    n_threads
        Threads of the differential expression. polars keeps its own, see its ``POLARS_MAX_THREADS``.

    Returns
    -------
    CellEvalResult
        ``per_condition`` and ``summary``, both DataFrames, and the ``version`` of cell-eval. A warning names the
        metrics that cell-eval could not compute, and why.

    Raises
    ------
    ImportError
        If cell-eval is not installed: ``pip install 'pertvae[eval]'``.
    ValueError
        If there are no observed control cells, no condition stands in both, a profile or a metric to skip is unknown,
        nothing is left to compute, or values are not counts.
    KeyError
        If the label column, the layer, a gene or a condition is missing.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> first, second = adata[::2], adata[1::2]
    >>> result = pv.metrics.cell_eval(first, second, "perturbation", "control")  # doctest: +SKIP
    >>> result.summary.loc["mean"]  # doctest: +SKIP
    """
    _check_arguments(profile, skip_metrics, n_threads)
    format = LabelFormat.create(control, sep)
    ours, theirs = _both_sides(predicted, observed, perturbation_key, format, layer, genes, conditions)
    return run(ours, theirs, format.control[0], profile=profile, skip_metrics=skip_metrics, n_threads=n_threads)


def run(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    control: str,
    *,
    profile: str,
    skip_metrics: Sequence[str] = SLOW,
    n_threads: int = 1,
) -> CellEvalResult:
    """Run cell-eval on two AnnData of log1p CP10k with their labels in ``obs["perturbation"]``, and say nothing.

    cell-eval may change what it is given, so these are ours to lose.
    """
    # every metric of these two profiles works on cells or their means
    skip_de = profile in ("anndata", "pds")
    package = _cell_eval()
    with _silence() as errors, tempfile.TemporaryDirectory() as folder, _numba_threads(n_threads) as threads:
        evaluator = package.MetricsEvaluator(
            adata_pred=predicted,
            adata_real=observed,
            control_pert=control,
            pert_col=KEY,
            num_threads=threads,
            outdir=str(Path(folder) / "cell-eval"),
            skip_de=skip_de,
        )
        try:
            # one that fails is logged by cell-eval and left out; it must not take the others with it
            tables = evaluator.compute(profile=profile, skip_metrics=list(skip_metrics), write_csv=False)
        except import_module("polars").exceptions.ColumnNotFoundError as error:  # a table without columns
            why = "; ".join(errors) or f"skip_metrics={list(skip_metrics)} leaves nothing of it"
            raise ValueError(f"cell-eval computed no metric of profile={profile!r}: {why}.") from error
        per_condition, summary = (_to_pandas(table) for table in tables)
    if errors:
        warnings.warn(f"cell-eval could not compute all of its metrics: {'; '.join(errors)}.", stacklevel=3)
    order = [c for c in pd.unique(observed.obs[KEY].astype(str)) if c != control]
    per_condition = per_condition.set_index("perturbation").reindex(order).rename_axis("condition")
    return CellEvalResult(per_condition.rename_axis(columns=None), summary.set_index("statistic"), version("cell-eval"))


def _cell_eval() -> Any:
    """Return the package, or say how to install it.

    Not to be called with redirected streams: on import pdex makes a log handler that keeps the stream it finds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("cell_eval")
    except ImportError as error:
        raise ImportError(
            f"metrics.cell_eval needs the package cell-eval ({error}): pip install 'pertvae[eval]'"
        ) from error


def _check_arguments(profile: str, skip_metrics: Sequence[str], n_threads: int) -> None:
    """Check names against those that cell-eval knows."""
    package = _cell_eval()
    known, profiles = package.metrics_registry.list_metrics(), list(package.KNOWN_PROFILES)
    if profile not in profiles:
        raise ValueError(f"profile={profile!r} is not one of {profiles}.{hint(profile, profiles)}")
    if isinstance(skip_metrics, str):
        raise ValueError(f"skip_metrics={skip_metrics!r} is one text: pass a list of names.")
    for name in skip_metrics:
        if name not in known:
            raise ValueError(f"skip_metrics: {name!r} is not a metric of cell-eval.{hint(name, known)}")
    if n_threads < 1:
        raise ValueError(f"n_threads={n_threads} must be 1 or more.")


def _both_sides(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    format: LabelFormat,
    layer: str | None,
    genes: Any,
    conditions: Sequence[str] | None,
) -> tuple[ad.AnnData, ad.AnnData]:
    """Return both sides as log1p CP10k: the same genes and conditions, and the observed controls in both."""
    left = Labelled.create(predicted, "predicted", perturbation_key, format)
    right = Labelled.create(observed, "observed", perturbation_key, format, layer)
    names = predicted.var_names
    columns, selected = same_genes(right, names), choose_genes(names, genes)
    scored = choose_conditions(left, right, conditions)
    if not len(right.control_rows):
        known = sorted(set(right.labels))
        raise ValueError(
            f"observed has no cells labelled {format.control[0]!r}: cell-eval compares every condition with the "
            f"observed controls.{hint(format.control[0], known)}"
        )
    controls = right.values(right.control_rows, columns, selected)
    kept = names if selected is None else names[selected]
    sides = []
    for side, own_columns in ((left, None), (right, columns)):
        cells = [side.values(side.rows(c), own_columns, selected) for c in scored]
        sides.append(_log_anndata([*cells, controls], [*scored, format.control[0]], kept))
    return sides[0], sides[1]


def _log_anndata(blocks: Sequence[sp.csr_matrix], labels: Sequence[str], genes: pd.Index) -> ad.AnnData:
    """Join blocks of cells of one label each."""
    column = np.repeat(np.array(labels, dtype=object), [b.shape[0] for b in blocks])
    obs = pd.DataFrame({KEY: column}, index=pd.RangeIndex(len(column)).astype(str))
    x = sp.csr_matrix(sp.vstack(list(blocks), format="csr"), dtype=np.float32)
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=genes.astype(str)))


def _to_pandas(frame: Any) -> pd.DataFrame:
    """Return a polars table as a pandas one with NaN for what is missing."""
    return pd.DataFrame({name: frame[name].to_list() for name in frame.columns})


class _Errors(logging.Handler):
    """Keeps messages of errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _silence() -> Iterator[list[str]]:
    """Swallow what cell-eval and pdex print, log and warn of, in threads too; yield the errors they log."""
    collect = _Errors()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            before = [(log, log.level, log.propagate, log.handlers[:]) for log in loggers]
            for log in loggers:
                log.handlers[:] = [collect]
                log.setLevel(logging.ERROR)
                log.propagate = False
            try:
                yield collect.messages
            finally:
                for log, level, propagate, handlers in before:
                    log.handlers[:] = handlers
                    log.setLevel(level)
                    log.propagate = propagate


@contextlib.contextmanager
def _numba_threads(wanted: int) -> Iterator[int]:
    """Yield the number of threads to use, and restore that of numba, which pdex sets."""
    numba = import_module("numba")
    before = numba.get_num_threads()
    try:
        yield min(wanted, numba.config.NUMBA_NUM_THREADS)
    finally:
        numba.set_num_threads(before)
