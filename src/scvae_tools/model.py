"""SCVAE, the model class: the wiring of our modules to scvi-tools. It contains no formula."""

from __future__ import annotations

import functools
import inspect
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._utils import _get_adata_minify_type  # the hook that models with minified data share
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
    ObsmField,
)
from scvi.model._utils import parse_device_args
from scvi.model.base import ArchesMixin, BaseMinifiedModeModelClass, RNASeqMixin, VAEMixin
from scvi.model.base._save_load import _initialize_model

from scvae_tools import _keys
from scvae_tools._counts import check_obs, gene_mean_fraction, read_counts
from scvae_tools._gmvae import GMVAE, MixtureVAE, VaDE
from scvae_tools._messages import said_before, warn
from scvae_tools._networks import Covariates, Sizes
from scvae_tools._saving import ADATA_FILE, MODEL_FILE, read_saved, write_saved
from scvae_tools._start import count_communities, fit_mixture
from scvae_tools._training import (
    Progress,
    Settings,
    Stage,
    default_max_epochs,
    isolated_random_state,
    plan_stages,
    quiet,
    run_stage,
)
from scvae_tools._vae import N_REFERENCE_CELLS, VAE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MODULES: dict[str, type[VAE]] = {"none": VAE, "gmvae": GMVAE, "vade": VaDE}
EVALUATION_BATCH_SIZE = 512
#: The parameters of p(x|z) that scvi-tools knows, by our heads.
SCVI_PARAMETERS = {"log_rate": ("mean", "mu"), "log_r": ("dispersions", "theta"), "gate": ("dropout", "zi_probs")}

