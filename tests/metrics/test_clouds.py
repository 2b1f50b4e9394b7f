"""Metrics of clouds of cells: what they see, and cases at the edge."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.datasets import example, simulate_screen
from pertvae.metrics import Comparison, evaluate, list_metrics, registry, resample
from pertvae.metrics import _clouds as module

KEY, CONTROL = "perturbation", "control"
NAMES = ["energy_distance", "mmd2", "relative_rmse", "frechet_distance", "wasserstein2"]


def cells_only(predicted: list[np.ndarray], observed: list[np.ndarray]) -> Comparison:
    def means(side: list[np.ndarray]) -> np.ndarray:
        return np.stack([x.mean(axis=0) for x in side])

    return Comparison(
        conditions=tuple(f"P{i}" for i in range(len(observed))),
        genes=pd.Index([f"G{i}" for i in range(observed[0].shape[1])]),
        predicted_profiles=means(predicted),
        observed_profiles=means(observed),
        predicted_deltas=None,
        observed_deltas=None,
        reference_profile=None,
        predicted_cells=[sp.csr_matrix(x) for x in predicted],
        observed_cells=[sp.csr_matrix(x) for x in observed],
    )


def score(name: str, predicted: list[np.ndarray], observed: list[np.ndarray]) -> np.ndarray:
    return np.asarray(registry[name].function(cells_only(predicted, observed)))


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return example()


@pytest.fixture(scope="module")
def tables(screen: ad.AnnData) -> pd.DataFrame:
    """Pooled scores of a technical duplicate, of its means in identical cells, and of control cells."""
    first, second = screen[::2].copy(), screen[1::2].copy()
    labels = first.obs[KEY].astype(str).to_numpy()
    x = first.X.toarray()
    mean = x.copy()
    for label in np.unique(labels):
        mean[labels == label] = x[labels == label].mean(axis=0)
    means = ad.AnnData(np.round(100 * mean), obs=first.obs.copy(), var=first.var.copy())
    controls = np.flatnonzero(labels == CONTROL)
    nothing = ad.AnnData(sp.csr_matrix(x[np.resize(controls, len(x))]), obs=first.obs.copy(), var=first.var.copy())
    columns = {}
    for name, predicted in (("duplicate", first), ("means", means), ("no change", nothing)):
        table = evaluate(predicted, second, KEY, CONTROL, metrics=NAMES)
        columns[name] = table[table["level"] == "pooled"].set_index("metric")["value"]
    return pd.DataFrame(columns)


def test_registration() -> None:
    table = list_metrics().loc[NAMES]
    assert (table["direction"] == "lower").all()
    assert table["needs"].map(lambda needs: needs == ["cells"]).all()
    assert list(table["level"]) == ["condition", "condition", "condition", "pooled", "condition"]
    assert list(table["resampled"]) == [True, True, True, False, False]


def test_cells_that_do_not_vary_are_seen(tables: pd.DataFrame) -> None:
    for name in ("energy_distance", "mmd2", "frechet_distance"):
        assert tables.loc[name, "means"] > 1.5 * max(tables.loc[name, "duplicate"], 1e-3), name
    # the one that rewards them
    assert tables.loc["relative_rmse", "means"] < 0.9 * tables.loc["relative_rmse", "duplicate"]


def test_no_change_is_worse_than_a_duplicate(tables: pd.DataFrame) -> None:
    assert (tables["no change"] > tables["duplicate"]).all()
    for name in ("energy_distance", "mmd2"):
        assert abs(tables.loc[name, "duplicate"]) < 0.15 * tables.loc[name, "no change"], name


def test_relative_rmse_of_a_perfect_mean() -> None:
    # the root of variance over second moment: 1 and 2 cells of gamma variables, E o^2 = k (k + 1)
    rng = np.random.default_rng(0)
    y = rng.gamma(3, 1, (5000, 10))
    perfect = np.broadcast_to(y.mean(axis=0), (20, 10))
    assert score("relative_rmse", [perfect], [y])[0] == pytest.approx(np.sqrt(3 / 12), abs=0.01)
    assert score("relative_rmse", [rng.gamma(3, 1, (5000, 10))], [y])[0] == pytest.approx(np.sqrt(6 / 12), abs=0.01)


def test_frechet_counts_conditions_alike() -> None:
    # the prediction is right but has five times the cells of one condition
    rng = np.random.default_rng(1)
    centers = np.zeros((2, 6))
    centers[1, 0] = 10.0
    observed = [c + rng.normal(0, 1, (200, 6)) for c in centers]
    predicted = [c + rng.normal(0, 1, (n, 6)) for c, n in zip(centers, (1000, 200), strict=True)]
    balanced = float(score("frechet_distance", predicted, observed))
    naive = module.frechet(np.concatenate(predicted), np.concatenate(observed))
    assert balanced < 0.2
    assert naive > 5
    # labels swapped: the cloud of all cells is the same
    assert float(score("frechet_distance", predicted[::-1], observed)) < 0.2
    assert (score("wasserstein2", predicted[::-1], observed) > 9).all()


def test_wasserstein_takes_equal_numbers_and_a_limit(monkeypatch) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 1, (90, 5)), rng.normal(0, 1, (40, 5))
    seen = []
    original = module.wasserstein
    monkeypatch.setattr(module, "wasserstein", lambda p, o: seen.append((len(p), len(o))) or original(p, o))
    first = score("wasserstein2", [x], [y])
    np.testing.assert_array_equal(first, score("wasserstein2", [x], [y]))
    monkeypatch.setattr(module, "MOST_CELLS", 25)
    score("wasserstein2", [x], [y])
    assert seen == [(40, 40), (40, 40), (25, 25)]


def test_axes_are_those_of_the_observed_cells() -> None:
    # what the prediction does where no observed cell varies is not seen, and does not turn the axes
    rng = np.random.default_rng(3)
    y = np.hstack([rng.normal(5, 1, (80, 40)), np.ones((80, 3))])
    x = y.copy()
    x[:, 40:] = rng.normal(0, 100, (80, 3))
    assert score("wasserstein2", [x], [y])[0] == pytest.approx(0, abs=1e-6)
    assert float(score("frechet_distance", [x], [y])) == pytest.approx(0, abs=1e-6)


def test_directions_without_variance_are_no_axes() -> None:
    # the observed cells lie in a plane: the other 28 components are arbitrary, and must not measure anything
    rng = np.random.default_rng(7)
    plane = np.linalg.qr(rng.normal(size=(60, 3)))[0].T
    y = 9 + rng.normal(size=(80, 2)) @ plane[:2]
    x = y + rng.normal(0, 10, size=(80, 60)) @ (np.eye(60) - plane[:2].T @ plane[:2])
    assert score("wasserstein2", [x], [y])[0] == pytest.approx(0, abs=1e-6)
    assert float(score("frechet_distance", [x], [y])) == pytest.approx(0, abs=1e-6)


def test_order_of_cells_and_random_state() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.gamma(1, 1, (60, 50)), rng.gamma(1, 1, (60, 50))
    np.random.seed(3)  # noqa: NPY002 - the state that must not move
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in NAMES:
        found = score(name, [x], [y])
        np.testing.assert_allclose(score(name, [x[::-1]], [y[rng.permutation(60)]]), found, rtol=1e-6)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize(("cells", "genes"), [(3, 100), (12, 100), (31, 40), (200, 1), (200, 7), (40, 30)])
def test_fewer_cells_or_genes_than_components(cells: int, genes: int) -> None:
    rng = np.random.default_rng(5)
    y = rng.gamma(1, 1, (cells, genes))
    # all of the observed cells' variance is in the components: distances among them are kept
    fitted = module._fit(sp.csr_matrix(y))
    if min(cells - 1, genes) <= 30:
        projected = module._project(fitted, sp.csr_matrix(y))
        np.testing.assert_allclose((projected**2).sum(), ((y - y.mean(axis=0)) ** 2).sum(), rtol=1e-8)
    for name in ("frechet_distance", "wasserstein2"):
        assert np.isfinite(score(name, [y + 1.0], [y])).all()
        assert np.abs(score(name, [y], [y])).max() == pytest.approx(0, abs=1e-5)


def test_what_has_no_value_is_nan() -> None:
    rng = np.random.default_rng(6)
    one, many = rng.gamma(1, 1, (1, 4)), rng.gamma(1, 1, (9, 4))
    for predicted, observed in ((one, many), (many, one)):
        assert np.isnan(score("mmd2", [predicted], [observed])).all()
        assert np.isfinite(score("relative_rmse", [predicted], [observed])).all()
    assert np.isnan(score("frechet_distance", [one], [many]))
    same = np.ones((5, 4))
    assert np.isnan(score("mmd2", [many], [same])).all()
    assert np.isnan(score("frechet_distance", [many], [same]))
    assert np.isnan(score("wasserstein2", [many], [same])).all()
    assert np.isnan(score("relative_rmse", [many], [np.zeros((5, 4))])).all()
    # a condition without a value does not take the others with it
    np.testing.assert_array_equal(np.isnan(score("mmd2", [many, many], [same, many[:5]])), [True, False])


def test_resampling_repeats_no_distances(screen: ad.AnnData, monkeypatch) -> None:
    calls = []
    original = module._squares
    monkeypatch.setattr(module, "_squares", lambda x: calls.append(1) or original(x))
    names = ["mmd2", "relative_rmse"]
    table = resample(screen[::2], screen[1::2], KEY, control=CONTROL, metrics=names, n_resamples=20)
    assert len(calls) == 2 * (screen.obs[KEY].nunique() - 1)
    spread = table[table["level"] == "pooled"].groupby("metric")["value"].std()
    assert set(spread.index) == set(names)
    assert (spread > 0).all()
    for name in ("frechet_distance", "wasserstein2"):
        with pytest.raises(ValueError, match="too slow"):
            resample(screen[::2], screen[1::2], KEY, control=CONTROL, metrics=name, n_resamples=2)


def test_cells_of_a_weaker_perturbation_are_farther() -> None:
    def make(size: float) -> ad.AnnData:
        return simulate_screen(
            n_genes=100,
            n_perturbations=3,
            n_doubles=0,
            cells_per_perturbation=150,
            n_controls=50,
            n_latent=4,
            effect_size=size,
            effect_sd=0.0,
            n_oracle=10,
        )

    full, half = make(3.0), make(1.5)
    assert not np.array_equal(full.X.toarray(), half.X.toarray())
    for name in NAMES:
        values = [
            evaluate(p, full[1::2].copy(), KEY, CONTROL, metrics=name).set_index("condition")["value"]["pooled"]
            for p in (full[::2].copy(), half[::2].copy())
        ]
        assert values[0] < values[1], name
