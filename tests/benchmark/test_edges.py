"""Screens and arguments that are a little odd."""

import pandas as pd
import pytest

import pertvae as pv

SMALL = {"n_folds": 1, "n_cells": 40, "progress": False, "references": ["NoChange", "Mean"]}


@pytest.fixture
def singles(screen):
    """Single perturbations and controls."""
    return screen[~screen.obs["perturbation"].str.contains("+", regex=False)].copy()


def test_a_context_without_controls_is_left_out_and_named(singles):
    context = ["x"] * singles.n_obs
    perturbed = (singles.obs["perturbation"] == "P001").to_numpy()
    singles.obs["context"] = pd.Series(context, singles.obs_names).where(~perturbed, "no controls")
    result = pv.benchmark.run(
        singles, [], "random", "perturbation", "control", labels_key="context", metrics=["l2_profile"], **SMALL
    )
    assert (result.table["status"] == "ok").all()
    assert set(result.table["context"]) == {"x"}
    assert "P001 | no controls (no training controls)" in str(result.settings["left_out"])


def test_names_with_a_slash(screen, stand_in, tmp_path):
    result = pv.benchmark.run(
        screen, {"net/1": stand_in}, "unseen_combination", "perturbation", "control", seeds=[0], cache_dir=tmp_path,
        metrics=["l2_profile"], **SMALL,
    )  # fmt: skip
    page = result.save(tmp_path / "out")
    assert "net/1" in page.read_text()
    assert list((tmp_path / "out" / "figures").glob("conditions_*net_1.png"))


def test_something_else_called_truth(screen, tmp_path):
    screen = screen.copy()
    screen.uns["truth"] = {"measured": "yes"}
    result = pv.benchmark.run(
        screen, [], "unseen_combination", "perturbation", "control", metrics=["l2_profile"], **SMALL
    )
    assert "oracle" not in set(result.table["model"])


def test_points_of_the_paired_figure_are_named(screen, stand_in):
    from pertvae.benchmark._figures import paired_figure

    result = pv.benchmark.run(
        screen, {"net": stand_in}, "unseen_combination", "perturbation", "control", seeds=[0], metrics=["l2_profile"],
        **SMALL,
    )  # fmt: skip
    figure = paired_figure(result, "unseen_combination", "net", "Mean")
    written = {t.get_text() for t in figure.axes[0].texts}
    assert written
    assert written <= set(result.units["condition"])


def test_one_condition_and_metrics_that_need_more(singles, tmp_path):
    one = singles[singles.obs["perturbation"].isin(["control", "P001"])].copy()
    result = pv.benchmark.run(one, [], "random", "perturbation", "control", metrics=["discrimination_score"], **SMALL)
    assert result.summary().empty
    assert result.dynamic_range().empty
    assert "Nothing could be scored" in result.save(tmp_path / "out").read_text()


def test_classes_of_combinations_are_schemes_of_their_own(screen, tmp_path):
    options = {**SMALL, "cache_dir": tmp_path, "metrics": ["l2_profile"]}
    result = pv.benchmark.run(
        screen, [], ["random", "unseen_combination"], "perturbation", "control",
        split_kwargs={"seen": ["2/2", "1/2", "0/2"], "test_fraction": 0.3}, **options,
    )  # fmt: skip
    classes = {f"unseen_combination {c}": {c} for c in ("2/2", "1/2", "0/2")}
    assert result.schemes == ["random", *classes]
    found = result.table[result.table["condition"] != "pooled"].groupby("scheme")["seen"].unique()
    assert {name: set(found[name]) for name in classes} == classes
    alone = pv.benchmark.run(
        screen,
        [],
        "unseen_combination",
        "perturbation",
        "control",
        split_kwargs={"seen": "1/2", "test_fraction": 0.3},
        **options,
    )
    for name in ("NoChange", "Mean"):
        several = result.by_condition("l2_profile", "unseen_combination 1/2")[name]
        pd.testing.assert_series_equal(several, alone.by_condition("l2_profile")[name])
    page = result.save(tmp_path / "out").read_text()
    assert "never seen together (1/2 components alone in training)" in page
    with pytest.raises(ValueError, match="belongs to scheme='unseen_combination'"):
        pv.benchmark.run(screen, [], "random", "perturbation", "control", split_kwargs={"seen": "2/2"}, **options)
