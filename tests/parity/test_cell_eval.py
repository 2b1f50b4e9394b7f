"""cell-eval: our metrics are its metrics where the definitions agree, and its behaviour is the one we describe."""

import importlib
import logging
import subprocess
import sys
import threading
import warnings

import anndata as ad
import numba
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae._expression import log1p_cp10k
from pertvae.datasets import example
from pertvae.metrics import Comparison, registry
from pertvae.metrics._cell_eval import LOGGERS, CellEvalResult, _numba_threads, _silence, cell_eval, run
from pertvae.metrics._recovery import wilcoxon

KEY, CONTROL = "perturbation", "control"
INSTALLED = importlib.util.find_spec("cell_eval") is not None
needs_cell_eval = pytest.mark.skipif(not INSTALLED, reason="cell-eval is not installed")


@pytest.fixture(scope="module")
def halves() -> tuple[ad.AnnData, ad.AnnData]:
    screen = example()
    return screen[::2].copy(), screen[1::2].copy()


@pytest.fixture(scope="module")
def result(halves) -> CellEvalResult:
    pytest.importorskip("cell_eval")
    return cell_eval(*halves, KEY, CONTROL, profile="anndata")


def means(adata: ad.AnnData) -> pd.DataFrame:
    x = log1p_cp10k(adata.X.toarray())
    return pd.DataFrame(x, columns=adata.var_names).groupby(adata.obs[KEY].astype(str).to_numpy()).mean()


def comparison(predicted: ad.AnnData, observed: ad.AnnData) -> Comparison:
    """Deltas of both sides against the observed controls, which evaluate refuses."""
    p, o = means(predicted), means(observed)
    conditions = [c for c in o.index if c != CONTROL]
    base = o.loc[CONTROL].to_numpy()
    return Comparison(
        conditions=tuple(conditions),
        genes=predicted.var_names,
        predicted_profiles=p.loc[conditions].to_numpy(),
        observed_profiles=o.loc[conditions].to_numpy(),
        predicted_deltas=p.loc[conditions].to_numpy() - base,
        observed_deltas=o.loc[conditions].to_numpy() - base,
        reference_profile=None,
        predicted_cells=[],
        observed_cells=[],
    )


PAIRS = {
    "pearson_delta": "pearson_delta",
    "mae_delta": "mae_delta",
    "mse_delta": "mse_delta",
    "discrimination_score": "discrimination_score_cosine",
    "discrimination_score_l1": "discrimination_score_l1",
    "discrimination_score_l2": "discrimination_score_l2",
}


@pytest.mark.parametrize("ours", PAIRS)
def test_the_same_numbers(halves, result: CellEvalResult, ours: str) -> None:
    c = comparison(*halves)
    found = pd.Series(registry[ours].function(c), index=list(c.conditions))
    theirs = result.per_condition[PAIRS[ours]]
    np.testing.assert_allclose(found[theirs.index], theirs, atol=1e-6)
    assert theirs.nunique() > 1
    assert result.summary.loc["mean", PAIRS[ours]] == pytest.approx(found.mean(), abs=1e-6)


def test_l2_is_the_root_of_their_mse(halves, result: CellEvalResult) -> None:
    c = comparison(*halves)
    theirs = np.sqrt(result.per_condition["mse"] * len(c.genes))
    for name in ("l2_profile", "l2_delta"):
        found = pd.Series(registry[name].function(c), index=list(c.conditions))
        np.testing.assert_allclose(found[theirs.index], theirs, rtol=1e-6)


@needs_cell_eval
def test_tables(halves, result: CellEvalResult) -> None:
    conditions = [c for c in pd.unique(halves[0].obs[KEY].astype(str)) if c != CONTROL]
    assert list(result.per_condition.index) == conditions
    assert result.per_condition.index.name == "condition"
    assert not {"pearson_edistance", "clustering_agreement"} & set(result.per_condition.columns)
    assert {"count", "mean", "std"} <= set(result.summary.index)
    assert list(result.summary.columns) == list(result.per_condition.columns)
    assert result.version.startswith("0.")


