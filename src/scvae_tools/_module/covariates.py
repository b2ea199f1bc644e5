"""Covariates of the cells, as input of the networks, and the sizes of a model that follow from the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from collections.abc import Sequence


class Covariates(NamedTuple):
    """Covariates of n cells: everything that the networks get beside the counts.

    The batch comes last among the categories: scArches appends the columns of new batches at the end of a weight.
    """

    batch: Tensor  # (n, 1) integer codes
    categorical: Tensor | None = None  # (n, n_categorical) integer codes
    continuous: Tensor | None = None  # (n, n_continuous)
    relative_size: Tensor | None = None  # (n, 1) log of the size factor over the typical one; for the decoder alone

    def categories(self) -> tuple[Tensor, ...]:
        """Codes (n, 1) of each categorical covariate, the batch last."""
        extra = () if self.categorical is None else torch.split(self.categorical, 1, dim=1)
        return (*extra, self.batch)

    def indicators(self, n_categories: Sequence[int]) -> list[Tensor]:
        """Codes one-hot, (n, n_categories) of each categorical covariate that has several, the batch last."""
        codes = zip(self.categories(), n_categories, strict=True)
        return [one_hot(code[:, 0].long(), n) for code, n in codes if n > 1]

    def rows(self, at: Tensor) -> Covariates:
        """Covariates of the cells at some positions."""
        return Covariates(*(None if value is None else value[at] for value in self))

    def beside(self, features: Tensor) -> Tensor:
        """Features (..., n, f) with the continuous covariates and the relative size appended."""
        known = [value for value in (self.continuous, self.relative_size) if value is not None]
        if not known:
            return features
        return torch.cat([features, *(value.expand(*features.shape[:-2], -1, -1) for value in known)], dim=-1)


class Sizes(NamedTuple):
    """Sizes of a model that follow from the data: numbers of genes, batches and covariates."""

    n_genes: int
    n_batch: int = 1
    n_categories: tuple[int, ...] = ()
    n_continuous: int = 0

    def n_each(self) -> list[int]:
        """Number of categories of each categorical covariate, the batch last."""
        return [*self.n_categories, self.n_batch]
