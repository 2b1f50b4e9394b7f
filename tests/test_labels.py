"""Labels as people write them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertvae._labels import (
    LabelFormat,
    canonical_labels,
    check_labels,
    hint,
    is_control,
    nearest_names,
    require_column,
    unknown_components,
)

PLUS = LabelFormat.create("ctrl")


@pytest.mark.parametrize(
    ("label", "canonical"),
    [
        ("A", "A"),
        ("B+A", "A+B"),
        ("A+B", "A+B"),
        ("A+ctrl", "A"),
        ("ctrl+A", "A"),
        ("ctrl", "ctrl"),
        ("ctrl+ctrl", "ctrl"),
        ("A+A", "A"),
        ("C+A+B+A", "A+B+C"),
        (" A + B ", "A+B"),
        ("\tB +A\n", "A+B"),
        ("\u00a0A", "A"),
        ("β-catenin+α-syn", "α-syn+β-catenin"),
        ("A/1+A|1", "A/1+A|1"),
        ("10+9", "10+9"),
        ("Ctrl", "Ctrl"),  # case matters: Ctrl may be a gene
        ("a+B", "B+a"),
    ],
)
def test_canonical(label, canonical):
    assert PLUS.canonical(label) == canonical
    assert PLUS.canonical(PLUS.canonical(label)) == canonical


def test_labels_that_are_not_text():
    assert PLUS.canonical(7) == "7"
    assert PLUS.components(np.int64(7)) == ("7",)
    assert PLUS.components(True) == ("True",)


def test_several_controls_have_one_canonical_name():
    fmt = LabelFormat.create(["NT1", " NT2 "])
    assert fmt.canonical("NT2") == "NT1"
    assert fmt.canonical("NT2+NT1") == "NT1"
    assert fmt.canonical("A+NT2") == "A"


@pytest.mark.parametrize(
    ("sep", "label", "components"),
    [
        ("_", "A_B", ("A", "B")),
        (",", "A, B", ("A", "B")),
        (" + ", "IFN-a+b + TNF", ("IFN-a+b", "TNF")),
        ("::", "a:b::c", ("a:b", "c")),
        (None, "A+B", ("A+B",)),
        (None, " (+)-JQ1 ", ("(+)-JQ1",)),
    ],
)
def test_separators(sep, label, components):
    assert LabelFormat.create("ctrl", sep).components(label) == components


def test_a_label_without_separator_joins_only_itself():
    fmt = LabelFormat.create("DMSO", None)
    assert fmt.canonical("IFN+TNF") == "IFN+TNF"
    assert fmt.canonical("DMSO") == "DMSO"


@pytest.mark.parametrize("label", ["A++B", "+A", "A+", "+", "A+ +B"])
def test_empty_components_are_an_error(label):
    with pytest.raises(ValueError, match="empty component.*sep=None"):
        PLUS.components(label)


def test_bad_formats():
    for arguments, message in (
        (([],), "control is empty"),
        (("a+b",), r"'a\+b'.*separator '\+'"),
        (("ctrl", ""), "sep is the empty string"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelFormat.create(*arguments)
    assert LabelFormat.create("a+b", None).components("a+b") == ()


names = st.text(st.characters(blacklist_characters="+", blacklist_categories=("Z", "C")), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(names.filter(lambda n: n != "ctrl"), min_size=1, max_size=4), st.randoms())
def test_order_repeats_and_controls_do_not_matter(parts, random):
    written = [*parts, random.choice(parts), "ctrl"]
    random.shuffle(written)
    assert PLUS.canonical("+".join(written)) == "+".join(sorted(set(parts)))
    assert PLUS.components(PLUS.canonical("+".join(written))) == tuple(sorted(set(parts)))


# ---------------------------------------------------------------- doses


@pytest.mark.parametrize(
    ("label", "dose", "expected"),
    [
        ("A", 2.5, {"A": 2.5}),
        ("A+B", 2, {"A": 2.0, "B": 2.0}),
        ("B+A", "1.0+0.5", {"B": 1.0, "A": 0.5}),  # aligned with the label as written, not as sorted
        ("A+ctrl+B", "1+9+2", {"A": 1.0, "B": 2.0}),
        ("A+B", "0.5", {"A": 0.5, "B": 0.5}),
        ("A+B", " 1e-3 + 2 ", {"A": 0.001, "B": 2.0}),
        ("A+B", "0+1", {"B": 1.0}),
        ("A", 0, {}),
        ("A+A", "2+2", {"A": 2.0}),
        ("ctrl", "nan", {}),
        ("ctrl", -3, {}),
        ("A", np.float32(0.5), {"A": 0.5}),
        ("A", np.int64(3), {"A": 3.0}),
    ],
)
def test_doses(label, dose, expected):
    assert PLUS.doses(label, dose) == expected


@pytest.mark.parametrize(
    ("label", "dose", "message"),
    [
        ("A", -1, r"-1\.0 of 'A'"),
        ("A+B", "1+-2", r"-2\.0 of 'B'"),
        ("A", "inf", "inf of 'A'"),
        ("A", float("nan"), "nan of 'A'"),
        ("A", "low", "'low'.*'A'.*not a number"),
        ("A+B", "1+2+3", r"2 components.*'1\+2\+3' has 3"),
        ("A+A", "1+2", "'A' two doses"),
    ],
)
def test_dose_errors(label, dose, message):
    with pytest.raises(ValueError, match=message):
        PLUS.doses(label, dose)


# ---------------------------------------------------------------- columns


def test_check_labels_merges_white_space():
    labels = check_labels(pd.Series(["A", "A ", "B", " A"]), "p")
    assert list(labels) == ["A", "A", "B", "A"]
    assert list(labels.categories) == ["A", "B"]
    assert list(check_labels(pd.Series(pd.Categorical(["B"], categories=["A", "B"])), "p")) == ["B"]


def test_missing_labels_are_counted():
    values = pd.Series(["A", None, np.nan, "", "  "], index=list("vwxyz"))
    with pytest.raises(ValueError, match=r"obs\['p'\] has 4 missing labels, first in cells 'w', 'x', 'y', 'z'"):
        check_labels(values, "p")
    with pytest.raises(ValueError, match="2 missing"):
        check_labels(pd.Series([np.nan, np.nan]), "p")


def test_canonical_labels_keep_index_and_name():
    values = pd.Series(["B+A", "ctrl", "A+B", "NT"], index=list("wxyz"), name="guide")
    result = canonical_labels(values, ["ctrl", "NT"])
    assert result.tolist() == ["A+B", "ctrl", "A+B", "ctrl"]
    assert result.index.tolist() == list("wxyz")
    assert result.name == "guide"
    assert list(result.cat.categories) == ["A+B", "ctrl"]
    assert is_control(values, ["ctrl", "NT"]).tolist() == [False, True, False, True]
    assert canonical_labels(values, "ctrl", None).tolist() == ["B+A", "ctrl", "A+B", "NT"]


# ---------------------------------------------------------------- hints


def test_nearest_names():
    assert nearest_names("gata1", ["KLF1", "GATA1", "GATA2"])[0] == "GATA1"
    assert nearest_names("zzz", ["KLF1"]) == []
    assert hint("gata1", ["KLF1", "GATA1"]) == " Did you mean 'GATA1'?"
    assert hint("zzz", ["KLF1", "B"]) == " Available: 'KLF1', 'B'."
    assert "(30 in all)" in hint("zzz", [f"gene{i}" for i in range(30)])
    assert "nothing to choose" in hint("a", [])


def test_require_column():
    frame = pd.DataFrame({"perturbation": [1]})
    require_column(frame, "perturbation", "adata.obs", "perturbation_key")
    with pytest.raises(KeyError, match=r"perturbation_key='pertubation' is not a column of adata\.obs.*'perturbation'"):
        require_column(frame, "pertubation", "adata.obs", "perturbation_key")


def test_unknown_components():
    text = unknown_components({"KLF1+GATA3": ["KLF1", "GATA3"], "Z": ["Z"]}, ["KLF1", "GATA1"])
    assert "'GATA3' (in 'KLF1+GATA3'). Did you mean 'GATA1'" in text
    assert "'Z'." in text
    assert "'KLF1' (in" not in text
