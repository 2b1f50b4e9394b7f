"""The page: self-contained, escaped, the verdict first."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import pertvae as pv
from pertvae.benchmark import _page
from pertvae.benchmark._figures import figures


class Page(HTMLParser):
    """Collects tags and text, and checks that what opens also closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.texts = [], [], []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, stand_in_class):
    folder = tmp_path_factory.mktemp("saved")
    adata = pv.datasets.simulate_screen(
        n_genes=40, n_perturbations=8, n_doubles=6, cells_per_perturbation=20, cells_per_double=20, n_controls=60,
        n_latent=4, n_oracle=50,
    )  # fmt: skip
    labels = adata.obs["perturbation"].astype(str).str.replace("P001", "<b>P001 & $x_$")
    adata.obs["perturbation"] = pd.Categorical(labels)
    del adata.uns["truth"]
    result = pv.benchmark.run(
        adata, {"net<i>": stand_in_class}, "unseen_combination", "perturbation", "control", seeds=[0], n_folds=1,
        n_cells=40, references=["NoChange", "Additive"], progress=False, title="<script>alert(1)</script>",
    )  # fmt: skip
    return result, folder, result.save(folder)


def test_files(saved):
    result, folder, page = saved
    assert page == folder / "report.html"
    table = pd.read_csv(folder / "table.csv")
    assert len(table) == len(result.table)
    np.testing.assert_allclose(table["value"], result.table["value"])
    for name in figures(result):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()
    for name in ("summary.csv", "comparison.csv", "fits.csv", "settings.json"):
        assert (folder / name).is_file()


def test_page_needs_nothing_from_outside(saved):
    text = saved[2].read_text()
    page = Page(text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import", text)
    assert sum(tag == "img" for tag, _ in page.tags) == len(figures(saved[0]))
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_labels_are_escaped(saved):
    page = Page(saved[2].read_text())
    assert any("<script>alert(1)</script>" in t for t in page.texts)
    assert any("net<i>" in t for t in page.texts)
    assert not {"b", "i"} & {tag for tag, _ in page.tags}


def test_verdict_stands_first_and_settings_are_there(saved):
    result, _, path = saved
    page = Page(path.read_text())
    from pertvae.benchmark._report import verdicts

    first = verdicts(result)[0]
    assert re.search(r"net<i> (is better than|is worse than|shows no difference from) the best reference", first)
    headings = page.texts.index("Predicting combinations of perturbations that were never seen together")
    assert page.texts.index(first) < headings
    for needed in (result.settings["data"]["fingerprint"], result.settings["versions"]["scvi-tools"]):
        assert any(needed in t for t in page.texts)
    assert any("scoring genes" in t for t in page.texts)


def test_page_fits_narrow_screens(saved):
    page = Page(saved[2].read_text())
    meta = [a for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert meta[0]["content"].startswith("width=device-width")
    boxes = [a.get("class") for tag, a in page.tags if tag == "div"]
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert boxes.count("box") == tables + len(figures(saved[0]))


def test_figures_show_the_numbers(saved):
    result = saved[0]
    drawn = figures(result)
    names = [t.get_text() for t in drawn["scores_unseen_combination"].axes[0].get_yticklabels()]
    means = result.summary().query("metric == 'l2_profile'").set_index("model")["value"]
    assert names == list(means.sort_values().index)
    pairs = drawn["conditions_unseen_combination_net<i>"].axes[0].collections[0].get_offsets()
    matrix = result.by_condition()
    best = result.compare().query("best_reference")["reference"].iloc[0]
    np.testing.assert_allclose(sorted(pairs[:, 1]), sorted(matrix["net<i>"]))
    np.testing.assert_allclose(sorted(pairs[:, 0]), sorted(matrix[best]))


def test_table_cells_are_escaped():
    text = _page.table(["<a>"], [("x", ["<b>", ("<i>", "<u>")])])
    assert "<b>" not in text
    assert "&lt;i&gt;" in text
    assert "&lt;u&gt;" in text
