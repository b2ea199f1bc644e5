"""Likelihoods p(x | z): one declaration for each, and the table of their names.

A likelihood declares the heads that the decoder must emit and, in terms of them, log p(0), log p(x) for x > 0, mean,
variance and a sampler. Everything else (decoder, bound, model, plots, tests, documentation) reads the declaration, so
a new likelihood is a class in this folder, a row in `LIKELIHOODS`, a row in the table of its tests and a line in
``docs/likelihoods.md``. Derivatives come from autograd; a likelihood may declare them beside its formula, which saves
a third of the time that the sum over genes takes, and is then tested against autograd. A class has a file of its own;
classes that share their formulas share a file.

All parameters live in log space: ``log_rate`` is log λ with the size factor included, ``log_r`` the log of the inverse
dispersion r, ``gate`` the logit of the probability of an excess zero. No formula contains an ``eps``.

Most likelihoods are probabilities of counts. Others declare as ``measures`` that they are probabilities of whether a
count is above 0, or densities of a number on the real line. Bounds of different kinds cannot be compared.
"""

from __future__ import annotations

from scvae_tools._checks import checked
from scvae_tools._other_names import hint_for_value
from scvae_tools.likelihoods._base import RATE, Head, Likelihood
from scvae_tools.likelihoods._base import Params as Params
from scvae_tools.likelihoods._base import differentiate as differentiate
from scvae_tools.likelihoods._densities import Gaussian, LogNormal, Lomax
from scvae_tools.likelihoods._distribution import CountDistribution
from scvae_tools.likelihoods._negative_binomial import NegativeBinomial
from scvae_tools.likelihoods._piecewise import PiecewiseCategorical
from scvae_tools.likelihoods._poisson import Bernoulli, ConstrainedPoisson, Poisson
from scvae_tools.likelihoods._rising import differentiate_log_rising_ratio as differentiate_log_rising_ratio
from scvae_tools.likelihoods._rising import log_rising_ratio
from scvae_tools.likelihoods._zero_inflated import ZeroInflated

#: Every likelihood by the name that ``likelihood=`` takes.
LIKELIHOODS: dict[str, Likelihood] = {
    "poisson": Poisson(),
    "nb": NegativeBinomial(),
    "zip": ZeroInflated(Poisson()),
    "zinb": ZeroInflated(NegativeBinomial()),
    "constrained_poisson": ConstrainedPoisson(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "log_normal": LogNormal(),
    "lomax": Lomax(),
}


__all__ = [
    "LIKELIHOODS",
    "RATE",
    "CountDistribution",
    "Head",
    "Likelihood",
    "PiecewiseCategorical",
    "get_likelihood",
    "log_rising_ratio",
]
__all__ += sorted({type(likelihood).__name__ for likelihood in LIKELIHOODS.values()})


@checked()
def get_likelihood(name: str, k_max: int = 0) -> Likelihood:
    """Look a likelihood up by its name: the only place where the string is read.

    Parameters
    ----------
    name
        Key of `LIKELIHOODS`.
    k_max
        Number of counts, from 0 on, that get a probability of their own (`PiecewiseCategorical`); 0 for none.

    Raises
    ------
    ValueError
        If there is none of that name, ``k_max`` is not a whole number of at least 0, or the likelihood is not one of
        counts.
    """
    if name not in LIKELIHOODS:
        known = ", ".join(map(repr, LIKELIHOODS))
        hint = hint_for_value("likelihood", name)
        raise ValueError(
            f"`likelihood` must be one of {known}; found {name!r}.{hint} See docs/likelihoods.md for a choice."
        )
    likelihood = LIKELIHOODS[name]
    if k_max == 0:
        return likelihood
    if likelihood.measures != "counts":
        reason = "a density on the real line" if likelihood.is_density else "of x > 0 alone, whatever the count"
        known = ", ".join(repr(each) for each, other in LIKELIHOODS.items() if other.measures == "counts")
        raise ValueError(
            f"`k_max` needs a likelihood of counts, to go on above {k_max}; found {name!r}, which is {reason}. "
            f"Pass one of {known}, or k_max=0."
        )
    return PiecewiseCategorical(likelihood, k_max)
