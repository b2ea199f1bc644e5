"""SCVAE, the model class: its arguments, the module that they make, and its components."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scvae_tools import _keys
from scvae_tools._checks import checked
from scvae_tools._data.counts import gene_mean_fraction
from scvae_tools._data.loader import registered_columns
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.mixture_vaes import GMVAE, MixtureVAE, VaDE
from scvae_tools._module.networks import hidden_widths
from scvae_tools._module.vae import N_REFERENCE_CELLS, VAE
from scvae_tools._other_names import answers_other_names
from scvae_tools._random import seeded
from scvae_tools._train.state import TrainingState
from scvae_tools.model._hub import HubMixin
from scvae_tools.model._inherited import InheritedMixin
from scvae_tools.model._mixture_options import mixture_options
from scvae_tools.model._training import TrainingMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData

MODULES: dict[str, type[VAE]] = {"none": VAE, "gmvae": GMVAE, "vade": VaDE}
#: Arguments that `SCVAE` hands on to the module as they are.
ARCHITECTURE = tuple(p.name for p in inspect.signature(VAE).parameters.values() if p.kind is p.KEYWORD_ONLY)


def module_name(mixture: bool | str) -> str:  # noqa: FBT001
    """Key of ``MODULES`` for the argument ``mixture``.

    Raises
    ------
    ValueError
        If it is not one of False, True, "gmvae" and "vade".
    """
    name = {False: "none", True: "gmvae"}.get(mixture, mixture) if isinstance(mixture, bool | str) else None
    if name not in MODULES:
        raise ValueError(f"`mixture` must be False, True, 'gmvae' (the same as True) or 'vade'; found {mixture!r}.")
    return name


class SCVAE(TrainingMixin, HubMixin, InheritedMixin):
    """Variational auto-encoder of counts, with a Gaussian mixture that clusters.

    scVAE (Grønbech et al. 2020, doi:10.1093/bioinformatics/btaa293) with the interface of scvi-tools.

    Parameters
    ----------
    adata
        AnnData that was passed to `setup_anndata`.
    registry
        Of a saved model, to build it without data; users call `load`.
    likelihood
        p(x|z), a key of ``svt.likelihoods.LIKELIHOODS``, such as ``"poisson"``, ``"nb"``, ``"zip"`` or ``"zinb"``.
        docs/likelihoods.md has all of them and helps to choose.
    k_max
        Number of counts, from 0 on, that get a probability of their own, and above which ``likelihood`` describes
        them: piecewise categorical. 0 for none.
    mixture
        ``False`` for a plain VAE; ``True`` or ``"gmvae"`` for q(y|x) q(z|x,y), as in the paper; ``"vade"`` for one
        q(z|x) and a mixture prior, with one decoder pass a cell in place of one per component.
    n_components
        Number of components; the smallest and largest number that may be found, such as ``(4, 20)``; or None to find
        any (see docs/clustering.md). After training ``n_components`` is what was found, and ``component_curve_`` a
        table with the overlap of the components by their number.
    n_latent
        Size of the latent space.
    n_hidden, n_layers
        Width and number of the hidden layers of encoder and decoder; or the widths of those of the encoder from first
        to last, such as ``(250, 100)``, which the decoder has in reverse. ``n_layers`` is 1, or the number of widths.
    dropout_rate
        Of the hidden layers of both, in the last stage of the training (docs/clustering.md). Or a dict with the rates
        of any of ``"hidden"``, the hidden layers; ``"input"``, the encoder's input; ``"latent"``, the decoder's input
        z; ``"y"``, the effect of y on q(z|x,y) of the ``"gmvae"``, for each cell and component; 0 of those left out.
    linear_encoder
        Whether the parameters of q(z|x), and of q(y|x), are linear functions of the encoder's input (the log of the
        variance, the logits). They pass one layer without norm and ReLU, of the last width in ``n_hidden`` or twice
        ``n_latent``, whichever is more. What y adds to q(z|x,y) stays a small nonlinear layer. With
        ``encoder_input="counts"`` large counts may overflow, as no norm comes between.
    linear_decoder
        Whether the parameters of p(x|z) are linear functions of z and the covariates (the log of λ, of r; the logit of
        an excess zero), without a hidden layer: factor analysis of counts (cf. Svensson et al. 2020,
        doi:10.1093/bioinformatics/btaa169). `get_loadings` then tells what each dimension does to each gene.
    decode_size
        Whether the decoder also sees log(size / median size) of a cell, the median that of the cells that the model was
        built on; beside λ = size · exp(f(z)), or in place of it with ``use_size_factor=False`` as in the original.
    dispersion
        Inverse dispersion per ``"gene"``, ``"gene-batch"`` or ``"gene-cell"``.
    covariance
        Of p(z|y): ``"diag"``, ``"tied"`` or ``"full"``.
    weights
        p(y): ``"learned"``, ``"uniform"``, ``"labels"`` (fixed: their shares among the labelled training cells), or k
        numbers that add up to 1: in the order of the labels, else of the sizes of the components.
    y_term
        What trains q(y|x) beside the rest of the bound: ``"kl"``, its KL divergence from p(y); ``"none"``; or
        ``"cross-entropy"`` with the labels of the cells where they are known, and the KL elsewhere. None for the last
        where labels are registered, else the first.
    normalization
        Norm in the encoder: ``"layer"``, ``"batch"`` or ``"none"``.
    posterior_variance
        Variance of q(z|x): ``"per-dimension"``, or ``"shared"`` by all dimensions of a cell.
    encoder_input
        ``"log1p-normalized"``, ``"log1p"`` or ``"counts"``.
    encode_covariates
        Whether the encoder sees batch and covariates as the decoder does.
    use_size_factor
        Whether λ = size · exp(f(z)), or exp(f(z)) alone as in the original.
    engine
        How log p(x|z) is summed over the genes: ``"blocked"``, ``"dense"`` (all parameters of a batch in memory), or
        ``"auto"``, which is ``"blocked"``. The results are the same but for rounding. Where the counts are held on a
        device (``hold_on_device`` of `train`), another sum of the same formulas takes their place.
    random_state
        Seed of the initial weights.

    Examples
    --------
    >>> svt.SCVAE.setup_anndata(adata, batch_key="donor")
    >>> model = svt.SCVAE(adata, likelihood="zinb", n_components=12)
    >>> model.train()
    >>> adata.obs["cluster"] = model.predict()
    """

    _LATENT_QZM_KEY = _keys.LATENT_MEAN
    _LATENT_QZV_KEY = _keys.LATENT_VARIANCE

    @answers_other_names
    @checked()
    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        likelihood: str = "nb",
        k_max: int = 0,
        mixture: bool | Literal["gmvae", "vade"] = True,
        n_components: int | tuple[int, int] | None = None,
        n_latent: int = 10,
        n_hidden: int | Sequence[int] = 128,
        n_layers: int | None = None,
        dropout_rate: float | dict[str, float] = 0.2,
        linear_encoder: bool = False,
        linear_decoder: bool = False,
        decode_size: bool = False,
        dispersion: str = "gene",
        covariance: str = "full",
        weights: str | Sequence[float] = "learned",
        y_term: Literal["kl", "none", "cross-entropy"] | None = None,
        normalization: str = "layer",
        posterior_variance: str = "per-dimension",
        encoder_input: str = "log1p-normalized",
        encode_covariates: bool = False,
        use_size_factor: bool = True,
        engine: str = "auto",
        random_state: int = 0,
    ) -> None:
        widths = hidden_widths(n_hidden, n_layers)
        n_layers, n_hidden = len(widths), widths[0] if np.ndim(n_hidden) == 0 else list(widths)
        arguments = dict(locals())
        self.init_params_ = self._get_init_params(arguments)
        self._state = TrainingState(tuple(n_components) if isinstance(n_components, list) else n_components)
        super().__init__(adata, registry)
        # scvi-tools keeps the managers, and with them the data, of every model in the class.
        weakref.finalize(self, type(self)._per_instance_manager_store.pop, self.id, None)
        kind = module_name(mixture)
        options = {name: arguments[name] for name in ARCHITECTURE}
        if kind != "none":
            options |= mixture_options(
                n_components,
                covariance,
                weights,
                y_term,
                self.labels,
                self.label_categories,
                n_cells=None if self._is_transferred else self.summary_stats.n_cells,
            )
        with seeded(random_state):
            self.module = MODULES[kind](self._sizes(), **options)
            if adata is not None and self.minified_data_type is None:
                self._set_reference()
        self.module.minified_data_type = self.minified_data_type
        self._model_summary_string = (
            f"SCVAE with likelihood {likelihood!r}, mixture {kind!r}, n_components {self.n_components}, "
            f"n_latent {n_latent}, n_hidden {n_hidden}, n_layers {n_layers}"
        )

    @property
    def _is_transferred(self) -> bool:
        """Whether the model is one that was trained before on other cells, which may be more."""
        return self.adata is None or getattr(self.adata_manager, "is_transferred", False)

    @property
    def is_supervised(self) -> bool:
        """Whether labels train the components, so that each label has one of its name."""
        return isinstance(self.module, MixtureVAE) and self.module.y_term == "cross-entropy"

    def _sizes(self) -> Sizes:
        stats = self.summary_stats
        categories = self.registry["field_registries"][REGISTRY_KEYS.CAT_COVS_KEY]["state_registry"]
        n_categories = tuple(map(int, categories["n_cats_per_key"])) if categories else ()
        return Sizes(stats.n_vars, stats.n_batch, n_categories, stats.get("n_extra_continuous_covs", 0))

    def _set_reference(self) -> None:
        """Start the module at the scale of the data: gene means, size factors, covariates."""
        counts = self.counts_of_model()
        total = np.asarray(counts.sum(1), dtype=np.float64).ravel()
        columns = registered_columns(self.adata_manager)
        has = REGISTRY_KEYS.SIZE_FACTOR_KEY in columns
        size = columns[REGISTRY_KEYS.SIZE_FACTOR_KEY].ravel().astype(float) if has else total
        # A gene without a count starts at half a count in all cells together.
        fraction = np.maximum(gene_mean_fraction(counts, size), 0.5 / size.sum())
        if not self.module.use_size_factor:
            fraction = np.maximum(np.asarray(counts.mean(0), dtype=np.float64).ravel(), 0.5 / len(size))
        rows = torch.randint(len(size), (N_REFERENCE_CELLS,)).numpy()

        def drawn(key: str) -> torch.Tensor | None:
            return torch.as_tensor(columns[key][rows]) if key in columns else None

        self.module.set_reference(
            torch.as_tensor(fraction),
            float(total.mean() / size.mean()),
            torch.as_tensor(size[rows]),
            Covariates(drawn("batch"), drawn(REGISTRY_KEYS.CAT_COVS_KEY), drawn(REGISTRY_KEYS.CONT_COVS_KEY)),
        )

    # -- what a training changes, under the names by which scvi-tools and saved models know it -------------------------

    @property
    def is_trained_(self) -> bool:
        """Whether a stage of a training has ended."""
        return self._state.is_trained

    @is_trained_.setter
    def is_trained_(self, value: bool) -> None:
        self._state.is_trained = value

    @property
    def history_(self) -> pd.DataFrame | None:
        """History of the trainings; see `history`."""
        return self._state.history

    @history_.setter
    def history_(self, value: pd.DataFrame | None) -> None:
        self._state.history = value

    @property
    def component_curve_(self) -> pd.DataFrame | None:
        """Overlap of the components by their number, where it was to be found; see ``n_components`` of `SCVAE`."""
        return self._state.component_curve

    @component_curve_.setter
    def component_curve_(self, value: pd.DataFrame | None) -> None:
        self._state.component_curve = value

    @property
    def valley_p_values_(self) -> np.ndarray | None:
        """Probability of each two components that they are one population, (k, k) in the order of `components`.

        By the test for a valley of the density between them, in the latent space in which they were found (see
        docs/clustering.md); 1 on the diagonal. None for plain VAEs, where labels train the components, and for models
        that were saved by versions without it.
        """
        return self._state.valley_p_values

    @valley_p_values_.setter
    def valley_p_values_(self, value: np.ndarray | None) -> None:
        self._state.valley_p_values = value

    @property
    def null_log_likelihood_(self) -> dict[str, float] | None:
        """Log-likelihood without latent variables; see `null_log_likelihood`."""
        return self._state.null_log_likelihood

    @null_log_likelihood_.setter
    def null_log_likelihood_(self, value: dict[str, float] | None) -> None:
        self._state.null_log_likelihood = value

    @property
    def was_interrupted(self) -> bool:
        """Whether Ctrl-C ended the last training."""
        return self._state.is_interrupted

    # -- components ----------------------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int | None:
        """Number of components; None before the mixture has been built."""
        return self.module.n_components

    @property
    def components(self) -> list[str]:
        """Names of the components, from "0" on by decreasing number of cells of the data it was trained on.

        Where labels train the components, the names of the labels, and "new 0", "new 1", ... for the others.
        """
        n = self.n_components or 0
        if not self.is_supervised:
            return [str(component) for component in range(n)]
        return [*self.labels, *(f"new {i}" for i in range(n - len(self.labels)))]

    @property
    def is_mixture(self) -> bool:
        """Whether the mixture has been set from a trained latent space."""
        return isinstance(self.module, MixtureVAE) and self.module.is_mixture
