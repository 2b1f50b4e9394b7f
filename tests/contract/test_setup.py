"""Every form of data a model can be registered with."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from mudata import MuData

from pertvae.models.base import PerturbationModel

from ._screens import COMPONENTS, UNSEEN, assert_same, block, dense, design, fit, frozen, register, screen

STORAGE = ["dense", "layer", "csr_array", "csc", "backed", "backed_dense", "mudata", "mudata_obs", "float64"]


def stored(adata, how, folder):
    """Return the same counts in another form, and the setup arguments that name it."""
    if how == "dense":
        adata.X = adata.X.toarray()
    elif how == "layer":
        adata.layers["counts"] = adata.X
        adata.X = sp.csr_matrix(adata.X.power(0.5))
        return adata, {"layer": "counts"}
    elif how == "csr_array":
        adata.X = sp.csr_array(adata.X)
    elif how == "csc":
        adata.X = adata.X.tocsc()
    elif how == "float64":
        adata.X = adata.X.astype(np.float64)
    elif how.startswith("backed"):
        if how == "backed_dense":
            adata.X = adata.X.toarray()
        adata.write_h5ad(folder / "screen.h5ad")
        return ad.read_h5ad(folder / "screen.h5ad", backed="r"), {}
    elif how.startswith("mudata"):
        protein = ad.AnnData(np.ones((adata.n_obs, 3), np.float32), obs=adata.obs[[]].copy())
        protein.var_names = ["p0", "p1", "p2"]
        data = MuData({"rna": adata, "protein": protein})
        if how == "mudata_obs":
            data.obs["perturbation"] = adata.obs["perturbation"]
            return data, {"modalities": {"perturbation_key": None}}
        return data, {}
    return adata, {}


@pytest.fixture(scope="module")
def plain(case):
    """The model on CSR counts in X."""
    return fit(case, screen())


@pytest.mark.parametrize("how", STORAGE)
@pytest.mark.filterwarnings("ignore:.*stored by columns")
def test_storage_does_not_matter(case, plain, how, tmp_path):
    data, setup = stored(screen(), how, tmp_path)
    model = fit(case, data, setup)
    for name, buffer in model.module.named_buffers():
        if name.startswith("leak"):  # made from the trained weights, which may differ
            continue
        np.testing.assert_allclose(buffer, plain.module.get_buffer(name), rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(model.library_effects_.effects, plain.library_effects_.effects, atol=1e-6)
    latent = model.get_latent_representation()
    assert np.isfinite(latent).all()
    # minibatches of backed data are sorted, so weights may differ: compare the getters at equal weights
    model.module.load_state_dict(plain.module.state_dict())
    np.testing.assert_allclose(
        model.get_latent_representation(), plain.get_latent_representation(), rtol=1e-4, atol=1e-5
    )
    assert f"X_{case.name}" in data.obsm
    predicted = model.predict_perturbation(UNSEEN, output="mean")
    np.testing.assert_allclose(
        block(predicted, UNSEEN), block(plain.predict_perturbation(UNSEEN, output="mean"), UNSEEN), rtol=1e-3, atol=1e-3
    )
    assert f"{case.name}_predictions" in data.uns
    assert list(predicted.var_names) == [f"gene{j}" for j in range(30)]
    counts = model.predict_perturbation("A", n_cells=50)
    assert sp.issparse(counts.X)
    assert (counts.X.data == np.floor(counts.X.data)).all()


@pytest.mark.parametrize("how", ["frame", "array", "csr", "csr_array"])
def test_a_design_matrix_equals_the_labels(case, plain, how):
    adata = screen()
    table = design(adata)
    kinds = {"frame": lambda x: x, "array": np.asarray, "csr": sp.csr_matrix, "csr_array": sp.csr_array}
    adata.obsm["design"] = kinds[how](table)
    model = fit(case, adata, {"perturbation_obsm_key": "design"})
    names = COMPONENTS if how == "frame" else ["0", "1", "2"]
    assert model.perturbation_names == names
    np.testing.assert_allclose(
        model.get_latent_representation(), plain.get_latent_representation(), rtol=1e-3, atol=1e-4
    )
    predicted = model.predict_perturbation(f"{names[1]}+{names[2]}", n_cells=5)
    assert predicted.obs["perturbation"].tolist() == [f"{names[1]}+{names[2]}"] * 5 + ["control"] * 5
    assert set(adata.obs["_scvi_condition"].astype(str)) == {
        "control",
        *names,
        f"{names[0]}+{names[1]}",
        f"{names[0]}+{names[2]}",
    }


@pytest.mark.parametrize("key", ["dose", "dose_text"])
def test_doses(case, key):
    adata = screen()
    model = fit(case, adata, {"dosage_key": key})
    doses = dense(adata.obsm["_scvi_perturbation"])
    for i, (label, dose) in enumerate(zip(adata.obs["perturbation"].astype(str), adata.obs[key], strict=True)):
        parts = label.split("+")
        amounts = [float(d) for d in dose.split("+")] if key == "dose_text" else [dose] * len(parts)
        expected = dict(zip(parts, amounts, strict=True))
        np.testing.assert_allclose(doses[i], [expected.get(c, 0.0) for c in COMPONENTS])
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(dense(model.predict_perturbation("A", n_cells=5).X)).all()


def test_covariates(case):
    adata = screen()
    covariates = {
        "batch_key": "batch",
        "labels_key": "cell_type",
        "categorical_covariate_keys": ["donor"],
        "continuous_covariate_keys": ["age"],
        "size_factor_key": "size_factor",
    }
    model = fit(case, adata, covariates)
    assert model.module.shape.n_covariates == 2 + 2 + 3 + 1
    predicted = model.predict_perturbation("A+B", n_cells=30, library_size="observed")
    source = adata.obs.loc[predicted.obs["source_cell"].astype(str)]
    for column in ("batch", "cell_type", "donor", "age"):
        assert predicted.obs[column].tolist() == source[column].tolist()
    # the size factor, twice the total counts, is the library
    totals = block(predicted, "A+B").sum(axis=1).to_numpy()
    assert np.median(totals / source["size_factor"].to_numpy()[:30]) == pytest.approx(1.0, abs=0.15)


def test_mudata_with_covariates_in_two_places(case):
    adata = screen()
    data = MuData({"rna": adata})
    data.obs["batch"] = adata.obs["batch"]
    model = fit(
        case, data, {"batch_key": "batch", "labels_key": "cell_type", "modalities": {"batch_key": None}}, split_key=None
    )
    predicted = model.predict_perturbation("A", labels="t1", batch="b0", n_cells=4)
    assert set(predicted.obs["batch"]) == {"b0"}
    assert set(predicted.obs["cell_type"]) == {"t1"}


@pytest.mark.parametrize("likelihood", ["poisson", "normal"])
def test_other_likelihoods(case, likelihood):
    if likelihood not in case.likelihoods:
        with pytest.raises(ValueError, match=likelihood):
            fit(case, screen(), model={"gene_likelihood": likelihood})
        return
    adata = screen()
    setup = {}
    if likelihood == "normal":
        adata.X = np.log1p(adata.X.toarray()) - 1.0
        setup = {"is_count_data": False}
        register(case, adata, **setup)
        with pytest.raises(ValueError, match="gene_likelihood='normal'"):
            case.cls(adata, **case.kwargs)
    model = fit(case, adata, setup, {"gene_likelihood": likelihood})
    predicted = model.predict_perturbation("A", n_cells=10)
    x = dense(predicted.X)
    assert np.isfinite(x).all()
    assert (x < 0).any() == (likelihood == "normal")
    assert np.isfinite(model.get_elbo())
    assert np.isfinite(model.get_perturbation_programs().loadings.to_numpy()).all()


def test_registration_adds_the_documented_keys_only(case):
    adata = screen()
    before = frozen(adata)
    register(case, adata, batch_key="batch")
    assert all(k.startswith("_scvi") for k in set(adata.obs) - set(before.obs))
    assert "_scvi_condition" in adata.obs
    assert [k for k in adata.obsm if not k.startswith("_scvi")] == []
    assert sp.issparse(adata.obsm["_scvi_perturbation"])
    assert adata.obsm["_scvi_perturbation"].dtype == np.float32
    assert all(k.startswith("_scvi") for k in adata.uns)
    for key in [k for k in adata.obs if k.startswith("_scvi")]:
        del adata.obs[key]
    for key in list(adata.obsm):
        del adata.obsm[key]
    for key in list(adata.uns):
        del adata.uns[key]
    assert_same(adata, before)


def test_labels_become_canonical_conditions(case):
    adata = screen()
    register(case, adata)
    conditions = adata.obs["_scvi_condition"].astype(str)
    label = adata.obs["perturbation"].astype(str)
    assert set(conditions[label == "B+A"]) == {"A+B"}
    assert set(conditions[label == "B+ctrl"]) == {"B"}
    assert case.cls(adata, **case.kwargs).perturbation_names == COMPONENTS


def test_the_class_says_what_it_offers(case):
    assert issubclass(case.cls, PerturbationModel)
    offered = case.cls.capabilities
    assert offered.basal
    assert set(offered.basal) <= {"control", "prior"}
    assert offered.latent_kinds[0] == "full"
    assert offered.program
    assert offered.inclusion


def test_an_untrained_model_says_so(case):
    adata = screen()
    register(case, adata)
    model = case.cls(adata, **case.kwargs)
    calls = [model.get_latent_representation, model.get_perturbation_programs]
    calls.append(lambda: model.predict_perturbation("A"))
    if case.cls.capabilities.credible_effects:
        calls.append(model.get_treatment_effects)
    if case.cls.capabilities.marginal_ll:
        calls.append(model.get_marginal_ll)
    for call in calls:
        with pytest.raises(RuntimeError, match="train"):
            call()


def test_a_model_needs_data_or_a_registry(case):
    with pytest.raises(ValueError, match=r"adata|registry"):
        case.cls()
    adata = screen()
    register(case, adata)
    registry = case.cls(adata, **case.kwargs).registry_
    assert case.cls(registry=registry, **case.kwargs).perturbation_names == COMPONENTS


def test_arguments_out_of_range_name_the_value(case):
    adata = screen()
    register(case, adata)
    with pytest.raises(ValueError, match="n_hidden=0"):
        case.cls(adata, **{**case.kwargs, "n_hidden": 0})
    with pytest.raises(ValueError, match="gene_likelihood='zinb'"):
        case.cls(adata, **{**case.kwargs, "gene_likelihood": "zinb"})
