"""What the plots show is what the tables hold; no figure leaks into pyplot."""

from types import SimpleNamespace

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from pertvae import pl
from pertvae._storage import write_tables


@pytest.fixture
def tables():
    names, latent, genes = ["A", "B", "A/C"], ["z0", "z1"], [f"g{i}" for i in range(8)]
    effects = pd.DataFrame([[2.0, 0.0], [0.0, -1.0], [1.5, 0.1]], names, latent)
    inclusion = pd.DataFrame([[0.9, 0.0], [0.1, 0.8], [0.7, 0.2]], names, latent)
    loadings = pd.DataFrame(np.zeros((2, 8)), latent, genes)
    loadings.loc["z0", ["g3", "g5"]] = [3.0, -4.0]
    return SimpleNamespace(effects=effects, inclusion=inclusion, loadings=loadings)


@pytest.fixture
def effects():
    mean = pd.DataFrame([[1.0, -2.0, 0.1], [0.2, 0.1, 0.0]], ["A", "B"], ["g0", "g1", "g2"])
    return SimpleNamespace(mean=mean, lower=mean - 0.5, upper=mean + 0.5)


@pytest.fixture
def history():
    epochs = pd.Index(range(6), name="epoch")
    values = np.array([900.0, 300, 250, 240, 235, 234])
    keys = [f"{m}_{s}" for m in ("elbo", "kl_local", "kl_global") for s in ("train", "validation")]
    return {k: pd.DataFrame({k: values}, index=epochs) for k in [*keys, "train_loss_epoch"]}


def right_labels(axes):
    return [t.get_text() for t in axes.child_axes[0].get_yticklabels()]


def test_programs_heatmap_holds_the_effects_in_the_order_of_its_labels(tables):
    axes = pl.programs(tables).axes[0]
    rows = [t.get_text() for t in axes.get_yticklabels()]
    columns = [t.get_text() for t in axes.get_xticklabels()]
    assert sorted(columns) == ["A", "A/C", "B"]
    np.testing.assert_allclose(axes.images[0].get_array(), tables.effects.loc[columns, rows].T)
    # colour is symmetric: white means no effect
    assert axes.images[0].norm.vmin == -2.0
    assert axes.images[0].norm.vmax == 2.0


def test_programs_dots_stand_where_inclusion_is_above_the_threshold(tables):
    axes = pl.programs(tables, ["A", "B", "A/C"], inclusion_threshold=0.75).axes[0]
    rows = [t.get_text() for t in axes.get_yticklabels()]
    dots = {("ABC"[int(x)], rows[int(y)]) for x, y in axes.collections[0].get_offsets()}
    assert dots == {("A", "z0"), ("B", "z1")}


def test_programs_names_the_genes_with_the_largest_loading(tables):
    axes = pl.programs(tables, n_genes=2).axes[0]
    rows = [t.get_text() for t in axes.get_yticklabels()]
    assert right_labels(axes)[rows.index("z0")] == "g5\N{DOWNWARDS ARROW}  g3\N{UPWARDS ARROW}"


def test_programs_reads_what_a_model_stored(tables, tmp_path):
    adata = ad.AnnData(np.zeros((2, 8)))
    write_tables(adata.uns, "samsvae_programs", vars(tables))
    adata.write_h5ad(tmp_path / "a.h5ad")
    stored = pl.programs(ad.read_h5ad(tmp_path / "a.h5ad"), ["A", "A/C"]).axes[0]
    direct = pl.programs(tables, ["A", "A/C"]).axes[0]
    np.testing.assert_allclose(stored.images[0].get_array(), direct.images[0].get_array())
    assert [t.get_text() for t in stored.get_xticklabels()] == ["A", "A/C"]


