"""Arguments of `SCVAE` about its mixture and labels: checked, and made arguments of the module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvae_tools._checks import check_numbers, check_whole, is_whole
from scvae_tools._messages import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Largest number of components, far above what is of use.
LARGEST_N_COMPONENTS = 1000


def mixture_options(
    n_components: int | tuple[int, int] | None,
    covariance: str,
    weights: str | Sequence[float],
    y_term: str | None,
    labels: list[str],
    label_categories: list[str],
    n_cells: int | None,
) -> dict[str, object]:
    """Arguments of a module with a mixture, from those of `SCVAE` and what is known of the cells.

    Parameters
    ----------
    n_components, covariance, weights, y_term
        As in `SCVAE`.
    labels
        Names of the labels that have a component; none where no labels are registered.
    label_categories
        Names of the codes of the labels, that of unlabelled cells included.
    n_cells
        Number of cells to find the components in; None for a model that has found its own.

    Raises
    ------
    ValueError
        If an argument does not fit the others, the labels or the number of cells.
    """
    is_range = _check_n_components(n_components)
    largest = n_components[1] if is_range else n_components
    check_whole("n_components", largest, most=LARGEST_N_COMPONENTS, or_none=True)
    if None not in (largest, n_cells) and largest > n_cells:
        raise ValueError(
            f"`n_components` must be at most the number of cells; found {largest} components for {n_cells} "
            "cells. Pass fewer, or None to find their number."
        )
    number = None if is_range or n_components is None else int(n_components)
    y_term = y_term or ("cross-entropy" if labels else "kl")
    if not labels and (y_term == "cross-entropy" or weights == "labels"):
        found = "y_term='cross-entropy'" if y_term == "cross-entropy" else "weights='labels'"
        raise ValueError(f"{found} needs labels; found none. Pass `labels_key` to `setup_anndata`.")
    if y_term == "cross-entropy":
        if is_range or (number is not None and number < len(labels)):
            raise ValueError(
                "`n_components` must be a number of at least one component for each label, or None for just as "
                f"many; found {n_components!r} for the {len(labels)} labels {listed(labels)}. Pass "
                f"n_components={len(labels)} or more, or y_term='kl' to train without the labels."
            )
        number = number or len(labels)
    elif isinstance(weights, str) and weights == "labels":
        if is_range or number not in (None, len(labels)):
            raise ValueError(
                f"`n_components` must be the number of labels for weights='labels'; found {n_components!r} for the "
                f"{len(labels)} labels {listed(labels)}. Pass n_components={len(labels)}, or other weights."
            )
        number = len(labels)
    if not isinstance(weights, str):
        weights = _check_weights(weights, number)
    # Component i is that of label i; codes of cells without a label stand for none, −1.
    code_of = {label: code for code, label in enumerate(labels)}
    codes = [code_of.get(label, -1) for label in label_categories] if labels else None
    return {
        "n_components": number,
        "covariance": covariance,
        "weights": weights,
        "y_term": y_term,
        "component_of_label": codes,
    }


def _check_n_components(n_components: object) -> bool:
    """Whether ``n_components`` is a range; raise a ValueError if it is neither a range, a number, nor None."""
    is_range = isinstance(n_components, tuple | list)
    numbers = list(n_components) if is_range else [] if n_components is None else [n_components]
    if (
        not all(map(is_whole, numbers))
        or (is_range and len(numbers) != 2)
        or any(n < 1 for n in numbers)
        or numbers != sorted(numbers)
    ):
        raise ValueError(
            "`n_components` must be a whole number of at least 1, the smallest and largest that may be found, such as "
            f"(4, 20), or None; found {n_components!r}."
        )
    return is_range


def _check_weights(weights: Sequence[float], n_components: int | None) -> list[float]:
    """Weights of the components as a list that can be saved."""
    found = check_numbers("weights", weights)
    if n_components is None or found.shape != (n_components,) or not (found > 0).all() or abs(found.sum() - 1) > 1e-3:
        number = "as many as `n_components`, which then must be given" if n_components is None else n_components
        raise ValueError(
            f"`weights` must be 'learned', 'uniform', 'labels', or {number} positive numbers that add up to 1; found "
            f"{len(found) if found.ndim else found} with the sum {found.sum():g}."
        )
    return found.tolist()