@needs_cell_eval
def test_the_real_controls_stand_on_both_sides(halves, result: CellEvalResult) -> None:
    first, second = halves
    is_control = (first.obs[KEY] == CONTROL).to_numpy()
    without = first[~is_control].copy()
    scaled = first.copy()
    scaled.X = sp.csr_matrix(np.where(is_control[:, None], np.arange(first.n_vars), first.X.toarray()))
    for predicted in (without, scaled):
        found = cell_eval(predicted, second, KEY, CONTROL, profile="anndata")
        pd.testing.assert_frame_equal(found.per_condition, result.per_condition)
    other = second.copy()
    other.X = sp.csr_matrix(np.where((second.obs[KEY] == CONTROL).to_numpy()[:, None], 1.0, second.X.toarray()))
    moved = cell_eval(first, other, KEY, CONTROL, profile="anndata").per_condition
    assert (moved["pearson_delta"] > result.per_condition["pearson_delta"]).mean() > 0.5
    np.testing.assert_allclose(moved["mae"], result.per_condition["mae"], rtol=1e-6)


@needs_cell_eval
def test_labels_genes_layers_and_order(halves, result: CellEvalResult) -> None:
    first, second = halves
    predicted, observed = first.copy(), second[::-1, ::-1].copy()
    labels = observed.obs[KEY].astype(str)
    observed.obs["label"] = ["+".join(reversed(c.split("+"))).replace(CONTROL, "ctrl") for c in labels]
    predicted.obs["label"] = first.obs[KEY].astype(str).replace(CONTROL, "ctrl").to_numpy()
    observed.layers["counts"] = observed.X.copy()
    observed.X = sp.csr_matrix(observed.shape)
    before = predicted.copy(), observed.copy()
    found = cell_eval(predicted, observed, "label", "ctrl", profile="anndata", layer="counts")
    expected = result.per_condition
    pd.testing.assert_frame_equal(found.per_condition, expected, rtol=1e-6)
    for now, then in zip((predicted, observed), before, strict=True):
        pd.testing.assert_frame_equal(now.obs, then.obs)
        assert (now.X != then.X).nnz == 0
        assert set(now.layers) == set(then.layers)
        assert now.uns.keys() == then.uns.keys()
    some = list(expected.index[[4, 1, 7]])
    part = cell_eval(first, second, KEY, CONTROL, profile="anndata", conditions=some, genes=list(first.var_names[:50]))
    assert list(part.per_condition.index) == some
    error = (means(first) - means(second)).iloc[:, :50].abs().mean(axis=1)
    np.testing.assert_allclose(part.per_condition["mae"], error[some], rtol=1e-5)


@needs_cell_eval
@pytest.mark.parametrize("profile", ["pds", pytest.param("minimal", marks=pytest.mark.slow)])
def test_says_and_leaves_nothing(halves, capfd, tmp_path, monkeypatch, profile: str) -> None:
    pytest.importorskip("cell_eval")  # on import pdex sets its own logger
    monkeypatch.chdir(tmp_path)
    heard = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.name)

    ear, root = Ear(), logging.getLogger()
    root.addHandler(ear)
    monkeypatch.setattr(root, "level", logging.DEBUG)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.DEBUG)
    state = [(x.level, x.propagate, list(x.handlers)) for x in loggers]
    streams = sys.stdout, sys.stderr
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cell_eval(*halves, KEY, CONTROL, profile=profile, n_threads=2)
    finally:
        root.removeHandler(ear)
    assert not [name for name in heard if name.split(".")[0] in LOGGERS]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert [(x.level, x.propagate, list(x.handlers)) for x in loggers] == state
    assert (sys.stdout, sys.stderr) == streams


FRESH = """
import logging, sys
from pertvae.datasets import example
from pertvae.metrics._cell_eval import cell_eval
adata = example()
cell_eval(adata[::2], adata[1::2], "perturbation", "control", profile="pds")
# what pdex logs later is heard
assert [h.stream for h in logging.getLogger("pdex").handlers] == [sys.stderr]
"""


