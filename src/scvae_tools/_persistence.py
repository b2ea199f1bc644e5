"""How a model outlives its data: minified data, saving and loading, mapping of new data. Methods of `SCVAE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scvi.data.fields import ObsmField
from scvi.model._utils import parse_device_args
from scvi.model.base import ArchesMixin, BaseMinifiedModeModelClass
from scvi.model.base._save_load import _initialize_model

from scvae_tools import _keys
from scvae_tools._counts import listed
from scvae_tools._random import seeded
from scvae_tools._saving import ADATA_FILE, MODEL_FILE, read_saved, write_saved
from scvae_tools._training import quiet

if TYPE_CHECKING:
    from anndata import AnnData


class PersistenceMixin(ArchesMixin, BaseMinifiedModeModelClass):
    """Saving and transfer of `SCVAE`."""

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
    ) -> Self:
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
    def load_query_data(cls, adata: AnnData, reference_model: str | Path | Self, **kwargs: Any) -> Self:
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
        reference = reference_model if isinstance(reference_model, cls) else cls.load(reference_model)
        reference._check_genes(adata)
        reference._check_labels(adata)
        with quiet(), seeded(0):
            query = super().load_query_data(adata, reference, **kwargs)
        query.module.extend_batches(reference.module.sizes.n_batch, freeze=not kwargs.get("unfrozen", False))
        return query

    def _check_labels(self, adata: AnnData) -> None:
        """Refuse labels that have no component, where labels train the components."""
        if not self.is_supervised:
            return
        setup = self.registry["setup_args"]
        key, unlabeled = setup["labels_key"], setup.get("unlabeled_category")
        known = listed(self._label_categories)
        rule = f"adata.obs[{key!r}] must hold labels of the reference model ({known})"
        remedy = f"Give cells without one of them {unlabeled!r}." if unlabeled is not None else "Correct the labels."
        if key not in adata.obs:
            raise ValueError(f"{rule}; found no such column. {remedy}")
        labels = adata.obs[key].astype(str)
        is_new = ~labels.isin(self._label_categories)
        if is_new.any():
            raise ValueError(f"{rule}; found {labels[is_new].iloc[0]!r} in {is_new.sum():,} cells. {remedy}")
