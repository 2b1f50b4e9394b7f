"""Metrics on screens whose truth is known: what each of them must reward, and what it must not."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.metrics import Comparison, evaluate, registry

KEY, CONTROL = "perturbation", "control"
CONDITIONS, GENES, CELLS, CONTROLS = 6, 150, 120, 300
METRICS = [
    "mae_delta",
    "r2_delta",
    "weighted_mse",
    "discrimination_score",
    "centroid_accuracy",
    "variance_ratio",
    "gene_variance_agreement",
    "de_recovery",
    "de_count_ratio",
]


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Pooled scores (metric x prediction) of known predictions on a screen of negative binomial counts."""
    rng = np.random.default_rng(0)
    base = np.log(rng.lognormal(0, 1.2, GENES) + 0.2)
    moves = rng.random((CONDITIONS, GENES)) < 0.1
    shifts = np.concatenate([moves * rng.choice([-1.0, 1.0], moves.shape), np.zeros((1, GENES))])
    labels = np.repeat([*(f"P{i}" for i in range(CONDITIONS)), CONTROL], [CELLS] * CONDITIONS + [CONTROLS])
    which = np.repeat(np.arange(CONDITIONS + 1), [CELLS] * CONDITIONS + [CONTROLS])

    def rates(factor: float = 1.0) -> np.ndarray:
        rate = np.exp(base + factor * shifts)
        return (rate / rate.sum(axis=1, keepdims=True))[which]

    def screen(x: np.ndarray, name: str) -> ad.AnnData:
        obs = pd.DataFrame({KEY: labels}, index=[f"{name}{i}" for i in range(len(x))])
        return ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs)

    def counts(rate: np.ndarray) -> np.ndarray:
        depth = rng.lognormal(np.log(1500), 0.3, (len(rate), 1))
        return rng.poisson(rate * depth * rng.gamma(2, 0.5, rate.shape))

    observed, many = screen(counts(rates()), "o"), np.repeat(np.arange(CONDITIONS + 1), 2000)
    # the expected profile of each condition in every of its cells, on the scale of the metrics
    plenty = counts(rates()[[np.flatnonzero(which == k)[0] for k in many]])
    logged = np.log1p(1e4 * plenty / plenty.sum(axis=1, keepdims=True))
    expected = np.expm1(np.stack([logged[many == k].mean(axis=0) for k in range(CONDITIONS + 1)]))
    predictions = {
        "duplicate": screen(counts(rates()), "d"),
        "identical": screen(np.round(1e4 * expected)[which], "i"),
        "no change": screen(counts(rates(0.0)), "n"),
        "half": screen(counts(rates(0.5)), "h"),
        "opposite": screen(counts(rates(-1.0)), "m"),
    }
    found = {}
    for name, predicted in predictions.items():
        table = evaluate(predicted, observed, KEY, CONTROL, metrics=METRICS)
        found[name] = table[table["level"] == "pooled"].set_index("metric")["value"]
    return pd.DataFrame(found)


def test_errors_of_means(scores: pd.DataFrame) -> None:
    for metric in ("mae_delta", "weighted_mse"):
        row = scores.loc[metric]
        assert row["duplicate"] < row["half"] < row["no change"] < row["opposite"], metric
    # weights are on genes that move: half an effect costs far more than noise
    assert scores.loc["weighted_mse", "half"] > 3 * scores.loc["weighted_mse", "duplicate"]
    assert scores.loc["weighted_mse", "no change"] > 3 * scores.loc["weighted_mse", "half"]
    row = scores.loc["r2_delta"]
    assert row["duplicate"] > row["half"] > 0.3 > 0.05 > row["no change"] > row["opposite"]


def test_ranks(scores: pd.DataFrame) -> None:
    for metric in ("discrimination_score", "centroid_accuracy"):
        assert scores.loc[metric, ["duplicate", "identical", "half"]].min() > 0.95, metric
        assert scores.loc[metric, "no change"] == pytest.approx(0.55, abs=0.2), metric


def test_variances(scores: pd.DataFrame) -> None:
    assert scores.loc["variance_ratio", "duplicate"] == pytest.approx(1, abs=0.05)
    assert scores.loc["variance_ratio", "identical"] == pytest.approx(0, abs=1e-6)
    # variances of 120 cells are noisy: a duplicate is no 1
    assert scores.loc["gene_variance_agreement", "duplicate"] > 0.3
    assert scores.loc["gene_variance_agreement", "identical"] < 0


def test_differential_expression(scores: pd.DataFrame) -> None:
    recovery, ratio = scores.loc["de_recovery"], scores.loc["de_count_ratio"]
    assert recovery["duplicate"] > 0.85
    assert ratio["duplicate"] == pytest.approx(1, abs=0.2)
    # right means in identical cells: everything is significant, and the order of genes is lost
    assert recovery["identical"] < 0.5 * recovery["duplicate"]
    assert ratio["identical"] > 3
    # the right genes in the wrong direction are not found
    assert recovery["opposite"] < 0.3
    assert recovery["no change"] < 0.3
    assert recovery["duplicate"] > recovery["half"] > recovery["no change"]


def test_weights_come_from_other_cells() -> None:
    # nothing moves, the prediction is right: weights from the scored cells would pick the genes with the largest error
    rng = np.random.default_rng(1)
    genes, n = 300, 40
    cells = [sp.csr_matrix(rng.normal(1, 1, (n, genes))) for _ in range(12)]
    comparison = Comparison(
        conditions=tuple(f"P{i}" for i in range(12)),
        genes=pd.RangeIndex(genes),
        predicted_profiles=np.ones((12, genes)),
        observed_profiles=np.stack([np.asarray(c.mean(axis=0)).ravel() for c in cells]),
        predicted_deltas=None,
        observed_deltas=None,
        reference_profile=None,
        predicted_cells=[],
        observed_cells=cells,
    )
    found = registry["weighted_mse"].function(comparison).mean()
    # half a condition's cells: variance 1 / (n / 2); a leak would double it
    assert found == pytest.approx(2 / n, rel=0.08)
