"""The Hill response against its formula, at its ends, and its gradients; deviations of doses as categories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pertvae.nn import DoseDeviations, HillResponse


def hill(slope: list[float], midpoint: list[float], largest: list[float] | None = None) -> HillResponse:
    made = HillResponse(len(slope))
    with torch.no_grad():
        made.log_slope.copy_(torch.tensor(slope).log())
        made.log_midpoint.copy_(torch.tensor(midpoint).log())
    if largest is not None:
        made.set_largest_dose(torch.tensor(largest))
    return made


def test_is_the_formula_in_units_of_the_largest_dose() -> None:
    k, c, largest = [0.5, 1.0, 3.0], [0.1, 2.0, 0.4], [1.0, 10.0, 0.2]
    dose = np.linspace(0, 2, 9)[:, None] * largest
    u = dose / largest
    expected = u**k * (1 + np.power(c, k)) / (u**k + np.power(c, k))
    found = hill(k, c, largest)(torch.tensor(dose, dtype=torch.float32))
    np.testing.assert_allclose(found.detach(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("slope", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("midpoint", [1e-4, 1.0, 1e4])
def test_ends_are_exact_and_the_curve_rises(slope: float, midpoint: float) -> None:
    doses = torch.linspace(0, 1, 101)[:, None] * 7.0
    h = hill([slope], [midpoint], [7.0])(doses)[:, 0]
    assert h[0] == 0.0
    assert h[-1] == 1.0
    assert torch.isfinite(h).all()
    assert (h.diff() >= 0).all()
    assert (h[1:] > 0).any()


def test_slope_one_and_a_distant_midpoint_are_linear() -> None:
    doses = torch.linspace(0, 1.5, 16)[:, None]
    torch.testing.assert_close(hill([1.0], [1e5])(doses), doses, rtol=1e-4, atol=1e-5)


def test_components_are_chosen_by_index() -> None:
    made = hill([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    doses = torch.tensor([0.3, 0.7])
    whole = made(torch.tensor([0.3, 0.0, 0.7]))
    torch.testing.assert_close(made(doses, torch.tensor([0, 2])), whole[[0, 2]])


def test_gradients_are_finite_without_a_dose_and_right_with_one() -> None:
    made = hill([0.6, 2.0], [0.2, 3.0], [2.0, 5.0]).double()
    zero = made(torch.zeros(4, 2).double())
    zero.sum().backward()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    doses = torch.tensor([[0.0, 1.0], [0.5, 0.0], [2.0, 8.0]]).double()

    def response(slope: torch.Tensor, midpoint: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, {"log_slope": slope, "log_midpoint": midpoint}, (doses,))

    values = [p.detach().clone().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradcheck(response, values)


def test_penalty_is_the_density_of_the_shared_prior() -> None:
    k, c = np.array([0.3, 1.0, 4.0]), np.array([0.05, 1.0, 2.0])
    made = hill(list(k), list(c))
    density = stats.norm.logpdf(np.log(k), 0, 0.5) + stats.norm.logpdf(np.log(c), 0, 1.5)
    most = stats.norm.logpdf(0, 0, 0.5) + stats.norm.logpdf(0, 0, 1.5)
    np.testing.assert_allclose(made.penalty().detach(), most - density, rtol=1e-5, atol=1e-6)
    assert torch.equal(HillResponse(2).penalty(), torch.zeros(2))


def test_curves_are_in_the_units_of_the_doses() -> None:
    made = hill([2.0], [0.3], [50.0])
    curves = made.curves()
    assert math.isclose(float(curves["midpoint"].detach()), 15.0, rel_tol=1e-5)
    plateau = float(made(torch.tensor([1e9])).detach())
    torch.testing.assert_close(made(torch.tensor([15.0])).detach(), torch.tensor([plateau / 2]), rtol=1e-4, atol=0.0)


def test_what_was_never_given_keeps_dose_one() -> None:
    made = hill([2.0, 2.0], [0.3, 0.3], [0.0, 4.0])
    assert made.largest_dose.tolist() == [1.0, 4.0]
    assert made(torch.tensor([1.0, 4.0])).tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------ doses as categories

LEVELS = [(0, 0.1), (2, 4.0), (0, 3.0), (2, 1.0), (3, 1.0), (2, 9.0)]  # in any order
CELLS = {(0, float(np.float32(0.1))): 4, (0, 3.0): 12, (2, 4.0): 5, (2, 1.0): 15, (3, 1.0): 7, (1, 1.0): 3}
FREE = torch.tensor([True, True, True, True, False, False])


def deviations(prior_scale: float = 0.5) -> DoseDeviations:
    made = DoseDeviations(LEVELS, 3, prior_scale)
    made.set_cells(CELLS)
    torch.manual_seed(0)
    with torch.no_grad():
        made.loc.normal_()
        made.log_sd.normal_(-1, 0.3)
    return made


def test_only_doses_of_training_cells_deviate_and_not_single_ones() -> None:
    made = deviations()
    assert torch.equal(made.free, FREE)
    assert made.known.tolist() == [True] * 5 + [False]
    assert made.cells.tolist() == [4, 5, 12, 15, 7, 0]
    doses = torch.tensor([[0.0, 0, 0, 0], [0.1, 1, 1, 1], [3, 0, 4, 0], [0.2, 0, 9, 2]])
    assert made(doses).tolist() == [[0.0] * 6, [1.0, 0, 0, 1, 0, 0], [0, 1.0, 1, 0, 0, 0], [0.0] * 6]
    mean, sd = made.posterior_at(torch.tensor([2, 0, 3, 0, 2]), torch.tensor([1.0, 3.0, 1.0, 0.2, 9.0]))
    none = torch.zeros(3)
    torch.testing.assert_close(mean, torch.stack([made.loc[3], made.loc[2], none, none, none]))
    torch.testing.assert_close(sd, torch.stack([made.log_sd[3].exp(), made.log_sd[2].exp(), none, none, none]))


def test_draws_and_their_divergence() -> None:
    made = deviations()
    drawn, kl = made.sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), made.loc * FREE[:, None], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), made.log_sd.exp() * FREE[:, None], atol=0.02, rtol=0)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(made.loc, made.log_sd.exp()), normal(0.0, 0.5)).sum(-1)
    torch.testing.assert_close(kl, expected * FREE)


def test_sizes_and_evidence() -> None:
    made = deviations()
    shared = torch.randn(5, 3)
    size = made.size(shared)
    for component, levels in ((0, [0, 2]), (2, [1, 3])):
        cells = made.cells[levels][:, None]
        square = (cells * (shared[component] + made.loc[levels]).square()).sum(0) / cells.sum()
        torch.testing.assert_close(size[component], square.sqrt())
    for component in (1, 3, 4):
        torch.testing.assert_close(size[component], shared[component].abs())
    shifts = made.shifts(shared)
    torch.testing.assert_close(shifts[:3], shared[[1, 3, 4]])
    torch.testing.assert_close(shifts[3:], shared[[0, 2, 0, 2]] + made.loc[:4])
    mean, sd = made.loc.detach().numpy(), made.log_sd.exp().detach().numpy()
    each = stats.norm.logpdf(0, 0, 0.5) - stats.norm.logpdf(0, mean, sd)
    evidence = made.evidence(5).detach().numpy()
    np.testing.assert_allclose(evidence[[0, 2]], [each[[0, 2]].sum(0), each[[1, 3]].sum(0)], rtol=1e-4)
    assert (evidence[[1, 3, 4]] == 0).all()
    values = torch.rand(6, 3)
    largest = made.largest(torch.zeros(5, 3), values)
    torch.testing.assert_close(largest[[0, 2]], torch.stack([values[[0, 2]].amax(0), values[[1, 3]].amax(0)]))
    assert (largest[[1, 3, 4]] == 0).all()
