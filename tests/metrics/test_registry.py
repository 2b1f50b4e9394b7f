"""The registry: what is listed, and a metric of one's own."""

import numpy as np
import pytest

from pertvae.datasets import example
from pertvae.metrics import _registry as module
from pertvae.metrics import evaluate, list_metrics, register, registry


@pytest.fixture
def clean(monkeypatch) -> None:
    before = dict(module._METRICS)
    yield
    module._METRICS.clear()
    module._METRICS.update(before)


def test_list_metrics() -> None:
    table = list_metrics()
    expected = {
        "l2_profile": ("lower", 0, np.inf),
        "pearson_delta_perturbed": ("higher", -1, 1),
        "l2_delta": ("lower", 0, np.inf),
        "pearson_delta": ("higher", -1, 1),
        "slope": ("one", -np.inf, np.inf),
        "energy_distance": ("lower", -np.inf, np.inf),
        "ate_correlation": ("higher", -1, 1),
        "ate_r2": ("higher", -np.inf, 1),
        "ate_correlation_top_20": ("higher", -1, 1),
        "ate_r2_top_20": ("higher", -np.inf, 1),
        "jaccard_top_20": ("higher", 0, 1),
        "jaccard_top_50": ("higher", 0, 1),
        "mae_delta": ("lower", 0, np.inf),
        "mse_delta": ("lower", 0, np.inf),
        "r2_delta": ("higher", -np.inf, 1),
        "weighted_mse": ("lower", 0, np.inf),
        "variance_ratio": ("one", 0, np.inf),
        "gene_variance_agreement": ("higher", -np.inf, 1),
        "discrimination_score": ("higher", 0, 1),
        "discrimination_score_l1": ("higher", 0, 1),
        "discrimination_score_l2": ("higher", 0, 1),
        "centroid_accuracy": ("higher", 0, 1),
        "de_recovery": ("higher", 0, 1),
        "de_count_ratio": ("one", 0, np.inf),
        "interaction_auroc": ("higher", 0, 1),
        "mmd2": ("lower", -2, 2),
        "relative_rmse": ("lower", 0, np.inf),
        "frechet_distance": ("lower", 0, np.inf),
        "wasserstein2": ("lower", 0, np.inf),
    }
    assert set(table.index) == set(expected)
    for name, row in expected.items():
        assert tuple(table.loc[name, ["direction", "lowest", "highest"]]) == row
    assert (table["source"].str.len() > 5).all()
    assert (table["description"].str.len() > 20).all()
    # the headline comes first
    assert list(table.index[:2]) == ["l2_profile", "pearson_delta_perturbed"]


def test_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        registry["other"] = registry["l2_profile"]


@pytest.mark.usefixtures("clean")
def test_own_metric() -> None:
    @register("max_error", direction="lower", range=(0, np.inf), source="a test")
    def max_error(comparison):
        """Largest error of the mean profile."""
        return np.abs(comparison.predicted_profiles - comparison.observed_profiles).max(axis=1)

    adata = example()
    table = evaluate(adata[::2], adata[1::2], "perturbation", "control", metrics=["max_error", "l2_profile"])
    wide = table.pivot_table(index="condition", columns="metric", values="value")
    assert (wide["max_error"] < wide["l2_profile"]).all()
    assert list_metrics().loc["max_error", "description"] == "Largest error of the mean profile."
    with pytest.raises(ValueError, match="registered already"):
        register("max_error", direction="lower", range=(0, 1), source="again")
    with pytest.raises(ValueError, match="registered already"):
        register("jaccard_top_k", direction="lower", range=(0, 1), source="again")


@pytest.mark.usefixtures("clean")
def test_own_metric_of_the_wrong_shape() -> None:
    register("odd", direction="lower", range=(0, 1), source="a test")(lambda comparison: 1.0)
    adata = example()
    with pytest.raises(ValueError, match=r"'odd' returned shape \(\), expected \(18,\)"):
        evaluate(adata[::2], adata[1::2], "perturbation", "control", metrics="odd")


@pytest.mark.usefixtures("clean")
def test_own_metric_with_an_undeclared_need() -> None:
    register("hidden", direction="lower", range=(0, 1), source="a test")(lambda c: c.deltas[0].sum(axis=1))
    adata = example()
    with pytest.raises(ValueError, match="needs="):
        evaluate(adata[::2], adata[1::2], "perturbation", "control", metrics="hidden")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"direction": "up"}, "direction='up'"), ({"level": "gene"}, "level='gene'"), ({"needs": ["x"]}, "needs='x'")],
)
def test_register_errors(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        register("new", **({"direction": "lower", "range": (0, 1), "source": "a test"} | arguments))
