"""Saving and loading of a model, its versions, minified data, and mapping of new data. Methods of `SCVAE`."""

from __future__ import annotations

import functools
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from scvi.data import AnnDataManager
from scvi.data.fields import ObsmField
from scvi.model.base import ArchesMixin

from scvae_tools import _keys
from scvae_tools._adata_files import n_bytes_of
from scvae_tools._checks import check_choice
from scvae_tools._data.counts import require_anndata
from scvae_tools._files import digest_of_names, remove, require_room
from scvae_tools._messages import listed
from scvae_tools._random import seeded
from scvae_tools._train.processes import present
from scvae_tools._train.torch_file import FoundError, damaged_otherwise
from scvae_tools._train.versions import VERSIONS, packed, unpacked
from scvae_tools._upstream import initialize_model, pad_and_sort_genes, parse_device_args, quiet
from scvae_tools.model._fit import FitMixin
from scvae_tools.model._saved_data import read_beside, write_beside
from scvae_tools.model._saved_file import ADATA_FILE, MODEL_FILE, RULE, read_saved, write_saved

if TYPE_CHECKING:
    from anndata import AnnData


class PersistenceMixin(ArchesMixin, FitMixin):
    """Versions, saving and transfer of `SCVAE`."""

    @property
    def versions(self) -> pd.DataFrame:
        """Versions of the weights that the last training has left, one row each.

        The index names them: ``"end"``, after the last epoch; ``"best"``, those of the best validation ELBO in the last
        stage, which are in use after a training; ``"early_stop"``, the best at the time when ``patience`` epochs had
        first passed without a better one, with ``early_stopping=True`` the same as the best. Without held-out cells
        there is only the end. Columns: ``epoch``, as the `history` counts, and ``elbo_validation`` in nats per cell;
        NaN where it is not known, as without held-out cells, and for the end of a training that was interrupted.
        """
        found = self._state.versions
        rows = [found[name] for name in VERSIONS if name in found]
        return pd.DataFrame(
            {
                "epoch": np.array([each.epoch for each in rows], dtype=int),
                "elbo_validation": np.array([each.elbo for each in rows], dtype=float),
            },
            index=pd.Index([name for name in VERSIONS if name in found], name="version", dtype=object),
        )

    @property
    def version(self) -> str | None:
        """Name of the `versions` whose weights are in use; None if there are none."""
        return self._state.version

    def use_version(self, name: str) -> None:
        """Switch to other weights of the last training, for all that the model computes, saves or trains from then on.

        The components have the same numbers in all versions. Results that were written before stay as they are.

        Parameters
        ----------
        name
            One of `versions`.

        Raises
        ------
        ValueError
            If there is no such version; it says why.
        """
        if name not in self._state.versions:
            known = ", ".join(map(repr, self.versions.index)) or "none"
            rule = f"`use_version` must be given a version that the model has ({known})"
            raise ValueError(f"{rule}; found {name!r}. {_why(name)}")
        if self.minified_data_type is not None and name != self.version:
            raise ValueError(
                f"The minified data hold what the weights in use, {self.version!r}, say of the cells; found another "
                f"version, {name!r}. Call `use_version` before `minify_adata`."
            )
        self.module.load_state_dict(self._state.versions[name].state)
        self._state.version = name

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
        known = ("latent_posterior_parameters", "latent_posterior_parameters_with_counts")
        check_choice("minified_data_type", minified_data_type, known)
        self._fit_reference()  # as long as the counts are there
        mean, variance = self.get_latent_representation(return_dist=True)
        posterior = {_keys.LATENT_MEAN: mean, _keys.LATENT_VARIANCE: variance}
        ones = np.ones((len(mean), 1), dtype=np.float32)
        posterior[_keys.LATENT_PROBABILITIES] = self._probabilities().numpy() if self.is_mixture else ones
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
        *,
        versions: bool = True,
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
            Whether the directory may exist. A model in it is replaced, and data beside that are removed or replaced.
        save_anndata
            Whether to write the data beside the model.
        versions
            Whether to write all `versions` of the weights, and not only those in use. Each that differs from the others
            takes as much room as the weights: mostly two, which double the file, with ``early_stopping=False`` up to
            three.
        **anndata_write_kwargs
            Of ``AnnData.write_h5ad``.

        Raises
        ------
        OSError
            If the disk is full. What was in the directory before is left as it was.

        Notes
        -----
        Whenever the process ends, `load` finds the former model and its data or the new ones, both whole.

        What `get_fit` needs of the held-out cells is saved too, for the weights in use; where it was not needed before,
        up to 2,000 of these cells are decoded now.

        In a script that has trained on several devices, all processes must call `save`: one writes, and the others go
        on when the model is there (docs/devices.md).
        """
        write = functools.partial(self._write, Path(dir_path), prefix, **anndata_write_kwargs)
        present().of_first(lambda: write(overwrite=overwrite, save_anndata=save_anndata, versions=versions))

    def _write(
        self,
        directory: Path,
        prefix: str | None,
        *,
        overwrite: bool,
        save_anndata: bool,
        versions: bool,
        **anndata_write_kwargs: Any,
    ) -> None:
        if directory.exists() and not overwrite:
            raise ValueError(f"{str(directory)!r} exists already. Pass another directory, or overwrite=True.")
        directory.mkdir(parents=True, exist_ok=True)
        attributes = {n: v for n, v in self._get_user_attributes() if n.endswith("_") and not n.startswith("_")}
        attributes["cells_"] = self._digest_of_cells if self.adata is None else digest_of_names(self.adata.obs_names)
        state = {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        kept = {name: each for name, each in self._state.versions.items() if versions or name == self.version}
        attributes["fit_"] = self._fits_to_plain()
        attributes["data_"] = secrets.token_hex(8) if save_anndata else None
        content = state, attributes, self.var_names, packed(kept, self.version, state)
        path, data = _model_file(directory, prefix), directory / f"{prefix or ''}{ADATA_FILE}"
        if save_anndata:
            if not anndata_write_kwargs:  # how far these compress is not known
                require_room(data, n_bytes_of(self.adata))
            write_model, mark = functools.partial(write_saved, path, *content), attributes["data_"]
            write_beside(write_model, self.adata, data, path, mark, **anndata_write_kwargs)
        else:
            write_saved(path, *content)
            remove(data)  # `load` would take those of an earlier model for this one's

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        *,
        version: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved model, with or without data.

        Parameters
        ----------
        dir_path, prefix
            As in `save`.
        adata
            Data with the model's genes. None for the data saved beside the model, if there are any; otherwise the
            model works on the data passed to its methods. Where the cells have other names than those that the model
            was trained on, none of them counts as trained on or held out.
        accelerator, device
            Where the model goes.
        version
            One of the saved `versions`; None for that which was in use.
        **kwargs
            Ignored; scvi-tools passes some.

        Raises
        ------
        FileNotFoundError
            If there is no model.
        ValueError
            If it is of another class, or has no such version; if a file is damaged or of a later format, or the data
            are not those of the model.
        """
        path = _model_file(dir_path, prefix)
        state, attributes, _, versions = read_saved(path)
        saved_data = path.with_name(f"{prefix or ''}{ADATA_FILE}")
        mark, fits = attributes.pop("data_", None), attributes.pop("fit_", None)
        if adata is None:
            adata = read_beside(saved_data, path, mark)
        adata = adata.copy() if adata is not None and adata.is_view else adata
        registry = attributes.pop("registry_")
        if registry["model_name"] != cls.__name__:
            raise ValueError(f"{str(path)!r} holds a model of class {registry['model_name']!r}, not {cls.__name__!r}.")
        if adata:
            _set_up(cls, adata, registry, path)
        cells = attributes.pop("cells_", None)
        with damaged_otherwise(path, RULE):
            model = initialize_model(cls, adata, registry, attributes, None)
            model.module.load_state_dict(state)
            model._state.versions, model._state.version = unpacked(versions)
            model._take_fits(fits)
        model._digest_of_cells = cells
        if adata and cells not in (None, digest_of_names(adata.obs_names)):
            model._forget_split()
        if version is not None:
            model.use_version(version)
        *_, torch_device = parse_device_args(accelerator, device, return_device="torch", validate_single_device=True)
        model.to_device(torch_device)
        model.module.eval()
        return model

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData,
        reference_model: str | Path | Self,
        *,
        inplace_subset_query_vars: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Map new data onto a trained model (scArches, Lotfollahi et al. 2022, doi:10.1038/s41587-021-01001-7).

        New batches get their own columns in the first layers; ``train`` adapts these and leaves the rest as it is.

        Parameters
        ----------
        adata
            New data with the model's genes; a view is copied.
        reference_model
            Trained model, or the directory where one is saved.
        inplace_subset_query_vars
            Whether to take the genes of the model from ``adata``, in its order; the others are removed from ``adata``.
        **kwargs
            The others are those of ``scvi.model.base.ArchesMixin.load_query_data``.

        Raises
        ------
        ValueError
            If genes are missing, or a column of ``obs`` is missing or does not fit that of the reference.
        """
        require_anndata(adata)
        reference = reference_model if isinstance(reference_model, cls) else cls.load(reference_model)
        adata = adata.copy() if adata.is_view else adata
        names = reference.var_names
        takes_genes = inplace_subset_query_vars and set(names) <= set(adata.var_names)
        if not takes_genes:
            reference._check_genes(adata)
        reference._check_columns(adata, takes_new_batches=True)
        reference._check_labels(adata)
        if takes_genes:
            adata._inplace_subset_var(names)
        with quiet(), seeded(0):
            query = super().load_query_data(adata, reference, **kwargs)
        query.module.extend_batches(reference.module.sizes.n_batch, freeze=not kwargs.get("unfrozen", False))
        query._forget_split()
        query._inherited_fit = None if kwargs.get("unfrozen", False) else reference._fit_reference_if_possible()
        return query

    @classmethod
    def prepare_query_anndata(
        cls,
        adata: AnnData,
        reference_model: str | Path | Self,
        return_reference_var_names: bool = False,  # noqa: FBT001, FBT002
        inplace: bool = True,  # noqa: FBT001, FBT002
    ) -> AnnData | pd.Index | None:
        """Give new data the genes of a model, in its order; genes that they lack have no counts.

        Parameters
        ----------
        adata
            New data.
        reference_model
            Model, or the directory where one is saved.
        return_reference_var_names
            Whether to return the names of the model's genes instead.
        inplace
            Whether to change ``adata``, or to return new data.

        Raises
        ------
        FileNotFoundError
            If there is no model in the directory.
        ValueError
            If the data have none of the genes.
        """
        is_model = isinstance(reference_model, PersistenceMixin)
        names = reference_model.var_names if is_model else read_saved(_model_file(reference_model)).var_names
        names = pd.Index(np.asarray(names, dtype=object))
        return names if return_reference_var_names else pad_and_sort_genes(adata, names, inplace)

    @classmethod
    def load_registry(cls, dir_path: str | Path, prefix: str | None = None) -> dict[str, Any]:
        """Registry of a saved model: what `setup_anndata` was given, and what it found.

        Parameters
        ----------
        dir_path, prefix
            As in `save`.

        Raises
        ------
        FileNotFoundError
            If there is no model.
        """
        return read_saved(_model_file(dir_path, prefix)).attributes["registry_"]

    @classmethod
    def view_setup_args(cls, dir_path: str | Path, prefix: str | None = None) -> None:
        """Print what `setup_anndata` was given for a saved model.

        Parameters
        ----------
        dir_path, prefix
            As in `save`.

        Raises
        ------
        FileNotFoundError
            If there is no model.
        """
        AnnDataManager.view_setup_method_args(cls.load_registry(dir_path, prefix))

    @classmethod
    def convert_legacy_save(cls, dir_path: str | Path, *_: Any, **__: Any) -> None:
        """Refused: no model of this class was saved in the former format of scvi-tools, whose files can run code."""
        raise NotImplementedError(
            f"{str(dir_path)!r} cannot be converted: models of {cls.__name__} were never saved in the former format of "
            "scvi-tools, and reading it would run code that the files hold. SCVAE.load reads what SCVAE.save wrote."
        )

    @classmethod
    def prepare_query_mudata(cls, *_: Any, **__: Any) -> None:
        """Refused: a model is of one modality."""
        raise NotImplementedError(
            f"{cls.__name__} is a model of one modality. Pass the AnnData with the counts, such as mdata.mod['rna'], "
            "to SCVAE.prepare_query_anndata."
        )

    def _forget_split(self) -> None:
        """Take no cell for one that was trained on or held out: the positions are those of other data."""
        self.train_indices = self.validation_indices = self.test_indices = None

    def _check_labels(self, adata: AnnData) -> None:
        """Refuse labels that have no component, where labels train the components."""
        if not self.is_supervised:
            return
        setup = self._setup
        key, unlabeled = setup["labels_key"], setup.get("unlabeled_category")
        known = listed(self.label_categories)
        rule = f"adata.obs[{key!r}] must hold labels of the reference model ({known})"
        remedy = f"Give cells without one of them {unlabeled!r}." if unlabeled is not None else "Correct the labels."
        if key not in adata.obs:
            raise ValueError(f"{rule}; found no such column. {remedy}")
        labels = adata.obs[key].astype(str)
        is_new = ~labels.isin(self.label_categories)
        if is_new.any():
            raise ValueError(f"{rule}; found {labels[is_new].iloc[0]!r} in {is_new.sum():,} cells. {remedy}")


def _model_file(directory: str | Path, prefix: str | None = None) -> Path:
    return Path(directory) / f"{prefix or ''}{MODEL_FILE}"


def _set_up(cls: type[PersistenceMixin], adata: AnnData, registry: dict[str, Any], path: Path) -> None:
    """Set up data by the registry of a saved model; a ValueError is due to the data."""
    try:
        cls.setup_anndata(adata, source_registry=registry, **registry["setup_args"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        with damaged_otherwise(path, RULE):
            raise FoundError("a registry of other data sets or of none") from error


def _why(name: str) -> str:
    """Reason why there may be no version of this name, and remedy."""
    if name not in VERSIONS:
        return f"The names are {listed(list(VERSIONS))}."
    return f"{name!r} is not there: {VERSIONS[name]}; models saved with `versions=False` keep that in use alone."
