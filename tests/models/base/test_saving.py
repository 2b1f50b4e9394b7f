"""Model files that are missing, foreign, cut short, or written halfway."""

import pickle

import numpy as np
import pytest
import torch

import pertvae as pv
from pertvae.models import SAMSVAE
from pertvae.models.base import PerturbationModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained model and its folder."""
    adata = pv.datasets.simulate_screen(
        n_genes=20, n_perturbations=3, n_doubles=1, cells_per_perturbation=15, cells_per_double=10, n_controls=30,
        n_latent=2, n_oracle=10,
    )  # fmt: skip
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = SAMSVAE(adata, n_latent=2, n_hidden=8)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save(folder)
    return model, folder


@pytest.fixture
def copy(saved, tmp_path):
    """A model file that may be spoiled."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "model.pt").write_bytes((saved[1] / "model.pt").read_bytes())
    return folder


def test_missing_file(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.pt does not exist.*save\(\)"):
        SAMSVAE.load(tmp_path / "nowhere", saved[0].adata)
    with pytest.raises(FileNotFoundError, match=r"x_model\.pt"):
        SAMSVAE.load(saved[1], saved[0].adata, prefix="x_")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(saved, copy, share):
    path = copy / "model.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model\.pt is truncated or is not a saved model"):
        SAMSVAE.load(copy, saved[0].adata)


def test_foreign_files(saved, copy):
    path = copy / "model.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a saved model"):
        SAMSVAE.load(copy, saved[0].adata)
    for content in ({"weights": torch.zeros(2)}, [1, 2], torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="was not written by this package"):
            SAMSVAE.load(copy, saved[0].adata)


def test_file_of_another_class(saved, copy):
    content = torch.load(copy / "model.pt", weights_only=False)
    content["attr_dict"]["registry_"]["model_name"] = "OtherVAE"
    torch.save(content, copy / "model.pt")
    with pytest.raises(ValueError, match=r"holds a OtherVAE, not a SAMSVAE.*OtherVAE\.load"):
        SAMSVAE.load(copy, saved[0].adata)


def test_other_genes_than_those_of_the_training(saved, copy):
    with pytest.raises(ValueError, match="genes"):
        SAMSVAE.load(copy, saved[0].adata[:, ::-1].copy())


def test_a_failed_save_leaves_the_earlier_model(saved, copy, monkeypatch):
    model, _ = saved
    before = (copy / "model.pt").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(copy, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        model.save(copy.parent / "new")
    assert (copy / "model.pt").read_bytes() == before
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]  # no scratch folder, no new one


def test_other_files_of_the_folder_stay(saved, copy):
    (copy / "notes.txt").write_text("mine")
    saved[0].save(copy, overwrite=True)
    assert (copy / "notes.txt").read_text() == "mine"
    loaded = SAMSVAE.load(copy, saved[0].adata)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(key_added=None), saved[0].get_latent_representation(key_added=None)
    )


def test_the_base_class_is_not_a_model(saved):
    assert issubclass(SAMSVAE, PerturbationModel)
    assert "SAMSVAE" in repr(saved[0]) or "SAMSVAE" in saved[0]._model_summary_string
