"""SCVAE, the model class: the wiring of our modules to scvi-tools. It contains no formula."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
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
from scvi.model._utils import parse_device_args

from scvae_tools import _keys
from scvae_tools._batches import EVALUATION_BATCH_SIZE
from scvae_tools._checkpoint import Checkpointer, Version, copied, fingerprint, renumbered
from scvae_tools._counts import cell_positions, check_obs, gene_mean_fraction, listed, read_counts
from scvae_tools._evaluation import EvaluationMixin
from scvae_tools._gmvae import GMVAE, MixtureVAE, VaDE
from scvae_tools._messages import said_before, warn
from scvae_tools._networks import Covariates, Sizes, hidden_widths
from scvae_tools._persistence import PersistenceMixin
from scvae_tools._random import seeded
from scvae_tools._stability import RateRecorder
from scvae_tools._start import start_from_labels, start_mixture
from scvae_tools._training import (
    Objective,
    Progress,
    Settings,
    Stage,
    default_max_epochs,
    plan_stages,
    quiet,
    run_stage,
)
from scvae_tools._vae import N_REFERENCE_CELLS, VAE, check_choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

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


class SCVAE(EvaluationMixin, PersistenceMixin):
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
        p(y): ``"learned"``, ``"uniform"``, ``"labels"`` (their shares, fixed), or k numbers that add up to 1: in the
        order of the labels, else of the sizes of the components.
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
            Further columns of ``obs`` that the decoder is given.
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

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def history(self) -> pd.DataFrame | None:
        """A row per epoch of all trainings so far; None before the first.

        Columns: ``epoch``, ``stage`` and ``kl_weight`` (that of the warm-up, at the start of the epoch); for each of
        ``train`` and ``validation`` (``elbo_train``, ...) ``elbo``, ``log_likelihood``, ``kl_z`` and ``kl_y``, in nats
        per cell and not weighted. With ``record_rates=True`` also, of at most 512 training cells, before zero inflation
        and at the posterior means: ``rate_at_zeros``, the mean over cells of Σ λ over the genes with x = 0, in counts
        per cell, and ``max_rate``, the largest λ, in counts; NaN in epochs that were trained without.
        """
        return self.history_

    def train(
        self,
        max_epochs: int | None = None,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        n_warm_up_epochs: int | None = None,
        kl_weight: float = 1.0,
        free_nats_y: float = 0.0,
        free_nats_z: float = 0.0,
        n_samples: int = 1,
        n_importance_samples: int = 1,
        batch_size: int = 128,
        train_size: float = 0.9,
        validation_indices: Sequence[int] | None = None,
        early_stopping: bool = True,
        patience: int = 20,
        gradient_clip: float = 100.0,
        accelerator: str = "auto",
        devices: int | str = "auto",
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        progress: bool = True,
        record_rates: bool = False,
        checkpoint: str | Path | None = None,
        random_state: int = 0,
        **trainer_options: Any,
    ) -> None:
        """Train by stages: KL warm-up, VAE, and for a mixture the full bound from the VAE's latent space.

        Parameters
        ----------
        max_epochs
            Of all stages together; None for about 4,000 steps of 128 cells.
        lr, weight_decay
            Of Adam. The decay acts on all that is trained, biases and log r included: it pulls λ over the size factor,
            and r, towards 1.
        n_warm_up_epochs
            Epochs at the beginning over which the weight of the KL terms rises from 0; None for a quarter of the
            VAE's.
        kl_weight
            Weight of both KL terms after that. The bounds in `history` are never weighted.
        free_nats_y
            KL(q(y|x) ‖ p(y)) that costs nothing, as a share of the entropy H[p(y)]: where its mean over the cells of a
            step is less, it has no gradient.
        free_nats_z
            The same for the KL of z, in nats per cell (after Kingma et al. 2016, arXiv:1606.04934).
        n_samples
            Draws of z per cell and component whose bounds are averaged.
        n_importance_samples
            Draws of z per cell and component for the importance-weighted bound (Burda et al. 2016, arXiv:1509.00519),
            which is then trained in place of the ELBO; y stays summed out. The ELBO in `history` is that of the same
            draws. 1 for the ELBO.
        batch_size
            Cells a step; 128 gave the best bound for the time (docs/performance.md).
        train_size
            Share of the cells that are trained on; the others tell when to stop and which weights to keep.
        validation_indices
            Positions of the cells to hold out, or one boolean per cell, in place of a random draw. Where labels train
            the components, some cells of each label must be left to train on; a random draw sees to that itself.
        early_stopping, patience
            Whether, and after how many epochs without a better validation ELBO, a stage ends.
        gradient_clip
            Largest norm of the gradient.
        accelerator, devices
            Of Lightning.
        matmul_precision
            Precision of torch's matrix products during training (``torch.set_float32_matmul_precision``): ``"medium"``
            takes bfloat16 where the processor has it, ``"high"`` TF32 on a GPU; see docs/performance.md. None leaves
            the setting as it is.
        progress
            Whether to show a bar with epoch, ELBO and time left.
        record_rates
            Whether to put λ of at most 512 training cells into the `history` at the end of each epoch, for
            `scvae_tools.pl.stability`: ``rate_at_zeros``, the mean over cells of the sum of λ over the genes of which
            the cell has no count, and ``max_rate``, the largest λ, both in counts. The training is the same.
        checkpoint
            Directory in which a file is kept, from which a training that was killed goes on; None for none. See below.
        random_state
            Seed of split, order of cells and Monte Carlo samples.
        **trainer_options
            Further arguments of ``lightning.pytorch.Trainer``.

        Raises
        ------
        NonFiniteError
            If a term of the bound became NaN or infinite, also at a tenth of the learning rate.
        ValueError
            If an argument does not fit, or ``checkpoint`` holds a training of other data, another model or other
            arguments; it says which.

        Notes
        -----
        Ctrl-C ends the training; the best weights so far are kept, and a warning says which.

        All weights that a training leaves, not the best alone, are in `versions`.

        With ``checkpoint``, everything that is needed to go on is written at the end of each epoch, to a file that is
        whole whenever the process ends. The same model, built anew on the same data, with the same arguments of
        ``train`` and the same directory, goes on after the last epoch that had ended, and comes out as it would have
        without a break, to the last bit where processor, number of threads and versions of the packages are the same.
        After the last epoch the file holds the result: the same call then loads it and trains nothing. The file is
        about five times as large as the weights, and costs 26 ms an epoch for 2,000 genes and 128 hidden units.
        """
        arguments = dict(locals())
        if self.minified_data_type is not None:
            raise ValueError("A model of minified data cannot be trained: the counts are gone. Train before minifying.")
        if self.adata is None:
            raise ValueError("Training needs data; this model was loaded without. Pass them to `SCVAE.load`.")
        _check_training_arguments(max_epochs, batch_size, train_size, lr)
        objective = Objective(kl_weight, free_nats_y, free_nats_z, n_samples, n_importance_samples)
        _check_objective(objective, n_warm_up_epochs, self.module.y_term)
        _check_precision(trainer_options.get("precision"))
        check_choice("matmul_precision", matmul_precision, (None, "highest", "high", "medium"))
        max_epochs = default_max_epochs(self.adata.n_obs) if max_epochs is None else max_epochs
        accelerator, devices, device = parse_device_args(accelerator, devices, return_device="torch")
        stages = plan_stages(
            max_epochs,
            mixture=isinstance(self.module, MixtureVAE),
            resumes_vae=self.is_trained_,
            resumes_mixture=self.is_mixture,
            n_warm_up_epochs=n_warm_up_epochs,
        )
        bar = Progress(stages, enable=progress)
        settings = Settings(
            lr,
            weight_decay,
            objective,
            gradient_clip,
            early_stopping,
            patience,
            accelerator,
            devices,
            matmul_precision,
            bar,
            trainer_options,
        )
        former = self.train_indices, self.validation_indices, self.test_indices
        with seeded(random_state), quiet():
            self._split(train_size, validation_indices)
            loaders = self._loaders(batch_size, pin_memory=device.type == "cuda")
            if record_rates:
                settings.recorder = RateRecorder(loaders[0].dataset, self.train_indices, random_state)
            if checkpoint is not None:
                identity = fingerprint(self, loaders[0].dataset, arguments | {"max_epochs": max_epochs})
                try:
                    settings.checkpoint = Checkpointer(checkpoint, identity, loaders[0].dataset)
                except ValueError:
                    self.train_indices, self.validation_indices, self.test_indices = former
                    raise
            self.to_device(device)
            try:
                self._run(stages, loaders, settings, random_state)
            finally:
                bar.close()
                self.module.eval()
            self.to_device(device)

    def _split(self, train_size: float, validation_indices: Sequence[int] | None) -> None:
        n = self.adata.n_obs
        if validation_indices is None:
            order = torch.randperm(n).numpy()
            n_train = max(1, round(train_size * n))
            train, validation = order[:n_train], order[n_train:]
            # Of each label the component starts from the training cells: chance must not hold out its only ones.
            kept = np.array([*self._labels_held_out(train, validation).values()], dtype=int)
            train, validation = np.r_[train, kept], np.setdiff1d(validation, kept)
        else:
            validation = np.unique(cell_positions(validation_indices, n, "validation_indices"))
            train = np.setdiff1d(np.arange(n), validation)
        self.train_indices, self.validation_indices = np.sort(train), np.sort(validation)
        self.test_indices = np.array([], dtype=int)
        if len(train) == 0:
            raise ValueError(f"`validation_indices` must leave cells to train on; found all {n} held out.")
        if (self.n_components or 1) > len(train):
            raise ValueError(
                f"`n_components` must be at most the number of training cells; found {self.n_components} components "
                f"for {len(train)} cells. Pass fewer, or a larger `train_size`."
            )
        self._check_labels_to_train_on(train, validation)

    def _labels_held_out(self, train: np.ndarray, validation: np.ndarray) -> dict[str, int]:
        """Labels of which a component starts and all cells are held out, each with the position of its first cell."""
        if not self.is_supervised or self.is_mixture:
            return {}
        component = self._components_of_labels()
        held_out = np.setdiff1d(component[validation], component[train])
        return {self.labels[each]: validation[component[validation] == each][0] for each in held_out if each >= 0}

    def _check_labels_to_train_on(self, train: np.ndarray, validation: np.ndarray) -> None:
        held_out = self._labels_held_out(train, validation)
        if not held_out:
            return
        unlabeled = self.registry["setup_args"].get("unlabeled_category")
        hidden = "`unlabeled_category`" if unlabeled is None else repr(unlabeled)
        raise ValueError(
            "`validation_indices` must leave a cell of each label to train on, from which the component of the label "
            f"starts; found all cells labelled {listed(held_out)} held out. Leave some of them out of "
            f"`validation_indices`, or give those cells {hidden} as their label."
        )

    def _loaders(self, batch_size: int, *, pin_memory: bool) -> tuple[Iterable, Iterable | None]:
        # Batch norm cannot train on one cell; the order changes each epoch, so that no cell is left out for good.
        drops = self.module.normalization == "batch" and len(self.train_indices) % batch_size == 1
        options = {"shuffle": True, "drop_last": drops, "batch_size": batch_size, "pin_memory": pin_memory}
        train = self._make_data_loader(self.adata, self.train_indices, **options)
        if len(self.validation_indices) == 0:
            return train, None
        # Larger batches than in training: where no gradient is needed nothing but memory speaks against them.
        options = {"batch_size": max(batch_size, EVALUATION_BATCH_SIZE), "pin_memory": pin_memory}
        options["dataset"] = train.dataset
        return train, self._make_data_loader(self.adata, self.validation_indices, **options)

    def _run(self, stages: list[Stage], loaders: tuple, settings: Settings, random_state: int) -> None:
        """Run the stages; after an interruption set a mixture all the same, so that every result exists."""
        checkpoint = settings.checkpoint
        if checkpoint is not None and checkpoint.is_finished:
            checkpoint.restore_result(self)
            return
        starts_mixture = isinstance(self.module, MixtureVAE) and not self.is_mixture
        first = 0 if checkpoint is None else self._resume(stages, settings)
        interrupted = False
        for index, stage in enumerate(stages[first:], first):
            if stage.is_mixture and not self.is_mixture:
                self._start_mixture(random_state)
                if interrupted:
                    versions = {"end": Version(len(self.history_), np.nan, copied(self.module))}
                    break
            if interrupted:
                continue
            n_before = len(self.history_) if self.history_ is not None else 0
            if checkpoint is not None:
                checkpoint.begin_stage(index, self)
            rows, interrupted, versions = run_stage(self.module, stage, loaders, settings, first_epoch=n_before)
            self._append_history(rows)
            if interrupted:
                self._report_interruption(stage, len(rows), checkpoint)
            self.is_trained_, self._versions, self._version = True, {}, None
        self._versions, self._version = versions, "best" if "best" in versions else "end"
        if starts_mixture and self.is_mixture:
            self._sort_components()
        if checkpoint is not None and not interrupted:
            checkpoint.finish(self)

    def _resume(self, stages: list[Stage], settings: Settings) -> int:
        """Go to the beginning of the stage in which the checkpoint was written; which it is."""
        first = settings.checkpoint.resume(self)
        n_done = sum(stage.max_epochs for stage in stages[:first]) + settings.checkpoint.n_epochs_done()
        if settings.progress is not None:
            settings.progress.total -= n_done
        return first

    def _append_history(self, rows: list[dict]) -> None:
        earlier = [] if self.history_ is None else [self.history_]
        self.history_ = pd.concat([*earlier, pd.DataFrame(rows)], ignore_index=True)

    def _report_interruption(self, stage: Stage, n_epochs: int, checkpoint: Checkpointer | None) -> None:
        if len(self.history_) == 0:
            raise KeyboardInterrupt
        warn(
            f"Training was interrupted in stage {stage.name!r} after {n_epochs} of its at most {stage.max_epochs} "
            "epochs. Kept: the weights with the best validation ELBO of that stage, or else the last ones"
            + ("." if stage.is_mixture else "; the mixture, if any, is fitted to this latent space without training.")
            + ("" if checkpoint is None else f" {checkpoint.how_to_go_on()}")
        )

    def _start_mixture(self, random_state: int) -> None:
        """Set the mixture from the latent means of the training cells, and from their labels where these are known."""
        self.is_trained_ = True
        mean, variance = self.get_latent_representation(indices=self.train_indices, return_dist=True)
        if self.is_supervised:
            label = self._components_of_labels()[self.train_indices]
            start = start_from_labels(mean, label, len(self.labels), self.n_components, random_state=random_state)
        else:
            wanted = self.n_components or self._component_range
            start, curve = start_mixture(mean, wanted, random_state=random_state)
        if self.n_components is None:
            self.component_curve_ = curve
            self.module.build_mixture(len(start.weights))
        # What `load` will need to build the same module.
        self.init_params_["non_kwargs"]["n_components"] = self.n_components
        if not self.is_supervised:
            order = np.argsort(-start.weights, kind="stable")  # that of `weights`, if they are given
            start = start._replace(weights=start.weights[order], means=start.means[order])
        as_tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.module.device)
        self.module.set_mixture(*map(as_tensor, start), as_tensor(variance.mean(0)))

    def _components_of_labels(self) -> np.ndarray:
        codes = self.adata_manager.get_from_registry(REGISTRY_KEYS.LABELS_KEY).ravel().astype(int)
        return np.asarray(self.module.component_of_label)[codes]

    def _sort_components(self) -> None:
        """Number the components by decreasing size, here and in all results; those of labels stay in place."""
        sizes = np.bincount(self.predict(soft=True).to_numpy().argmax(1), minlength=self.n_components)
        n_fixed = len(self.labels) if self.is_supervised else 0
        order = np.r_[:n_fixed, n_fixed + np.argsort(-sizes[n_fixed:], kind="stable")]
        order = torch.as_tensor(order, device=self.module.device)
        self._versions = renumbered(self.module, self._versions, order)
        self.module.permute_components(order)


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


def _check_training_arguments(max_epochs: int | None, batch_size: int, train_size: float, lr: float) -> None:
    if max_epochs is not None and (not isinstance(max_epochs, int | np.integer) or max_epochs < 1):
        raise ValueError(f"`max_epochs` must be a whole number of at least 1, or None; found {max_epochs!r}.")
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1; found {batch_size!r}.")
    if not 0 < train_size <= 1:
        raise ValueError(f"`train_size` must be in (0, 1]; found {train_size!r}.")
    if not 0 < lr < np.inf:
        raise ValueError(f"`lr` must be positive{' and finite' if lr > 0 else ''}; found {lr!r}.")


def _check_objective(objective: Objective, n_warm_up_epochs: int | None, y_term: str) -> None:
    whole = {"n_samples": objective.n_samples, "n_importance_samples": objective.n_importance_samples}
    least = dict.fromkeys(whole, 1) | {"n_warm_up_epochs": 0}
    for name, value in (whole | {"n_warm_up_epochs": n_warm_up_epochs or 0}).items():
        if not isinstance(value, int | np.integer) or value < least[name]:
            raise ValueError(f"`{name}` must be a whole number of at least {least[name]}; found {value!r}.")
    weights = {name: getattr(objective, name) for name in ("kl_weight", "free_nats_y", "free_nats_z")}
    for name, value in weights.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"`{name}` must be a finite number of at least 0; found {value!r}.")
    if objective.n_importance_samples == 1:
        return
    others = {"n_samples": objective.n_samples > 1, "y_term": y_term != "kl"}
    others |= {name: weights[name] > 0 for name in ("free_nats_y", "free_nats_z")}
    clashing = [name for name, is_set in others.items() if is_set]
    if clashing:
        raise ValueError(
            f"`n_importance_samples` above 1 trains one bound that has no KL terms of its own; found also "
            f"{listed(clashing)}. Leave one or the other at its default"
            + (", that is y_term='kl'." if "y_term" in clashing else ".")
        )


def _check_precision(precision: object) -> None:
    if precision is not None and str(precision) not in ("32", "32-true"):
        raise ValueError(
            f"`precision` must be '32-true', in which log-likelihood and KL are tested; found {precision!r}. Pass "
            "matmul_precision='medium' instead, which takes bfloat16 for the matrix products alone."
        )