_is_seeded: ContextVar[bool] = ContextVar("is_seeded", default=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the outermost call; calls inside go on with its stream."""
    if _is_seeded.get():
        yield
        return
    token = _is_seeded.set(True)
    try:
        with isolated_random_state(seed):
            yield
    finally:
        _is_seeded.reset(token)


def _with_random_state(method: Callable) -> Callable:
    """Give a method of scvi-tools a ``random_state`` in place of its use of the global one."""

    @functools.wraps(method)
    def wrapped(self: SCVAE, *args: Any, random_state: int = 0, **kwargs: Any) -> Any:
        with _seeded(random_state), quiet():
            return method(self, *args, **kwargs)

    signature = inspect.signature(method)
    extra = inspect.Parameter("random_state", inspect.Parameter.KEYWORD_ONLY, default=0, annotation="int")
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    wrapped.__signature__ = signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])
    return wrapped


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


class SCVAE(RNASeqMixin, VAEMixin, ArchesMixin, BaseMinifiedModeModelClass):
    """Variational auto-encoder of counts, with a Gaussian mixture that clusters.

    scVAE (Grønbech et al. 2020, doi:10.1093/bioinformatics/btaa293) with the interface of scvi-tools.

    Parameters
    ----------
    adata
        AnnData that was passed to `setup_anndata`.
    registry
        Of a saved model, to build it without data; users call `load`.
    likelihood
        p(x|z): ``"poisson"``, ``"nb"``, ``"zip"`` or ``"zinb"``.
    mixture
        ``False`` for a plain VAE; ``True`` or ``"gmvae"`` for q(y|x) q(z|x,y), as in the paper; ``"vade"`` for one
        q(z|x) and a mixture prior, with one decoder pass a cell in place of one per component.
    n_components
        Number of components; None to count Leiden communities of the latent space before the mixture is trained.
    n_latent, n_hidden, n_layers, dropout_rate
        Size of the latent space, width and number of the hidden layers of encoder and decoder, and their dropout.
    dispersion
        Inverse dispersion per ``"gene"``, ``"gene-batch"`` or ``"gene-cell"``.
    covariance
        Of p(z|y): ``"diag"``, ``"tied"`` or ``"full"``.
    weights
        p(y): ``"learned"`` or ``"uniform"``.
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
        mixture: bool | Literal["gmvae", "vade"] = True,
        n_components: int | None = None,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.0,
        dispersion: str = "gene",
        covariance: str = "full",
        weights: str = "learned",
        normalization: str = "layer",
        posterior_variance: str = "per-dimension",
        encoder_input: str = "log1p-normalized",
        encode_covariates: bool = False,
        use_size_factor: bool = True,
        random_state: int = 0,
    ) -> None:
        self.init_params_ = self._get_init_params(locals())
        super().__init__(adata, registry)
        # scvi-tools keeps the managers, and with them the data, of every model in the class.
        weakref.finalize(self, type(self)._per_instance_manager_store.pop, self.id, None)
        kind = module_name(mixture)
        options = {} if kind == "none" else self._mixture_options(n_components, covariance, weights)
        with _seeded(random_state):
            self.module = MODULES[kind](
                self._sizes(),
                likelihood=likelihood,
                n_latent=n_latent,
                n_hidden=n_hidden,
                n_layers=n_layers,
                dropout_rate=dropout_rate,
                dispersion=dispersion,
                normalization=normalization,
                posterior_variance=posterior_variance,
                encoder_input=encoder_input,
                encode_covariates=encode_covariates,
                use_size_factor=use_size_factor,
                **options,
            )
            if adata is not None and self.minified_data_type is None:
                self._set_reference()
        self.module.minified_data_type = self.minified_data_type
        self._model_summary_string = (
            f"SCVAE with likelihood {likelihood!r}, mixture {kind!r}, n_components {self.n_components}, "
            f"n_latent {n_latent}, n_hidden {n_hidden}, n_layers {n_layers}"
        )

    def _mixture_options(self, n_components: int | None, covariance: str, weights: str) -> dict:
        n_cells = self.summary_stats.n_cells
        if n_components is not None and n_components > n_cells:
            raise ValueError(
                f"`n_components` must be at most the number of cells; found {n_components} components for {n_cells} "
                "cells. Pass fewer, or None to count Leiden communities."
            )
        return {"n_components": n_components, "covariance": covariance, "weights": weights}

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
            Columns of ``obs`` with the batch, which the decoder is given, and with labels.
        size_factor_key
            Column of ``obs`` with positive size factors; None for each cell's total count.
        categorical_covariate_keys, continuous_covariate_keys
            Further columns of ``obs`` that the decoder is given.
        allow_non_integer
            Accept estimated counts, with a warning.
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
        check_obs(
            adata,
            batch_key=None if "source_registry" in kwargs else batch_key,
            labels_key=None if kwargs.get("allow_missing_labels") else labels_key,
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
        """Names of the components: "0", "1", ... by decreasing number of cells of the data it was trained on."""
        return [str(component) for component in range(self.n_components or 0)]

    @property
    def is_mixture(self) -> bool:
        """Whether the mixture has been set from a trained latent space."""
        return isinstance(self.module, MixtureVAE) and self.module.is_mixture

    # -- training --------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 128,
        train_size: float = 0.9,
        validation_indices: Sequence[int] | None = None,
        early_stopping: bool = True,
        patience: int = 20,
        gradient_clip: float = 100.0,
        accelerator: str = "auto",
        devices: int | str = "auto",
        progress: bool = True,
        random_state: int = 0,
        **trainer_options: Any,
    ) -> None:
        """Train by stages: KL warm-up, VAE, and for a mixture the full bound from the VAE's latent space.

        Parameters
        ----------
        max_epochs
            Of all stages together; None for about 4,000 steps of 128 cells.
        lr, weight_decay
            Of Adam.
        batch_size
            Cells a step.
        train_size
            Share of the cells that are trained on; the others tell when to stop and which weights to keep.
        validation_indices
            Positions of the cells to hold out, in place of a random draw.
        early_stopping, patience
            Whether, and after how many epochs without a better validation ELBO, a stage ends.
        gradient_clip
            Largest norm of the gradient.
        accelerator, devices
            Of Lightning.
        progress
            Whether to show a bar with epoch, ELBO and time left.
        random_state
            Seed of split, order of cells and Monte Carlo samples.
        **trainer_options
            Further arguments of ``lightning.pytorch.Trainer``.

        Raises
        ------
        NonFiniteError
            If a term of the bound became NaN or infinite, also at a tenth of the learning rate.

        Notes
        -----
        Ctrl-C ends the training; the best weights so far are kept, and a warning says which.
        """
        if self.minified_data_type is not None:
            raise ValueError("A model of minified data cannot be trained: the counts are gone. Train before minifying.")
        _check_training_arguments(max_epochs, batch_size, train_size, lr)
        max_epochs = default_max_epochs(self.adata.n_obs) if max_epochs is None else max_epochs
        accelerator, devices, device = parse_device_args(accelerator, devices, return_device="torch")
        stages = plan_stages(
            max_epochs,
            mixture=isinstance(self.module, MixtureVAE),
            resumes_vae=self.is_trained_,
            resumes_mixture=self.is_mixture,
        )
        bar = Progress(stages, enable=progress)
        settings = Settings(
            lr, weight_decay, gradient_clip, early_stopping, patience, accelerator, devices, bar, trainer_options
        )
        with _seeded(random_state), quiet():
            self._split(train_size, validation_indices)
            loaders = self._loaders(batch_size)
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
        else:
            validation = np.asarray(validation_indices)
            train = np.setdiff1d(np.arange(n), validation)
        self.train_indices, self.validation_indices = np.sort(train), np.sort(validation)
        self.test_indices = np.array([], dtype=int)
        if (self.n_components or 1) > len(train):
            raise ValueError(
                f"`n_components` must be at most the number of training cells; found {self.n_components} components "
                f"for {len(train)} cells. Pass fewer, or a larger `train_size`."
            )

    def _loaders(self, batch_size: int) -> tuple[Iterable, Iterable | None]:
        # Batch norm cannot train on one cell; the order changes each epoch, so that no cell is left out for good.
        drops = self.module.normalization == "batch" and len(self.train_indices) % batch_size == 1
        train = self._make_data_loader(
            self.adata, self.train_indices, batch_size=batch_size, shuffle=True, drop_last=drops
        )
        if len(self.validation_indices) == 0:
            return train, None
        return train, self._make_data_loader(self.adata, self.validation_indices, batch_size=batch_size)

    def _run(self, stages: list[Stage], loaders: tuple, settings: Settings, random_state: int) -> None:
        """Run the stages; after an interruption set a mixture all the same, so that every result exists."""
        starts_mixture = isinstance(self.module, MixtureVAE) and not self.is_mixture
        interrupted = False
        for stage in stages:
            if stage.is_mixture and starts_mixture:
                self._start_mixture(random_state)
                if interrupted:
                    break
            if interrupted:
                continue
            n_before = len(self.history_) if self.history_ is not None else 0
            rows, interrupted = run_stage(self.module, stage, loaders, settings, first_epoch=n_before)
            self._append_history(rows)
            if interrupted:
                self._report_interruption(stage, len(rows))
            self.is_trained_ = True
        if starts_mixture and self.is_mixture:
            self._sort_components()

    def _append_history(self, rows: list[dict]) -> None:
        earlier = [] if self.history_ is None else [self.history_]
        self.history_ = pd.concat([*earlier, pd.DataFrame(rows)], ignore_index=True)

    def _report_interruption(self, stage: Stage, n_epochs: int) -> None:
        if len(self.history_) == 0:
            raise KeyboardInterrupt
        warn(
            f"Training was interrupted in stage {stage.name!r} after {n_epochs} of its at most {stage.max_epochs} "
            "epochs. Kept: the weights with the best validation ELBO of that stage, or else the last ones"
            + ("." if stage.is_mixture else "; the mixture, if any, is fitted to this latent space without training.")
        )

    def _start_mixture(self, random_state: int) -> None:
        """Set the mixture from the latent means of the training cells."""
        self.is_trained_ = True
        mean, variance = self.get_latent_representation(indices=self.train_indices, return_dist=True)
        if self.n_components is None:
            self.module.build_mixture(count_communities(mean, random_state=random_state))
            # What `load` will need to build the same module.
            self.init_params_["non_kwargs"]["n_components"] = self.n_components
        start = fit_mixture(mean, self.n_components, random_state=random_state)
        as_tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.module.device)
        self.module.set_mixture(*map(as_tensor, start), as_tensor(variance.mean(0)))

    def _sort_components(self) -> None:
        """Number the components by decreasing size, here and in all results."""
        sizes = self.predict(soft=True).to_numpy().argmax(1)
        order = np.argsort(-np.bincount(sizes, minlength=self.n_components), kind="stable")
        self.module.permute_components(torch.as_tensor(order, device=self.module.device))

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _batches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterable[dict[str, torch.Tensor]] | None = None,
        *,
        needs_counts: str | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Batches on the model's device, in evaluation mode and without gradients."""
        self._check_if_trained(warn=True)
        if needs_counts is not None and self.minified_data_type is not None:
            raise ValueError(f"{needs_counts} needs the counts, which minified data no longer hold.")
        if dataloader is None:
            adata = self._validate_anndata(adata)
            size = batch_size or EVALUATION_BATCH_SIZE
            dataloader = self._make_data_loader(adata, indices=indices, batch_size=size)
        self.module.eval()
        with _seeded(0):
            batches = iter(dataloader)  # draws a seed for its workers, if any, from the global state
        with torch.inference_mode():
            for tensors in batches:
                yield {name: value.to(self.module.device) for name, value in tensors.items()}

    def get_elbo_terms(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        n_samples: int = 1,
        dataloader: Iterable | None = None,
        random_state: int = 0,
    ) -> pd.DataFrame:
        """Evidence lower bound of each cell and its terms, in nats.

        Parameters
        ----------
        adata
            Data with the model's genes; None for the data of the model.
        indices
            Positions of the cells; None for all.
        batch_size
            Cells evaluated at a time.
        n_samples
            Monte Carlo samples of z per cell (and component).
        dataloader
            Batches, in place of ``adata``.
        random_state
            Seed of the samples.

        Returns
        -------
        One row per cell, with columns ``elbo``, ``log_likelihood``, ``kl_z`` and ``kl_y``.
        """
        names = ("elbo", "log_likelihood", "kl_z", "kl_y")
        rows = []
        with _seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size, dataloader, needs_counts="The ELBO"):
                bound = self.module.bound(*self.module.data(tensors), n_samples=n_samples)
                rows.append(torch.stack([getattr(bound, name) for name in names], dim=1).cpu())
        return pd.DataFrame(torch.cat(rows).double().numpy(), columns=list(names))

    def get_elbo(self, *args: Any, return_mean: bool = True, **kwargs: Any) -> float | np.ndarray:
        """Evidence lower bound in nats per cell; higher is better.

        Parameters
        ----------
        *args, **kwargs
            Those of `get_elbo_terms`.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        """
        values = self.get_elbo_terms(*args, **kwargs)["elbo"].to_numpy()
        return float(values.mean()) if return_mean else values

    def get_reconstruction_error(
        self, *args: Any, return_mean: bool = True, **kwargs: Any
    ) -> dict[str, float | np.ndarray]:
        """Negative log-likelihood −E log p(x|z), in nats per cell, under the key of scvi-tools.

        Parameters
        ----------
        *args, **kwargs
            Those of `get_elbo_terms`.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        """
        values = -self.get_elbo_terms(*args, **kwargs)["log_likelihood"].to_numpy()
        return {"reconstruction_loss": float(values.mean()) if return_mean else values}

    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 100,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        dataloader: Iterable | None = None,
        n_mc_samples_per_pass: int = 16,
        random_state: int = 0,
        **kwargs: Any,
    ) -> float | np.ndarray:
        """Importance-weighted lower bound of log p(x), in nats per cell; tight as the samples grow.

        The mixture's own prior and posterior are used: p(z) = Σ π_y p(z|y), q(z|x) = Σ q(y|x) q(z|x,y).

        Parameters
        ----------
        adata, indices, batch_size, dataloader, random_state
            As in `get_elbo_terms`.
        n_mc_samples, n_mc_samples_per_pass
            Importance samples per cell, and how many are evaluated at a time.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        **kwargs
            Ignored; scvi-tools passes some.
        """
        values = []
        with _seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size or 128, dataloader, needs_counts="log p(x)"):
                data = self.module.data(tensors)
                values.append(self.module.importance_weighted_bound(*data, n_mc_samples, n_mc_samples_per_pass).cpu())
        values = torch.cat(values).double().numpy()
        return float(values.mean()) if return_mean else values

    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        soft: bool = False,
        batch_size: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Most probable component of each cell, or the probabilities of all.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.
        soft
            Whether to return probabilities.

        Returns
        -------
        Names of components, (n_cells,), or a table of probabilities, cells x components.

        Raises
        ------
        ValueError
            If the model has no mixture, or was not trained.
        """
        if not self.is_mixture:
            kind = "has none" if not isinstance(self.module, MixtureVAE) else "has not been trained"
            raise ValueError(
                f"`predict` needs a mixture; this model {kind}. Build it with mixture=True or 'vade' and train it."
            )
        rows = []
        for tensors in self._batches(adata, indices, batch_size):
            if _keys.LATENT_PROBABILITIES in tensors:
                rows.append(tensors[_keys.LATENT_PROBABILITIES].cpu())
                continue
            posterior = self.module.posterior(self.module.encode(*self.module.data(tensors)))
            rows.append(self.module.probabilities(posterior).cpu())
        probabilities = torch.cat(rows).numpy()
        if not soft:
            return np.array(self.components)[probabilities.argmax(1)]
        names = (self.adata if adata is None else adata).obs_names
        index = names if indices is None else names[np.asarray(indices)]
        return pd.DataFrame(probabilities, index=index, columns=self.components)

    def iter_lambda(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[np.ndarray]:
        """λ in chunks of cells; see `get_lambda`."""
        genes = self._gene_positions(gene_list)
        if self.minified_data_type is not None and isinstance(self.module, GMVAE):
            raise ValueError(
                "λ of a GMVAE needs q(z|x,y) of each component, which minified data do not hold. Call `get_lambda` "
                "before minifying, or `get_normalized_expression` now."
            )
        for tensors in self._batches(adata, indices, batch_size or self._rate_batch_size()):
            if REGISTRY_KEYS.LATENT_QZM_KEY in tensors:
                _, size, covariates = self.module.data(tensors)
                px = self.module.decode(tensors[REGISTRY_KEYS.LATENT_QZM_KEY], size, covariates, genes)
                yield px.mu.cpu().numpy()
                continue
            yield self.module.rate(*self.module.data(tensors), genes=genes).cpu().numpy()

    def get_lambda(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        out: Any = None,
    ) -> Any:
        """Mean parameter λ of the count distribution before zero inflation, in counts.

        At the posterior means: λ = Σ_y q(y|x) λ(E[z|x,y]), the size factor of the cell included.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.
        gene_list
            Names of the genes; None for all.
        out
            Array-like of shape (n_cells, n_genes) to write into by rows, for example a memory map or a zarr array;
            None for a new array.

        Returns
        -------
        ``out``, or an array (n_cells, n_genes) float32.
        """
        start = 0
        n_cells = (self.adata if adata is None else adata).n_obs if indices is None else len(indices)
        for chunk in self.iter_lambda(adata, indices, gene_list, batch_size):
            out = np.empty((n_cells, chunk.shape[1]), dtype=np.float32) if out is None else out
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out

    def _rate_batch_size(self, bytes_at_once: int = 2**28) -> int:
        """Cells whose λ of all components takes a quarter of a gigabyte."""
        return int(np.clip(bytes_at_once // (4 * len(self.var_names) * (self.n_components or 1)), 1, 4096))

    def _gene_positions(self, gene_list: Sequence[str] | None) -> torch.Tensor | None:
        if gene_list is None:
            return None
        positions = pd.Index(self.var_names).get_indexer(list(gene_list))
        if (positions < 0).any():
            unknown = [gene for gene, at in zip(gene_list, positions, strict=True) if at < 0]
            raise ValueError(
                f"`gene_list` must name genes of the model; {len(unknown)} are not, the first {unknown[0]!r}. "
                "`model.var_names` lists them."
            )
        return torch.as_tensor(positions, device=self.module.device)

    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        give_mean: bool = False,  # noqa: FBT001, FBT002
        batch_size: int | None = None,
        dataloader: Iterable | None = None,
        random_state: int = 0,
    ) -> dict[str, np.ndarray]:
        """Parameters of p(x|z) at draws of z from q(z|x).

        Parameters
        ----------
        adata, indices, batch_size, dataloader, random_state
            As in `get_elbo_terms`.
        n_samples
            Draws of z per cell.
        give_mean
            Whether to average over the draws.

        Returns
        -------
        ``"mean"`` (λ, in counts) and, where the likelihood has them, ``"dispersions"`` (r) and ``"dropout"``
        (probability of an excess zero); each (n_cells, n_genes), or (n_samples, n_cells, n_genes).
        """
        named = [SCVI_PARAMETERS[head.name] for head in self.module.likelihood.heads]
        values: dict[str, list[torch.Tensor]] = {key: [] for key, _ in named}
        with _seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size or 128, dataloader):
                options = {"inference_kwargs": {"n_samples": n_samples}, "compute_loss": False}
                px = self.module(tensors, **options)[1]["px"]
                for key, attribute in named:
                    value = getattr(px, attribute).expand(px.batch_shape)
                    averages = give_mean and n_samples > 1
                    values[key].append((value.mean(0) if averages else value).cpu())
        return {key: torch.cat(value, dim=-2).numpy() for key, value in values.items()}

    def sample(
        self,
        n_cells: int = 1000,
        *,
        components: str | Sequence[str] | None = None,
        batch: str | None = None,
        batch_size: int = EVALUATION_BATCH_SIZE,
        random_state: int = 0,
    ) -> AnnData:
        """New cells from the generative model: y, z, then counts.

        Size factors and covariates are drawn, jointly, from those of the cells that the model was built on.

        Parameters
        ----------
        n_cells
            Their number.
        components
            Component of all, or of each; None to draw them from p(y).
        batch
            Category of the batch; None to draw it with the other covariates.
        batch_size
            Cells decoded at a time.
        random_state
            Seed.

        Returns
        -------
        Counts (n_cells, n_genes) as CSR float32, with ``obs["size_factor"]``, ``obs["batch"]``, for a mixture
        ``obs["component"]``, and ``obsm["X_latent"]``.
        """
        chosen = self._chosen_components(components, n_cells)
        with _seeded(random_state), torch.inference_mode():
            z, y = self.module.sample_latent(n_cells, chosen)
            rows = self._reference_rows(n_cells, batch)
            size, covariates = self.module.reference(rows)
            if batch is not None:
                covariates = covariates._replace(batch=torch.full_like(covariates.batch, self._batch_code(batch)))
            counts = [
                sparse.csr_matrix(self.module.decode(z[at], size[at], covariates.rows(at)).sample().cpu().numpy())
                for at in torch.arange(n_cells, device=z.device).split(batch_size)
            ]
        obs = pd.DataFrame(index=[f"sample{i}" for i in range(n_cells)])
        obs["size_factor"] = size[:, 0].cpu().numpy()
        obs["batch"] = pd.Categorical(self._batch_categories()[covariates.batch[:, 0].cpu().numpy()])
        if self.is_mixture:
            obs["component"] = pd.Categorical(np.array(self.components)[y.cpu().numpy()], categories=self.components)
        return AnnData(
            sparse.vstack(counts, format="csr"),
            obs=obs,
            var=pd.DataFrame(index=self.var_names),
            obsm={"X_latent": z.cpu().numpy()},
        )

    def _chosen_components(self, components: str | Sequence[str] | None, n_cells: int) -> torch.Tensor | None:
        if components is None:
            return None
        if not self.is_mixture:
            raise ValueError("`components` needs a trained mixture; this model has none. Leave it out.")
        names = [components] * n_cells if isinstance(components, str | int) else list(components)
        if len(names) != n_cells:
            raise ValueError(f"`components` must be one, or one for each of {n_cells} cells; found {len(names)}.")
        positions = pd.Index(self.components).get_indexer([str(name) for name in names])
        if (positions < 0).any():
            unknown = names[int(np.argmax(positions < 0))]
            raise ValueError(f"`components` must be among {', '.join(self.components)}; found {unknown!r}.")
        return torch.as_tensor(positions, device=self.module.device)

    def _batch_categories(self) -> np.ndarray:
        state = self.registry["field_registries"][REGISTRY_KEYS.BATCH_KEY]["state_registry"]
        return np.asarray(state["categorical_mapping"])

    def _batch_code(self, batch: str) -> int:
        categories = self._batch_categories()
        if batch not in categories:
            raise ValueError(f"`batch` must be one of {', '.join(map(repr, categories))}; found {batch!r}.")
        return int(np.flatnonzero(categories == batch)[0])

    def _reference_rows(self, n_cells: int, batch: str | None) -> torch.Tensor:
        """Rows of the kept size factors and covariates; those of the batch, if it has any."""
        known = self.module.reference_batch[:, 0]
        rows = torch.arange(len(known), device=known.device)
        if batch is not None and (known == self._batch_code(batch)).any():
            rows = rows[known == self._batch_code(batch)]
        return rows[torch.randint(len(rows), (n_cells,), device=rows.device)]

    get_latent_representation = _with_random_state(VAEMixin.get_latent_representation)
    get_normalized_expression = _with_random_state(RNASeqMixin.get_normalized_expression)
    posterior_predictive_sample = _with_random_state(RNASeqMixin.posterior_predictive_sample)
    get_feature_correlation_matrix = _with_random_state(RNASeqMixin.get_feature_correlation_matrix)

    @functools.wraps(RNASeqMixin.differential_expression)
    def differential_expression(
        self, adata: AnnData | None = None, *args: Any, random_state: int = 0, **kwargs: Any
    ) -> pd.DataFrame:
        data = self._validate_anndata(adata)
        columns = set(data.obs)
        try:
            with _seeded(random_state), quiet():
                return super().differential_expression(data, *args, **kwargs)
        finally:
            for column in set(data.obs) - columns:
                del data.obs[column]

    # -- minified data, saving, new data ---------------------------------------------------------------------------

    def minify_adata(self, minified_data_type: str = "latent_posterior_parameters", **kwargs: Any) -> None:
        """Replace the model's data by a copy with the posterior in place of the counts.

        Parameters
        ----------
        minified_data_type
            ``"latent_posterior_parameters"``, or ``"latent_posterior_parameters_with_counts"`` to keep the counts too.
        **kwargs
            Ignored: the posterior is computed here, whatever keys scvi-tools would read it from.
        """
        del kwargs
        mean, variance = self.get_latent_representation(return_dist=True)
        posterior = {_keys.LATENT_MEAN: mean, _keys.LATENT_VARIANCE: variance}
        ones = np.ones((len(mean), 1), dtype=np.float32)
        posterior[_keys.LATENT_PROBABILITIES] = self.predict(soft=True).to_numpy() if self.is_mixture else ones
        original = self.adata
        original.obsm.update(posterior)
        try:
            with quiet():
                super().minify_adata(minified_data_type, _keys.LATENT_MEAN, _keys.LATENT_VARIANCE)
        finally:
            for key in posterior:
                del original.obsm[key]

    @classmethod
    def _get_fields_for_adata_minification(cls, minified_data_type: str) -> list:
        fields = super()._get_fields_for_adata_minification(minified_data_type)
        return [*fields, ObsmField(_keys.LATENT_PROBABILITIES, _keys.LATENT_PROBABILITIES)]

    def save(
        self,
        dir_path: str | Path,
        prefix: str | None = None,
        overwrite: bool = False,  # noqa: FBT001, FBT002
        save_anndata: bool = False,  # noqa: FBT001, FBT002
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model: weights, registry, history and version; read with ``torch.load(weights_only=True)``.

        Parameters
        ----------
        dir_path
            Directory, made if need be.
        prefix
            Of the file names.
        overwrite
            Whether the directory may exist.
        save_anndata
            Whether to write the data beside the model.
        **anndata_write_kwargs
            Of ``AnnData.write_h5ad``.
        """
        directory = Path(dir_path)
        if directory.exists() and not overwrite:
            raise ValueError(f"{str(dir_path)!r} exists already. Pass another directory, or overwrite=True.")
        directory.mkdir(parents=True, exist_ok=True)
        attributes = {n: v for n, v in self._get_user_attributes() if n.endswith("_") and not n.startswith("_")}
        write_saved(directory / f"{prefix or ''}{MODEL_FILE}", self.module.state_dict(), attributes, self.var_names)
        if save_anndata:
            self.adata.write_h5ad(directory / f"{prefix or ''}{ADATA_FILE}", **anndata_write_kwargs)

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        **kwargs: Any,
    ) -> SCVAE:
        """Load a saved model, with or without data.

        Parameters
        ----------
        dir_path, prefix
            As in `save`.
        adata
            Data with the model's genes. None for the data saved beside the model, if there are any; otherwise the
            model works on the data passed to its methods.
        accelerator, device
            Where the model goes.
        **kwargs
            Ignored; scvi-tools passes some.

        Raises
        ------
        FileNotFoundError
            If there is no model.
        """
        path = Path(dir_path) / f"{prefix or ''}{MODEL_FILE}"
        state, attributes, _ = read_saved(path)
        saved_data = path.with_name(f"{prefix or ''}{ADATA_FILE}")
        if adata is None and saved_data.exists():
            import anndata

            adata = anndata.read_h5ad(saved_data)
        registry = attributes.pop("registry_")
        if registry["model_name"] != cls.__name__:
            raise ValueError(f"{str(path)!r} holds a model of class {registry['model_name']!r}, not {cls.__name__!r}.")
        if adata:
            cls.setup_anndata(adata, source_registry=registry, **registry["setup_args"])
        model = _initialize_model(cls, adata, registry, attributes, None)
        model.module.load_state_dict(state)
        *_, torch_device = parse_device_args(accelerator, device, return_device="torch", validate_single_device=True)
        model.to_device(torch_device)
        model.module.eval()
        return model

    @classmethod
    def load_query_data(cls, adata: AnnData, reference_model: str | Path | SCVAE, *args: Any, **kwargs: Any) -> SCVAE:
        """Map new data onto a trained model (scArches, Lotfollahi et al. 2022, doi:10.1038/s41587-021-01001-7).

        New batches get their own columns in the first layers; ``train`` adapts these and leaves the rest as it is.

        Parameters
        ----------
        adata
            New data with the model's genes.
        reference_model
            Trained model, or the directory where one is saved.
        **kwargs
            Those of ``scvi.model.base.ArchesMixin.load_query_data``.
        """
        reference = reference_model if isinstance(reference_model, SCVAE) else cls.load(reference_model)
        reference._check_genes(adata)
        with quiet(), _seeded(0):
            query = super().load_query_data(adata, reference, **kwargs)
        query.module.extend_batches(reference.module.sizes.n_batch, freeze=not kwargs.get("unfrozen", False))
        return query


def _check_training_arguments(max_epochs: int | None, batch_size: int, train_size: float, lr: float) -> None:
    if max_epochs is not None and (not isinstance(max_epochs, int | np.integer) or max_epochs < 1):
        raise ValueError(f"`max_epochs` must be a whole number of at least 1, or None; found {max_epochs!r}.")
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1; found {batch_size!r}.")
    if not 0 < train_size <= 1:
        raise ValueError(f"`train_size` must be in (0, 1]; found {train_size!r}.")
    if not 0 < lr < np.inf:
        raise ValueError(f"`lr` must be positive{' and finite' if lr > 0 else ''}; found {lr!r}.")
