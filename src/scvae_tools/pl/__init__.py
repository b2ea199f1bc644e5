"""Plots of what `scvae_tools.tl` stored in an AnnData, or of a model's history; they store no results.

Every function returns its Axes (an array of them where there may be several panels), shows nothing unless asked
(``show=True``) and draws on given Axes (``ax=`` or ``axes=``), so that a figure can be composed and changed afterwards.
matplotlib and scanpy load on first use. One module per picture.
"""

from scvae_tools.pl._ambiguous import ambiguous
from scvae_tools.pl._calibration import calibration
from scvae_tools.pl._clusters import clusters
from scvae_tools.pl._compare import compare
from scvae_tools.pl._components import components
from scvae_tools.pl._confusion import confusion
from scvae_tools.pl._genes import genes
from scvae_tools.pl._kl import kl
from scvae_tools.pl._lambda_bars import lambda_bars
from scvae_tools.pl._latent import latent
from scvae_tools.pl._loadings import loadings
from scvae_tools.pl._ppc import ppc
from scvae_tools.pl._probs import probs
from scvae_tools.pl._stability import stability
from scvae_tools.pl._training import training

__all__ = [
    "ambiguous",
    "calibration",
    "clusters",
    "compare",
    "components",
    "confusion",
    "genes",
    "kl",
    "lambda_bars",
    "latent",
    "loadings",
    "ppc",
    "probs",
    "stability",
    "training",
]