def test_programs_limits_rows_and_columns_to_the_strongest(tables):
    axes = pl.programs(tables, n_perturbations=1, n_programs=1).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["A"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["z0"]


def test_treatment_effects_points_and_intervals(effects):
    axes = pl.treatment_effects(effects, "A", n_genes=2).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["g1", "g0"]
    points = axes.collections[1].get_offsets()
    np.testing.assert_allclose(points[:, 0], [-2.0, 1.0])
    segments = [np.asarray(s)[:, 0] for s in axes.collections[0].get_segments()]
    np.testing.assert_allclose(segments, [[-2.5, -1.5], [0.5, 1.5]])


def test_treatment_effects_fills_only_intervals_without_zero(effects):
    axes = pl.treatment_effects(effects, "A", genes=["g0", "g2"]).axes[0]
    face = axes.collections[1].get_facecolors()
    assert not np.allclose(face[0], 1.0)
    assert np.allclose(face[1], 1.0)


def test_treatment_effects_default_takes_the_largest_first(effects):
    assert [a.get_title() for a in pl.treatment_effects(effects).axes] == ["A", "B"]


def test_training_curves_draws_both_splits(history):
    axes = pl.training_curves(SimpleNamespace(history=history)).axes
    assert [a.get_title() for a in axes] == ["negative ELBO", "KL of the cells", "KL of the effects (total)"]
    for line in axes[0].lines:
        np.testing.assert_allclose(line.get_ydata(), history["elbo_train"].iloc[:, 0])
    # the steep first epoch does not set the scale
    assert axes[0].get_ylim()[1] < 400


def test_own_axes_and_files(history, tables, effects, tmp_path):
    figure = Figure()
    own = figure.add_subplot()
    assert pl.training_curves(history, ["elbo"], ax=own, save=tmp_path / "x" / "curve.svg") is figure
    assert (tmp_path / "x" / "curve.svg").read_text().count("<svg") == 1
    assert pl.treatment_effects(effects, "A", ax=Figure().add_subplot()).axes[0].get_title() == "A"
    assert pl.programs(tables, ax=Figure().add_subplot()).axes[0].images


def test_pyplot_knows_nothing_of_the_figures(history, tables, effects):
    before = plt.get_fignums()
    pl.training_curves(history)
    pl.programs(tables)
    pl.treatment_effects(effects)
    assert plt.get_fignums() == before


def test_labels_with_mathematics_signs_are_printed(effects, tmp_path):
    effects.mean.index = effects.lower.index = effects.upper.index = pd.Index(["$A_{", "B"])
    pl.treatment_effects(effects, save=tmp_path / "a.png")


def test_errors_name_the_fix(history, tables, effects):
    with pytest.raises(KeyError, match=r"'BB' has no programs.*Did you mean 'B'"):
        pl.programs(tables, ["BB"])
    with pytest.raises(KeyError, match=r"samsvae_programs.*get_perturbation_programs"):
        pl.programs(ad.AnnData(np.zeros((2, 2))))
    with pytest.raises(TypeError, match="get_perturbation_programs"):
        pl.programs(3)
    with pytest.raises(KeyError, match="'g9' has no treatment effects"):
        pl.treatment_effects(effects, genes=["g9"])
    with pytest.raises(KeyError, match="get_treatment_effects"):
        pl.treatment_effects(ad.AnnData(np.zeros((2, 2))))
    with pytest.raises(ValueError, match="one perturbation but 2"):
        pl.treatment_effects(effects, ["A", "B"], ax=Figure().add_subplot())
    with pytest.raises(ValueError, match=r"model\.train"):
        pl.training_curves({})
    with pytest.raises(KeyError, match="'elb' was not recorded"):
        pl.training_curves(history, ["elb"])


@pytest.fixture
def scores():
    """Two models with two seeds and two conditions, a reference without seeds; one fit failed."""
    rows = []
    for fraction in (0.0, 0.5, 1.0):
        for condition in ("A+B", "A+C"):
            for model, seeds in (("net", (0, 1)), ("other", (0, 1)), ("Additive", (-1,))):
                for seed in seeds:
                    value = {"net": 3 - fraction, "other": 2.5, "Additive": 2.0}[model] + 0.2 * max(seed, 0)
                    value += 0.5 if condition == "A+C" else -0.5
                    kind = "reference" if model == "Additive" else "model"
                    rows.append((fraction, model, kind, seed, condition, "l2_profile", value, "ok"))
    rows.append((0.5, "net", "model", 2, "", np.nan, np.nan, "failed"))
    columns = ["train_fraction", "model", "kind", "seed", "condition", "metric", "value", "status"]
    return pd.DataFrame(rows, columns=columns)


def test_data_efficiency_draws_means_over_seeds_and_their_range(scores):
    figure = pl.data_efficiency(scores)
    axes = figure.axes[0]
    net, other, additive = axes.containers
    np.testing.assert_allclose(net.lines[0].get_xydata(), [[0, 3.1], [0.5, 2.6], [1, 2.1]])
    bars = [np.asarray(s)[:, 1] for s in net.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[3.0, 3.2], [2.5, 2.7], [2.0, 2.2]])
    np.testing.assert_allclose(additive.lines[0].get_ydata(), 2.0)
    assert not additive.lines[2]  # no seeds, no bars
    assert net.lines[0].get_linestyle() == "-"
    assert additive.lines[0].get_linestyle() == "--"
    # told apart without colour
    assert net.lines[0].get_marker() != other.lines[0].get_marker()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["other", "net", "Additive"]  # as the curves end
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0%", "50%", "100%"]
    assert "lower is better" in axes.get_ylabel()


def test_data_efficiency_takes_results_and_names_what_is_missing(scores, tmp_path):
    figure = pl.data_efficiency(SimpleNamespace(table=scores), "l2_profile", models=["net"], save=tmp_path / "e.png")
    assert len(figure.axes[0].containers) == 1
    assert (tmp_path / "e.png").is_file()
    own = Figure().add_subplot()
    assert pl.data_efficiency(scores, ax=own, ylabel="nats") is own.get_figure()
    assert own.get_ylabel() == "nats"
    with pytest.raises(KeyError, match="'l2_profle'.*'l2_profile'"):
        pl.data_efficiency(scores, "l2_profle")
    with pytest.raises(KeyError, match="'nett'.*'net'"):
        pl.data_efficiency(scores, models=["nett"])
    with pytest.raises(KeyError, match="no column 'train_fraction'"):
        pl.data_efficiency(scores.drop(columns="train_fraction"))
    with pytest.raises(ValueError, match="no scores"):
        pl.data_efficiency(scores[scores["status"] == "failed"])
