"""Few components of many: what each cell has, instead of products with the whole table of effects."""

from __future__ import annotations

from torch import Tensor


def active_components(doses: Tensor, max_active: int) -> tuple[Tensor, Tensor]:
    """Return the largest doses of each cell and their components, both ``(cells, max_active)``.

    Parameters
    ----------
    doses
        ``(cells, components)``, not negative.
    max_active
        Non-zero doses a cell has at most; more would be lost. Cells with fewer have zeros.
    """
    dose, index = doses.topk(max_active, dim=-1)
    return dose, index


def gathered_shift(doses: Tensor, effect: Tensor, max_active: int) -> Tensor:
    """Return ``doses @ effect`` by gathering the effects of each cell's components.

    Parameters
    ----------
    doses, max_active
        See :func:`active_components`.
    effect
        ``(samples, components, latents)``.
    """
    dose, index = active_components(doses, max_active)
    return (dose[..., None] * effect[:, index]).sum(-2)