@needs_cell_eval
@pytest.mark.slow
def test_the_import_is_silent_too(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_threads_are_silent_too(capfd) -> None:
    with _silence():
        thread = threading.Thread(target=print, args=("from a thread",))
        thread.start()
        thread.join()
        print("an error", file=sys.stderr)
    assert capfd.readouterr() == ("", "")


def test_threads_of_numba_are_given_back(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(numba, "get_num_threads", lambda: 7)
    monkeypatch.setattr(numba, "set_num_threads", given.append)
    with _numba_threads(10**6) as threads:
        assert threads == numba.config.NUMBA_NUM_THREADS
    assert given == [7]


@needs_cell_eval
@pytest.mark.slow
def test_the_default_profile(halves, result: CellEvalResult) -> None:
    found = cell_eval(*halves, KEY, CONTROL).per_condition
    assert set(found.columns) == {
        "pearson_delta",
        "mse",
        "mae",
        "discrimination_score_l1",
        "overlap_at_N",
        "precision_at_N",
        "de_nsig_counts_real",
        "de_nsig_counts_pred",
    }
    pd.testing.assert_series_equal(found["mae"], result.per_condition["mae"])
    # the test behind our own metric of differential expression, on the same cells, in single precision
    first, second = (sp.csr_matrix(log1p_cp10k(x.X), dtype=np.float32) for x in halves)
    controls = second[(halves[1].obs[KEY] == CONTROL).to_numpy()]
    for side, cells, adata in (("pred", first, halves[0]), ("real", second, halves[1])):
        counts = [wilcoxon(cells[(adata.obs[KEY] == c).to_numpy()], controls).significant.sum() for c in found.index]
        np.testing.assert_array_equal(found[f"de_nsig_counts_{side}"], counts)


@needs_cell_eval
def test_what_fails_is_named(halves) -> None:
    arguments = {"profile": "anndata", "conditions": ["P001"], "skip_metrics": ()}
    with pytest.warns(UserWarning, match="could not compute all.*'pearson_edistance'"):
        found = cell_eval(*halves, KEY, CONTROL, **arguments)
    assert "pearson_delta" in found.per_condition
    assert "pearson_edistance" not in found.per_condition
    with pytest.raises(ValueError, match="no metric of profile='pds': skip_metrics=.*leaves nothing"):
        cell_eval(*halves, KEY, CONTROL, profile="pds", skip_metrics=["discrimination_score_l1"])


@needs_cell_eval
def test_errors(halves) -> None:
    first, second = halves
    with pytest.raises(ValueError, match=r"profile='minmal'.*Did you mean 'minimal'"):
        cell_eval(first, second, KEY, CONTROL, profile="minmal")
    with pytest.raises(ValueError, match=r"skip_metrics: 'pearson' is not a metric.*'pearson_delta'"):
        cell_eval(first, second, KEY, CONTROL, skip_metrics=["pearson"])
    with pytest.raises(ValueError, match="pass a list"):
        cell_eval(first, second, KEY, CONTROL, skip_metrics="mae")
    with pytest.raises(ValueError, match="n_threads=0"):
        cell_eval(first, second, KEY, CONTROL, n_threads=0)
    with pytest.raises(ValueError, match="observed has no cells labelled 'control'"):
        cell_eval(first, second[second.obs[KEY] != CONTROL], KEY, CONTROL)
    with pytest.raises(KeyError, match="perturbation_key='pertubation'"):
        cell_eval(first, second, "pertubation", CONTROL)


def test_without_an_install(halves, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cell_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'pertvae\[eval\]'"):
        cell_eval(*halves, KEY, CONTROL)


# ------------------------------------------------------------------------------------------------- its behaviour


GENES, CELLS, CONTROLS, CONDITIONS = 500, 100, 2000, 14


class Screen:
    """Negative binomial counts; each condition moves 35 genes of its own and 15 that all of them move."""

    def __init__(self) -> None:
        self.rng = rng = np.random.default_rng(0)
        self.baseline, self.theta = rng.normal(0, 1.2, GENES), rng.lognormal(np.log(1.5), 0.5, GENES)
        shared = np.zeros(GENES)
        shared[rng.choice(GENES, 15, replace=False)] = rng.normal(0, 0.55, 15)
        effects = np.tile(shared, (CONDITIONS, 1))
        for row in effects:
            row[rng.choice(GENES, 35, replace=False)] += rng.normal(0, 0.55, 35)
        self.controls = self.draw(np.zeros(GENES), CONTROLS)
        # enough cells that their mean is that of the true model
        self.profiles = np.stack([self.draw(e, 3000).mean(axis=0) for e in effects])
        self.shifts = self.profiles - self.draw(np.zeros(GENES), 6000).mean(axis=0)
        self.observed = [self.draw(e, CELLS) for e in effects]
        self.duplicate = [self.draw(e, CELLS) for e in effects]

    def draw(self, effect: np.ndarray, cells: int) -> np.ndarray:
        rate = np.exp(self.baseline + effect)
        means = self.rng.lognormal(np.log(2000), 0.35, (cells, 1)) * rate / rate.sum()
        gamma = self.rng.standard_gamma(self.theta, (cells, GENES)) / self.theta
        return log1p_cp10k(self.rng.poisson(means * gamma))

    def moved(self, factor: float) -> list[np.ndarray]:
        rows = np.random.default_rng(1).choice(CONTROLS, (CONDITIONS, CELLS))
        return [np.maximum(self.controls[r] + factor * s, 0) for r, s in zip(rows, self.shifts, strict=True)]

    def anndata(self, blocks: list[np.ndarray]) -> ad.AnnData:
        names = [*(f"P{i:02d}" for i in range(CONDITIONS)), CONTROL]
        labels = np.repeat(names, [*(len(b) for b in blocks), CONTROLS])
        obs = pd.DataFrame({KEY: labels}, index=[f"cell{i}" for i in range(len(labels))])
        x = sp.csr_matrix(np.concatenate([*blocks, self.controls]).astype(np.float32))
        return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(GENES)]))


