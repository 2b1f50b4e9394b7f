import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from pertvae import reference
from pertvae._expression import log1p_cp10k, mean_profile
from pertvae.reference._render import Renderer, _mean_log1p, overdispersion

KEYS = ("perturbation", "ctrl")


def simulated(n, rate, alpha, seed, sd=0.4, size=1500):
    rng = np.random.default_rng(seed)
    library = rng.lognormal(np.log(size), sd, (n, 1))
    mean = library * rate / rate.sum()
    return sp.csr_matrix(rng.poisson(mean * rng.gamma(1 / alpha, alpha, mean.shape)).astype(np.float32))


def variances(x):
    y = log1p_cp10k(x)
    return np.asarray(y.power(2).mean(axis=0)).ravel() - np.asarray(y.mean(axis=0)).ravel() ** 2


def test_the_curve_is_the_mean_of_negative_binomial_cells():
    alpha, libraries = 0.5, np.array([300.0, 2000.0, 9000.0])
    curve = _mean_log1p(alpha, libraries)
    rates = np.geomspace(1e-9, 1.0, 200)
    counts = np.arange(0, 60_000)
    for k in (60, 110, 140, 170):
        exact = np.mean(
            [
                stats.nbinom.pmf(counts, 1 / alpha, 1 / (1 + alpha * rates[k] * size)) @ np.log1p(1e4 * counts / size)
                for size in libraries
            ]
        )
        assert curve[k] == pytest.approx(exact, rel=0.03)
    assert (np.diff(curve) > 0).all()


def test_overdispersion_is_recovered():
    rng = np.random.default_rng(0)
    rate, alpha = rng.lognormal(0, 1, 200), rng.choice([0.1, 0.8], 200)
    x = simulated(3000, rate, alpha, 1, size=4000)
    estimate = overdispersion(x)
    clear = rate / rate.sum() * 4000 > 5
    assert np.corrcoef(np.log(estimate[clear]), np.log(alpha[clear]))[0, 1] > 0.95
    assert np.median(estimate[clear] / alpha[clear]) == pytest.approx(1, abs=0.15)


def test_cells_have_the_mean_and_the_variance_of_real_ones():
    """Controls carry the shift of a perturbation; the perturbed population itself is the truth."""
    rng = np.random.default_rng(0)
    genes = 200
    rate, alpha = rng.lognormal(0, 1.2, genes), rng.choice([0.15, 0.6], genes)
    rate[-10:] = 0
    after = rate * np.exp(rng.normal(0, 0.8, genes) * (rng.random(genes) < 0.5))
    after[-10:] = np.geomspace(0.05, 3, 10)
    control, perturbed = simulated(2000, rate, alpha, 1), simulated(4000, after, alpha, 2)
    profile, truth = mean_profile(control), mean_profile(perturbed)
    renderer = Renderer(control, profile, overdispersion(control))
    chosen = np.concatenate([np.arange(2000)] * 2)
    cells = renderer.cells(truth - profile, chosen, "A", 0)
    shift, got = truth - profile, mean_profile(cells) - profile
    assert np.linalg.norm(got - shift) < 0.07 * np.linalg.norm(shift)
    assert (got @ shift) / (shift @ shift) == pytest.approx(1, abs=0.03)
    assert got[-10:].sum() == pytest.approx(shift[-10:].sum(), rel=0.1)  # silent genes are switched on
    real, made = variances(perturbed), variances(cells)
    clear = real > 0.05
    assert np.quantile(made[clear] / real[clear], [0.1, 0.5, 0.9]) == pytest.approx([1, 1, 1], abs=0.2)
    library = np.asarray(cells.sum(axis=1) / control[chosen].sum(axis=1))
    assert np.median(library) == pytest.approx(1, abs=0.08)


def test_without_a_shift_cells_are_their_sources():
    control = simulated(300, np.geomspace(0.01, 3, 50), 0.3, 0)
    renderer = Renderer(control, mean_profile(control), overdispersion(control))
    assert (renderer.cells(np.zeros(50), np.arange(300), "A", 0) != control).nnz == 0


def test_odd_input_gives_counts():
    control = simulated(30, np.geomspace(0.01, 3, 50), 0.3, 0).tolil()
    control[3] = 0  # an empty cell
    control[:, 7] = 0
    control = sp.csr_matrix(control)
    profile = mean_profile(control)
    renderer = Renderer(control, profile, overdispersion(control))
    for shift in (np.full(50, -20.0), np.full(50, 20.0), -profile, np.where(np.arange(50) == 7, 9.0, 0.0)):
        q = renderer.proportions(shift)
        assert q.sum() == pytest.approx(1)
        assert (q >= 0).all()
        cells = renderer.cells(shift, np.arange(30), "A", 0)
        assert np.isfinite(cells.data).all()
        assert cells[3].sum() == 0


def test_cells_of_a_reference_follow_its_shift(screen):
    fitted = reference.RidgeAdditive(penalty=1e-6).fit(screen, *KEYS)
    pred = fitted.predict_perturbation(["A", "A+B"], n_cells=1500)
    for label in ("A", "A+B"):
        block = pred.X[((pred.obs["perturbation"] == label) & pred.obs["generated"]).to_numpy()]
        shift = fitted.predict_shift(label).to_numpy()[0]
        got = mean_profile(block) - fitted.control_profile_
        assert (got @ shift) / (shift @ shift) == pytest.approx(1, abs=0.1)
        assert np.corrcoef(got, shift)[0, 1] > 0.98
