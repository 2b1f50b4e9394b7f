"""The Hill response against its formula, at its ends, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pertvae.nn import HillResponse


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
