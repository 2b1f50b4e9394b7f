"""Use an installed pertvae: every public name, one short training, one prediction."""

from __future__ import annotations

import sys
from pathlib import Path

import pertvae as pv

where = Path(pv.__file__).resolve()
assert where.is_relative_to(Path(sys.prefix).resolve()), f"not the installed package: {where}"
assert where.with_name("py.typed").is_file(), "py.typed is not in the wheel"
for name in pv.__all__:
    getattr(pv, name)

adata = pv.datasets.example()
pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
model = pv.SAMSVAE(adata)
model.train(max_epochs=2, enable_progress_bar=False)
label = next(c for c in adata.obs["perturbation"].astype(str).unique() if c != "control")
prediction = model.predict_perturbation([label], n_cells=10)
assert (prediction.obs["perturbation"] == label).sum() == 10
print(f"pertvae {pv.__version__} works outside the checkout: {prediction.n_obs} cells predicted")
