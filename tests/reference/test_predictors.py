import numpy as np
import pytest

from pertvae import reference
from pertvae._expression import mean_profile

KEYS = ("perturbation", "ctrl")


def shift_of(screen, label):
    rows = np.flatnonzero((screen.obs["perturbation"] == label).to_numpy())
    return mean_profile(screen.X, rows) - mean_profile(
        screen.X, np.flatnonzero((screen.obs["perturbation"] == "ctrl").to_numpy())
    )


def shift(reference_, label, **kwargs):
    return reference_.predict_shift(label, **kwargs).to_numpy()[0]


def test_no_change_and_mean(screen):
    assert not shift(reference.NoChange().fit(screen, *KEYS), "A+Zzz").any()
    conditions = [c for c in screen.obs["perturbation"].unique() if c != "ctrl"]
    expected = np.mean([shift_of(screen, c) for c in conditions], axis=0)
    mean = reference.Mean().fit(screen, *KEYS)
    np.testing.assert_allclose(shift(mean, "never+seen"), expected)
    assert not shift(mean, "ctrl").any()


def test_matching_mean_falls_back_by_component(screen):
    fitted = reference.MatchingMean().fit(screen, *KEYS)
    overall = shift(reference.Mean().fit(screen, *KEYS), "x")
    a, b = shift_of(screen, "A+ctrl"), shift_of(screen, "B")
    np.testing.assert_allclose(shift(fitted, "B+A"), (a + b) / 2)
    np.testing.assert_allclose(shift(fitted, "A"), a)
    np.testing.assert_allclose(shift(fitted, "A+E"), (a + overall) / 2)  # E occurs only inside C+E
    np.testing.assert_allclose(shift(fitted, "Y+Z"), overall)


@pytest.mark.parametrize("cls", [reference.Additive, reference.CalibratedAdditive])
def test_a_component_without_single_is_named(cls, screen):
    fitted = cls().fit(screen, *KEYS)
    with pytest.raises(KeyError, match="'E'.*only inside combinations.*RidgeAdditive"):
        fitted.predict_shift(["A+E"])
    screen.obs["perturbation"] = screen.obs["perturbation"].replace({"B": "KLF1"})
    fitted = cls().fit(screen, *KEYS)
    with pytest.raises(KeyError, match="Did you mean 'KLF1'"):
        fitted.predict_shift("KLF")
    with pytest.warns(UserWarning, match="'KLF' contribute nothing"):
        np.testing.assert_allclose(shift(fitted, "KLF+D", unseen="ignore"), shift(fitted, "D"))
    with pytest.warns(UserWarning, match="contribute nothing"):
        pred = fitted.predict_perturbation("KLF+D", unseen="ignore", n_cells=5)
    assert list(pred.uns["pertvae"]["ignored"]) == ["KLF"]


def test_ridge_learns_components_seen_only_in_combinations(screen):
    fitted = reference.RidgeAdditive(penalty=1e-6).fit(screen, *KEYS)
    np.testing.assert_allclose(shift(fitted, "C+E"), shift_of(screen, "C+E"), atol=1e-3)
    assert np.abs(shift(fitted, "E")).max() > 0.1
    with pytest.raises(KeyError, match="Unknown perturbation 'F'"):
        fitted.predict_shift("A+F")
    assert fitted.params_["penalty_by"] == "given"


def test_singles_alone_give_no_information_on_the_penalty(screen):
    singles = screen[~screen.obs["perturbation"].isin(["B+A", "A+C", "B+D", "C+E"])].copy()
    fitted = reference.RidgeAdditive().fit(singles, *KEYS)
    assert fitted.params_["penalty_by"] == "no shared components"
    np.testing.assert_allclose(shift(fitted, "B"), shift_of(singles, "B"), rtol=0.01)


def test_calibrated_says_how_it_chose(screen):
    fitted = reference.CalibratedAdditive().fit(screen, *KEYS)
    assert fitted.params_["chosen_by"] == "combinations"
    assert fitted.params_["n_combinations"] == 3  # C+E has no single of E
    fewer = screen[screen.obs["perturbation"] != "B+D"].copy()
    fitted = reference.CalibratedAdditive().fit(fewer, *KEYS)
    assert fitted.params_["chosen_by"] == "split halves"
    assert fitted.params_["scale"] == 1.0
    with pytest.raises(ValueError, match="single perturbations"):
        reference.CalibratedAdditive().fit(screen[screen.obs["perturbation"].isin(["ctrl", "B+A"])].copy(), *KEYS)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: reference.RidgeAdditive(penalty=-1), "penalty=-1"),
        (lambda: reference.RidgeAdditive(penalties=[]), "penalties=\\[\\]"),
        (lambda: reference.CalibratedAdditive(max_rank=0), "max_rank=0"),
    ],
)
def test_constructor_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
