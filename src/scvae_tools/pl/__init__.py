"""Plots of results that `scvae_tools.tl` stored in an AnnData, or of a model's history; they store no results.

Every function returns its Axes (an array of them where there may be several panels), shows nothing unless asked
(``show=True``) and draws on given Axes (``ax=`` or ``axes=``), so that a figure can be composed and changed afterwards.
So there is no ``return_fig`` as in scanpy: ``ax.figure`` is the figure. ``save`` takes a path, which is never put
behind a name as in scanpy, or True for a file in ``scanpy.settings.figdir``. matplotlib and scanpy load on first use.
One module per picture.
"""

from scvae_tools.pl._ambiguous import ambiguous as ambiguous
from scvae_tools.pl._calibration import calibration as calibration
from scvae_tools.pl._cluster_stability import cluster_stability as cluster_stability
from scvae_tools.pl._clusters import clusters as clusters
from scvae_tools.pl._compare import compare as compare
from scvae_tools.pl._components import components as components
from scvae_tools.pl._confusion import confusion as confusion
from scvae_tools.pl._genes import genes as genes
from scvae_tools.pl._kl import kl as kl
from scvae_tools.pl._lambda_bars import lambda_bars as lambda_bars
from scvae_tools.pl._latent import latent as latent
from scvae_tools.pl._loadings import loadings as loadings
from scvae_tools.pl._ppc import ppc as ppc
from scvae_tools.pl._probs import probs as probs
from scvae_tools.pl._stability import stability as stability
from scvae_tools.pl._training import training as training
from scvae_tools.pl._tree import tree as tree

__all__ = sorted(name for name in globals() if not name.startswith("_") and name != "annotations")
