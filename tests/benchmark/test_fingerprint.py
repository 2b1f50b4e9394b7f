"""What makes two runs the same: values and code, not names."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pertvae as pv
from pertvae.benchmark._fingerprint import content, fingerprint


def test_known_classes_are_their_name():
    """Their code has a fingerprint of its own; a kept model is found again whatever else is asked."""
    assert content(pv.CPAVAE) == "pertvae.models.samsvae._cpavae.CPAVAE"
    assert fingerprint({"a": (1, "x"), "b": None}) == fingerprint({"b": None, "a": [1, "x"]})


def net(scale):
    class Net:
        def predict(self):
            return SCALE

    source = {"scale": scale}
    exec("def predict(self):\n    return {scale}".format(**source), source)
    Net.predict = source["predict"]
    Net.__module__, Net.__qualname__ = "__main__", "Net"
    return Net


SCALE = 1
TABLE = pd.DataFrame(np.arange(4000.0).reshape(1000, 4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TABLE, TABLE.assign(**{"0": 0.0})),
        (TABLE, TABLE.where(TABLE != 2000, 1.0)),  # its repr is the same
        (TABLE[0], TABLE[0].where(TABLE[0] != 2000, 1.0)),
        (np.arange(5000), np.where(np.arange(5000) == 2500, 0, np.arange(5000))),
        (sp.identity(3, format="csr"), 2 * sp.identity(3, format="csr")),
        (partial(pv.reference.Linear, TABLE), partial(pv.reference.Linear, TABLE * 2)),
        (partial(pv.reference.Additive, space="pca"), partial(pv.reference.Additive, space="genes")),
        (lambda: pv.reference.Additive("pca", n_components=1), lambda: pv.reference.Additive("pca", n_components=30)),
        ({"a": 1}, {"a": 2}),
        (net(0), net(1)),
    ],
)
def test_other_values_and_other_code_are_told_apart(one, other):
    assert fingerprint({"x": one}) == fingerprint({"x": one})
    assert fingerprint({"x": one}) != fingerprint({"x": other})


def test_what_a_function_has_taken_in_counts():
    def make(n):
        return lambda: pv.reference.Additive("pca", n_components=n)

    assert fingerprint({"x": make(1)}) != fingerprint({"x": make(2)})
    assert fingerprint({"x": make(1)}) == fingerprint({"x": make(1)})