def identical(profiles: np.ndarray) -> list[np.ndarray]:
    return [np.tile(p, (CELLS, 1)) for p in profiles]


@pytest.fixture(scope="module")
def behaviour() -> pd.DataFrame:
    """Mean scores of predictions whose faults are known, the real controls on both sides."""
    pytest.importorskip("cell_eval")
    screen = Screen()
    mean = np.mean([cells.mean(axis=0) for cells in screen.observed], axis=0)
    predictions = {
        "duplicate": screen.duplicate,
        "noise-free mean": identical(screen.profiles),
        "shift x1": screen.moved(1.0),
        "mean baseline": identical(np.tile(mean, (CONDITIONS, 1))),
        "shift x0.5": screen.moved(0.5),
        "shift x3": screen.moved(3.0),
    }
    observed = screen.anndata(screen.observed)
    return pd.DataFrame(
        {
            name: run(screen.anndata(cells), observed.copy(), CONTROL, profile="full").summary.loc["mean"]
            for name, cells in predictions.items()
        }
    )


@pytest.mark.slow
def test_duplicate_is_no_ceiling_of_correlations(behaviour: pd.DataFrame) -> None:
    b = behaviour.loc["pearson_delta"]
    assert b["noise-free mean"] > b["duplicate"] + 0.1
    # the root of the reliability
    assert b["noise-free mean"] == pytest.approx(np.sqrt(b["duplicate"]), abs=0.04)
    assert behaviour.loc["mae", "noise-free mean"] < 0.8 * behaviour.loc["mae", "duplicate"]
    assert behaviour.loc["discrimination_score_l1", ["duplicate", "noise-free mean"]].min() > 0.99


@pytest.mark.slow
def test_identical_cells_make_all_genes_significant(behaviour: pd.DataFrame) -> None:
    b = behaviour
    real = b.loc["de_nsig_counts_real", "duplicate"]
    assert 10 < real < 40
    assert b.loc["de_nsig_counts_pred", "duplicate"] == pytest.approx(real, rel=0.3)
    for name in ("noise-free mean", "mean baseline"):
        assert b.loc["de_nsig_counts_pred", name] > 10 * real
        assert b.loc["precision_at_N", name] < 0.1 < 0.6 < b.loc["precision_at_N", "duplicate"]
        assert b.loc["pr_auc", name] < 0.2 < 0.6 < b.loc["pr_auc", "duplicate"]
    # a shift lifts the zeros of control cells all at once
    for name in ("shift x0.5", "shift x1", "shift x3"):
        assert b.loc["de_nsig_counts_pred", name] > 3 * real
        assert b.loc["precision_at_N", name] < 0.3


@pytest.mark.slow
def test_larger_shifts_win(behaviour: pd.DataFrame) -> None:
    for metric in ("pearson_delta", "overlap_at_N"):
        assert (behaviour.loc[metric, ["shift x0.5", "shift x1", "shift x3"]].diff().dropna() > 0.05).all(), metric
    mae = behaviour.loc["mae"]
    assert mae["shift x3"] > 1.2 * mae["shift x1"]
    assert behaviour.loc["overlap_at_N", "shift x3"] > behaviour.loc["overlap_at_N", "duplicate"]


@pytest.mark.slow
def test_the_mean_looks_good_where_it_should_not(behaviour: pd.DataFrame) -> None:
    b = behaviour["mean baseline"]
    assert b["de_direction_match"] > 0.7
    assert b["de_sig_genes_recall"] > behaviour.loc["de_sig_genes_recall", "duplicate"]
    assert b["mae"] < behaviour.loc["mae", "duplicate"]
    assert 0.3 < b["pearson_delta"] < behaviour.loc["pearson_delta", "duplicate"]
    # where it does not
    assert b["discrimination_score_l1"] == pytest.approx(0.5, abs=0.1)
    assert b["overlap_at_N"] < 0.5 * behaviour.loc["overlap_at_N", "duplicate"]
