"""SCVAE, the model class: the wiring of our modules to scvi-tools. It contains no formula."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._utils import _get_adata_minify_type  # the hook that models with minified data share
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)

from scvae_tools import _keys
from scvae_tools._counts import check_obs, gene_mean_fraction, listed, read_counts
from scvae_tools._evaluation import EvaluationMixin
from scvae_tools._fitting import FittingMixin
from scvae_tools._gmvae import GMVAE, MixtureVAE, VaDE
from scvae_tools._messages import said_before
from scvae_tools._networks import Covariates, Sizes, hidden_widths
from scvae_tools._persistence import PersistenceMixin
from scvae_tools._random import seeded
from scvae_tools._training import (
    quiet,
)
from scvae_tools._vae import N_REFERENCE_CELLS, VAE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

MODULES: dict[str, type[VAE]] = {"none": VAE, "gmvae": GMVAE, "vade": VaDE}


def module_name(mixture: bool | str) -> str:  # noqa: FBT001
    """Key of ``MODULES`` for the argument ``mixture``.

    Raises
    ------
    ValueError
        If it is none of False, True, "gmvae" and "vade".
    """
    name = {False: "none", True: "gmvae"}.get(mixture, mixture) if isinstance(mixture, bool | str) else None
    if name not in MODULES:
        raise ValueError(f"`mixture` must be False, True, 'gmvae' (the same as True) or 'vade'; found {mixture!r}.")
    return name


class SCVAE(FittingMixin, EvaluationMixin, PersistenceMixin):
    """Variational auto-encoder of counts, with a Gaussian mixture that clusters.

    scVAE (Grønbech et al. 2020, doi:10.1093/bioinformatics/btaa293) with the interface of scvi-tools.

    Parameters
    ----------
    adata
        AnnData that was passed to `setup_anndata`.
    registry
        Of a saved model, to build it without data; users call `load`.
    likelihood
        p(x|z): ``"poisson"``, ``"nb"``, ``"zip"`` or ``"zinb"``; ``"constrained_poisson"``; ``"bernoulli"``, of whether
        a count is above 0; or a density, ``"gaussian"``, ``"log_normal"`` or ``"lomax"`` (docs/likelihoods.md).
    k_max
        Number of counts, from 0 on, that get a probability of their own, above which ``likelihood`` goes on: piecewise
        categorical. 0 for none.
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
        ``"auto"`` for the faster. The results are the same but for rounding.
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
        self.init_params_ = self._get_init_params(locals())
        self.component_curve_ = None  #: see ``n_components``
        super().__init__(adata, registry)
        # scvi-tools keeps the managers, and with them the data, of every model in the class.
        weakref.finalize(self, type(self)._per_instance_manager_store.pop, self.id, None)
        kind = module_name(mixture)
        options = {} if kind == "none" else self._mixture_options(n_components, covariance, weights, y_term)
        with seeded(random_state):
            self.module = MODULES[kind](
                self._sizes(),
                likelihood=likelihood,
                k_max=k_max,
                n_latent=n_latent,
                n_hidden=n_hidden,
                n_layers=n_layers,
                dropout_rate=dropout_rate,
                linear_encoder=linear_encoder,
                linear_decoder=linear_decoder,
                decode_size=decode_size,
                dispersion=dispersion,
                normalization=normalization,
                posterior_variance=posterior_variance,
                encoder_input=encoder_input,
                encode_covariates=encode_covariates,
                use_size_factor=use_size_factor,
                engine=engine,
                **options,
            )
            if adata is not None and self.minified_data_type is None:
                self._set_reference()
        self.module.minified_data_type = self.minified_data_type
        self._model_summary_string = (
            f"SCVAE with likelihood {likelihood!r}, mixture {kind!r}, n_components {self.n_components}, "
            f"n_latent {n_latent}, n_hidden {n_hidden}, n_layers {n_layers}"
        )

    def _mixture_options(
        self,
        n_components: int | tuple[int, int] | None,
        covariance: str,
        weights: str | Sequence[float],
        y_term: str | None,
    ) -> dict[str, object]:
        is_range = _check_n_components(n_components)
        largest, n_cells = n_components[1] if is_range else n_components, self.summary_stats.n_cells
        if largest is not None and largest > n_cells:
            raise ValueError(
                f"`n_components` must be at most the number of cells; found {largest} components for {n_cells} "
                "cells. Pass fewer, or None to find their number."
            )
        self._component_range = tuple(map(int, n_components)) if is_range else None
        number = None if is_range or n_components is None else int(n_components)
        labels = self.labels
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
        code_of = {label: code for code, label in enumerate(labels)}
        codes = [code_of.get(label, -1) for label in self._label_categories] if labels else None
        return {
            "n_components": number,
            "covariance": covariance,
            "weights": weights,
            "y_term": y_term,
            "component_of_label": codes,
        }

    @property
    def _label_categories(self) -> list[str]:
        """Names of the codes of the labels."""
        state = self.registry["field_registries"][REGISTRY_KEYS.LABELS_KEY]["state_registry"]
        return [str(name) for name in state["categorical_mapping"]]

    @property
    def labels(self) -> list[str]:
        """Names of the labels in ``labels_key``, without that of unlabelled cells; none if there is no such key."""
        setup = self.registry["setup_args"]
        if setup.get("labels_key") is None:
            return []
        unlabeled = setup.get("unlabeled_category")
        return [name for name in self._label_categories if unlabeled is None or name != str(unlabeled)]

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
        """Show the module the data's scale: gene means, size factors, covariates."""
        with said_before():
            counts = read_counts(self.adata, layer=self._layer, allow_non_integer=True)
        total = np.asarray(counts.sum(1), dtype=np.float64).ravel()
        manager, registered = self.adata_manager, self.adata_manager.data_registry
        has = REGISTRY_KEYS.SIZE_FACTOR_KEY in registered
        size = manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY).ravel().astype(float) if has else total
        # A gene without a count starts at half a count in all cells together.
        fraction = np.maximum(gene_mean_fraction(counts, size), 0.5 / size.sum())
        if not self.module.use_size_factor:
            fraction = np.maximum(np.asarray(counts.mean(0), dtype=np.float64).ravel(), 0.5 / len(size))
        rows = torch.randint(len(size), (N_REFERENCE_CELLS,)).numpy()

        def drawn(key: str) -> torch.Tensor | None:
            return torch.as_tensor(np.asarray(manager.get_from_registry(key))[rows]) if key in registered else None

        self.module.set_reference(
            torch.as_tensor(fraction),
            float(total.mean() / size.mean()),
            torch.as_tensor(size[rows]),
            Covariates(drawn("batch"), drawn(REGISTRY_KEYS.CAT_COVS_KEY), drawn(REGISTRY_KEYS.CONT_COVS_KEY)),
        )

    # -- set-up ----------------------------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        allow_non_integer: bool = False,  # noqa: FBT001, FBT002
        unlabeled_category: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the counts and register them, with what is known of the cells, for `SCVAE`.

        Parameters
        ----------
        adata
            AnnData with raw counts, (n_cells, n_genes), sparse or dense.
        layer
            Layer of the counts; None for ``adata.X``.
        batch_key, labels_key
            Columns of ``obs`` with the batch, which the decoder is given, and with the labels of the cells that are
            known: each label then has a component (see ``y_term`` of `SCVAE`).
        size_factor_key
            Column of ``obs`` with positive size factors; None for each cell's total count.
        categorical_covariate_keys, continuous_covariate_keys
            Further columns of ``obs`` that the decoder is given; those with numbers in units of their standard
            deviation over the training cells, from their mean, which the model keeps for new data.
        allow_non_integer
            Accept estimated counts, with a warning.
        unlabeled_category
            What ``labels_key`` holds for cells without a label; None if all have one.
        **kwargs
            Passed on by scvi-tools when it transfers a set-up to other data.

        Raises
        ------
        CountsError
            If the counts are not raw counts; it says which cell and gene.
        ValueError
            If a column of ``obs`` is missing or unfit.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        minified = _get_adata_minify_type(adata)
        if minified is None:
            read_counts(adata, layer=layer, allow_non_integer=allow_non_integer)
        checks_labels = not kwargs.get("allow_missing_labels")
        check_obs(
            adata,
            batch_key=None if "source_registry" in kwargs else batch_key,
            labels_key=labels_key if checks_labels else None,
            unlabeled_category=unlabeled_category if checks_labels and "source_registry" not in kwargs else None,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
        )
        fields = [
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys),
        ]
        if minified is not None:
            fields += cls._get_fields_for_adata_minification(minified)
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        with quiet():
            manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:  # noqa: FBT001, FBT002
        """Check data that the model has not seen as closely as those it was built on."""
        if adata is None and self.adata is None:
            raise ValueError("This model was loaded without data. Pass an AnnData with its genes.")
        if adata is not None and adata is not self.adata and _get_adata_minify_type(adata) is None:
            self._check_genes(adata)
            self._check_columns(adata)
            if self.get_anndata_manager(adata) is None:
                setup = self.registry["setup_args"]
                read_counts(adata, layer=self._layer, allow_non_integer=setup.get("allow_non_integer", False))
        with quiet():
            return super()._validate_anndata(adata, copy_if_view)

    def _check_genes(self, adata: AnnData) -> None:
        expected = self.var_names
        if len(expected) == adata.n_vars and (expected == adata.var_names.astype(str)).all():
            return
        missing = [gene for gene in expected.tolist() if gene not in adata.var_names]
        found = (
            f"{len(missing)} of the model's {len(expected)} genes are missing, the first {missing[0]!r}. Take data "
            "with these genes, or fill them with `SCVAE.prepare_query_anndata`."
            if missing
            else "all genes are there, but in another order or among others. Pass `adata[:, model.var_names].copy()`."
        )
        raise ValueError(f"Data for the model must have its genes in its order: {found}")

    def _check_columns(self, adata: AnnData) -> None:
        """Check that ``obs`` holds what the model was set up with, of categories that it knows."""
        from scvae_tools._ppc import _columns

        setup = self.registry["setup_args"]
        roles = ("batch_key", "labels_key", "size_factor_key")
        roles += ("categorical_covariate_keys", "continuous_covariate_keys")
        for role in roles:
            keys = setup.get(role) or ()
            for key in [keys] if isinstance(keys, str) else keys:
                if key not in adata.obs.columns:
                    raise ValueError(
                        f"Data for the model must have the column {key!r} in adata.obs, which was its `{role}`; found "
                        f"{listed(adata.obs.columns)}. "
                        + (self._any_label_does() if role == "labels_key" else "Add it.")
                    )
        _columns(self, adata)
        for key, known in self._known_categories().items():
            found = adata.obs[key].unique().tolist()
            if unknown := [each for each in found if each not in known]:
                raise ValueError(
                    f"adata.obs[{key!r}] must hold categories that the model knows, {listed(known)}; found "
                    f"{listed(unknown)}. {self._remedy_for_categories(key, unknown, known)}"
                )

    def _known_categories(self) -> dict[str, list]:
        """Categories of the batch, the labels and the covariates, by the column of ``obs``."""
        setup, fields = self.registry["setup_args"], self.registry["field_registries"]
        roles = {"batch_key": REGISTRY_KEYS.BATCH_KEY, "labels_key": REGISTRY_KEYS.LABELS_KEY}
        known = {
            setup[role]: fields[name]["state_registry"]["categorical_mapping"]
            for role, name in roles.items()
            if setup.get(role) is not None
        }
        known |= (fields[REGISTRY_KEYS.CAT_COVS_KEY]["state_registry"] or {}).get("mappings", {})
        return {key: np.asarray(categories).tolist() for key, categories in known.items()}

    def _remedy_for_categories(self, key: str, unknown: list, known: list) -> str:
        setup = self.registry["setup_args"]
        if {str(each) for each in unknown} <= {str(each) for each in known}:
            found, wanted = (type(values[0]).__name__ for values in (unknown, known))
            return f"Type {found} must be {wanted}: adata.obs[{key!r}] = adata.obs[{key!r}].astype({wanted})."
        if key == setup.get("batch_key"):
            return "Train the model on new batches with `SCVAE.load_query_data`, or leave these cells out."
        if key == setup.get("labels_key"):
            return self._any_label_does()
        return "Train a model on cells of these categories too, or leave these cells out."

    def _any_label_does(self) -> str:
        key = self.registry["setup_args"]["labels_key"]
        return f"No result depends on it: any known label does, adata.obs[{key!r}] = {self._label_categories[0]!r}."

    @property
    def _layer(self) -> str | None:
        return self.registry["setup_args"].get("layer")

    @property
    def var_names(self) -> np.ndarray:
        """Names of the genes, (n_genes,)."""
        names = self.registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"]
        return np.asarray(names).astype(str)

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


def _check_n_components(n_components: object) -> bool:
    """Whether it is a range; raise a ValueError if it is neither that, a number, nor None."""
    is_range = isinstance(n_components, tuple | list)
    numbers = list(n_components) if is_range else [] if n_components is None else [n_components]
    are_whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers)
    if not are_whole or (is_range and len(numbers) != 2) or any(n < 1 for n in numbers) or numbers != sorted(numbers):
        raise ValueError(
            "`n_components` must be a whole number of at least 1, the smallest and largest that may be found, such as "
            f"(4, 20), or None; found {n_components!r}."
        )
    return is_range


def _check_weights(weights: Sequence[float], n_components: int | None) -> list[float]:
    """Weights of the components as a list that can be saved."""
    found = np.asarray(weights, dtype=float)
    if n_components is None or found.shape != (n_components,) or not (found > 0).all() or abs(found.sum() - 1) > 1e-3:
        number = "as many as `n_components`, which then must be given" if n_components is None else n_components
        raise ValueError(
            f"`weights` must be 'learned', 'uniform', 'labels', or {number} positive numbers that add up to 1; found "
            f"{len(found) if found.ndim else found} with the sum {found.sum():g}."
        )
    return found.tolist()
