"""What metrics need of the training cells: the center, and sums of single shifts from two halves."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.datasets import example
from pertvae.metrics import TrainingProfiles, evaluate, training_profiles

KEY, CONTROL = "perturbation", "control"


def screen(sizes: dict[str, int], genes: int = 30, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    x = rng.poisson(np.exp(rng.normal(1, 1, (len(labels), genes)))).astype(np.float32)
    obs = pd.DataFrame({KEY: labels}, index=[f"s{seed}c{i}" for i in range(len(labels))])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))


def means(adata: ad.AnnData) -> pd.DataFrame:
    x = adata.X.toarray().astype(float)
    logged = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    return pd.DataFrame(logged, columns=adata.var_names).groupby(adata.obs[KEY].to_numpy()).mean()


def test_two_halves_make_the_whole() -> None:
    # with even numbers of cells both halves weigh alike: their mean is the sum from all cells
    train = screen({CONTROL: 20, "A": 8, "B": 6, "C": 4, "A+B": 5})
    profiles = training_profiles(train, KEY, CONTROL, combinations=["B+A", "A+B+C", "A", CONTROL])
    m = means(train)
    pd.testing.assert_series_equal(profiles.center, m.drop(CONTROL).mean(), check_names=False)
    first, second = profiles.additive
    assert list(first.index) == list(second.index) == ["A+B", "A+B+C"]
    shifts = m - m.loc[CONTROL]
    for label in first.index:
        expected = shifts.loc[label.split("+")].sum()
        np.testing.assert_allclose((first.loc[label] + second.loc[label]) / 2, expected, atol=1e-12)
    assert (np.abs(first - second).mean() > 0.01).all()


def test_halves_are_of_singles_and_of_controls() -> None:
    # singles without variance: what differs between the halves is the control, and the other way round
    for still in ("A", CONTROL):
        train = screen({CONTROL: 30, "A": 30, "B": 30})
        x = train.X.toarray()
        rows = ((train.obs[KEY] == still) | (train.obs[KEY] == "B")).to_numpy()
        x[rows] = x[rows][0]
        train.X = sp.csr_matrix(x)
        first, second = training_profiles(train, KEY, CONTROL, combinations=["A+B"]).additive
        moving = 2 if still == "A" else 1  # the control is subtracted for each component
        assert 0.02 * moving < np.abs(first - second).mean(axis=None) < 1.5


def test_errors_of_the_halves_are_independent() -> None:
    train = screen({CONTROL: 400, "A": 60, "B": 60}, genes=2000)
    first, second = training_profiles(train, KEY, CONTROL, combinations=["A+B"]).additive
    # all groups are alike: the sums hold noise only
    assert abs(np.corrcoef(first.to_numpy().ravel(), second.to_numpy().ravel())[0, 1]) < 0.08


def test_halves_are_random_and_seeded() -> None:
    train = screen({CONTROL: 20, "A": 8, "B": 6})
    made = [training_profiles(train, KEY, CONTROL, combinations=["A+B"], seed=s).additive[0] for s in (0, 0, 1)]
    pd.testing.assert_frame_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max(axis=None) > 0.01
    # other combinations do not change the halves
    train = screen({CONTROL: 20, "A": 8, "B": 6, "C": 9})
    few, many = (training_profiles(train, KEY, CONTROL, combinations=c).additive[1] for c in (["A+B"], ["B+C", "A+B"]))
    pd.testing.assert_frame_equal(few, many.loc[["A+B"]])


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ({"A": 4, "B": 4, "C": 3, CONTROL: 9}, ["A+B"]),
        ({"A": 4, "B": 3, "A+B": 9, CONTROL: 9}, None),
        ({"A": 4, "B": 4, CONTROL: 3}, None),
        ({"A": 4, "B": 4}, None),
    ],
)
def test_too_few_cells_give_no_sum(sizes: dict[str, int], left: list[str] | None) -> None:
    profiles = training_profiles(screen(sizes), KEY, CONTROL, combinations=["A+B", "A+C", "A", "A+X"])
    if left is None:
        assert profiles.additive is None
    else:
        assert list(profiles.additive[0].index) == left
    assert profiles.center.notna().all()


def test_errors() -> None:
    train = screen({"A": 5, CONTROL: 5})
    with pytest.raises(TypeError, match="Series"):
        training_profiles(pd.Series([1.0]), KEY, CONTROL, combinations=[])
    with pytest.raises(KeyError, match="not a column of train.obs"):
        training_profiles(train, "label", CONTROL, combinations=[])
    with pytest.raises(ValueError, match="no perturbed cells"):
        training_profiles(train[train.obs[KEY] == CONTROL], KEY, CONTROL, combinations=[])
    with pytest.raises(KeyError, match="layer='counts'"):
        training_profiles(train, KEY, CONTROL, combinations=[], layer="counts")


# -------------------------------------------------------------------------------------------- in evaluate(train=...)

METRICS = ["pearson_delta_perturbed", "interaction_auroc"]


@pytest.fixture(scope="module")
def thirds() -> list[ad.AnnData]:
    """Training, predicted and observed cells, disjoint."""
    adata = example()
    return [adata[i::3].copy() for i in range(3)]


def test_cells_and_profiles_are_the_same(thirds) -> None:
    train, predicted, observed = thirds
    pairs = [c for c in train.obs[KEY].unique() if "+" in c]
    expected = evaluate(predicted, observed, KEY, CONTROL, metrics=METRICS, train=train)
    made = training_profiles(train, KEY, CONTROL, combinations=pairs)
    pd.testing.assert_frame_equal(evaluate(predicted, observed, KEY, CONTROL, metrics=METRICS, train=made), expected)
    # labels and genes are matched by name
    turned = ["+".join(reversed(label.split("+"))) for label in made.additive[0].index]
    first, second = (t.set_axis(turned, axis=0).iloc[::-1, ::-1] for t in made.additive)
    mixed = TrainingProfiles(made.center.iloc[::-1], (first, second))
    pd.testing.assert_frame_equal(evaluate(predicted, observed, KEY, CONTROL, metrics=METRICS, train=mixed), expected)
    # singles have no sum, and a combination without one is no reason to leave out the others
    values = expected[expected["metric"] == "interaction_auroc"].set_index("condition")["value"]
    np.testing.assert_array_equal(values.isna(), [c not in pairs and c != "pooled" for c in values.index])
    one = TrainingProfiles(made.center, tuple(t.loc[pairs[:1]] for t in made.additive))
    again = evaluate(predicted, observed, KEY, CONTROL, metrics="interaction_auroc", train=one)
    assert again.set_index("condition")["value"].dropna().index.to_list() == [pairs[0], "pooled"]


def test_genes_are_those_of_the_prediction(thirds) -> None:
    train, predicted, observed = thirds
    few, genes = predicted[:, 50:].copy(), predicted.var_names[100:]
    expected = evaluate(few, observed, KEY, CONTROL, metrics=METRICS, train=train[:, 50:].copy(), genes=genes)
    found = evaluate(few, observed, KEY, CONTROL, metrics=METRICS, train=train, genes=genes)
    pd.testing.assert_frame_equal(found, expected)


def test_reasons_for_leaving_out(thirds) -> None:
    train, predicted, observed = thirds
    center = training_profiles(train, KEY, CONTROL, combinations=[]).center
    for given, why in (
        (center, "holds no such sums"),
        (None, "pass train="),
        (train[~train.obs[KEY].str.match(r"^P\d+$")].copy(), "no scored condition is a combination"),
    ):
        with pytest.warns(UserWarning, match=f"interaction_auroc needs sums of the training shifts.*{why}"):
            table = evaluate(predicted, observed, KEY, CONTROL, train=given)
        assert "interaction_auroc" not in set(table["metric"])
        with pytest.raises(ValueError, match=f"interaction_auroc needs.*{why}"):
            evaluate(predicted, observed, KEY, CONTROL, metrics="interaction_auroc", train=given)
    made = training_profiles(train[:, 1:].copy(), KEY, CONTROL, combinations=list(observed.obs[KEY].unique()))
    made = TrainingProfiles(center, made.additive)
    with pytest.raises(KeyError, match="train lacks 1 of the predicted genes"):
        evaluate(predicted, observed, KEY, CONTROL, metrics="interaction_auroc", train=made)
    with pytest.raises(TypeError, match="dict"):
        evaluate(predicted, observed, KEY, CONTROL, metrics="l2_profile", train={})
