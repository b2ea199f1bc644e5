"""Set-up of a model: counts and columns of obs that scvi-tools registers, and the same checks for data shown later."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import LayerField, NumericalJointObsField, NumericalObsField
from scvi.model.base import BaseMinifiedModeModelClass

from scvae_tools._data.counts import CountsError, digest_of_counts, read_counts, read_tables
from scvae_tools._data.loader import keep_counts, kept_counts, registered_columns
from scvae_tools._data.roles import ROLES, check_obs, warn_of_names_of_no_label
from scvae_tools._messages import listed
from scvae_tools._other_names import unknown_argument
from scvae_tools._train.progress import is_shown
from scvae_tools._upstream import (
    SETUP_ARGS,
    UsedCategoriesField,
    UsedCategoriesJointField,
    minified_type,
    quiet,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.data.fields import BaseAnnDataField

    from scvae_tools._data.roles import Role
    from scvae_tools._module.vae import VAE
    from scvae_tools._train.state import TrainingState


class SetupMixin(BaseMinifiedModeModelClass):
    """Set-up of `SCVAE`: `setup_anndata`, and the same checks for data that are shown later.

    All parts of the model share ``module``, its networks, and ``_state``, what a training changes beside their weights.
    """

    module: VAE
    _state: TrainingState

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
            AnnData with raw counts, (n_cells, n_genes), sparse or dense, in memory, in a file or lazy; obs and var of
            lazily read data are read into memory.
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
        if kwargs and "source_registry" not in kwargs:  # scvi-tools passes this whenever it passes any
            known = inspect.signature(cls.setup_anndata).parameters
            raise unknown_argument("setup_anndata", next(iter(kwargs)), [name for name in known if name != "kwargs"])
        obs_keys = {argument: setup_method_args[SETUP_ARGS][argument] for argument in ROLES}
        read_tables(adata)
        minified, counts = minified_type(adata), None
        if minified is None:
            options = {"layer": layer, "allow_non_integer": allow_non_integer}
            counts = read_counts(adata, **options, may_stay=True, progress=is_shown())
        # Of data that a trained set-up is transferred to, scvi-tools checks the categories itself.
        is_transferred, checks_labels = "source_registry" in kwargs, not kwargs.get("allow_missing_labels")
        unchecked = dict.fromkeys((["batch_key"] if is_transferred else []) + ([] if checks_labels else ["labels_key"]))
        unlabeled = unlabeled_category if checks_labels and not is_transferred else None
        check_obs(adata, unlabeled_category=unlabeled, **obs_keys | unchecked)
        if checks_labels and not is_transferred:
            warn_of_names_of_no_label(adata, labels_key, unlabeled_category)
        fields = [LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False)]
        fields += [_field_of(role, obs_keys[argument]) for argument, role in ROLES.items()]
        if minified is not None:
            fields += cls._get_fields_for_adata_minification(minified)
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        with quiet():
            manager.register_fields(adata, **kwargs)
        keep_counts(manager, counts)
        _note_data(manager, _digest_of(manager))
        manager.is_transferred = is_transferred
        cls.register_manager(manager)

    # -- what it was set up with ---------------------------------------------------------------------------------------

    @property
    def _setup(self) -> dict[str, Any]:
        """Arguments of `setup_anndata`."""
        return self.registry["setup_args"]

    @property
    def _registry(self) -> dict[str, Any]:
        """What scvi-tools takes the registry for in `update_setup_method_args`."""
        return self.registry

    @property
    def _obs_keys(self) -> dict[str, Any]:
        """Columns of ``obs`` by their roles."""
        return {argument: self._setup.get(argument) for argument in ROLES}

    @property
    def layer(self) -> str | None:
        """Layer of the counts; None for ``adata.X``."""
        return self._setup.get("layer")

    @property
    def allows_non_integer(self) -> bool:
        """Whether estimated counts are accepted."""
        return self._setup.get("allow_non_integer", False)

    @property
    def var_names(self) -> np.ndarray:
        """Names of the genes, (n_genes,)."""
        names = self.registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"]
        return np.asarray(names).astype(str)

    @property
    def label_categories(self) -> list[str]:
        """Names of the codes of the labels."""
        state = self.registry["field_registries"][REGISTRY_KEYS.LABELS_KEY]["state_registry"]
        return [str(name) for name in state["categorical_mapping"]]

    @property
    def labels(self) -> list[str]:
        """Names of the labels in ``labels_key``, without that of unlabelled cells; none if there is no such key."""
        if self._setup.get("labels_key") is None:
            return []
        unlabeled = self._setup.get("unlabeled_category")
        return [name for name in self.label_categories if unlabeled is None or name != str(unlabeled)]

    # -- data shown later ----------------------------------------------------------------------------------------------

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:  # noqa: FBT001, FBT002
        """Check data that the model has not seen as closely as those it was built on."""
        if adata is None and self.adata is None:
            raise ValueError("This model was loaded without data. Pass an AnnData with its genes.")
        if adata is None or adata is self.adata:
            self._check_own_counts()
            return self.adata  # its columns are kept: they need not be registered again after another set-up
        manager = self.get_anndata_manager(adata)
        is_known = manager is not None and _has_same_counts(manager)
        counts = kept_counts(manager) if is_known else None
        if minified_type(adata) is None:
            self._check_genes(adata)
            self._check_columns(adata)
            if not is_known:
                options = {"layer": self.layer, "allow_non_integer": self.allows_non_integer}
                counts = read_counts(adata, **options, may_stay=True, progress=is_shown())
        self._forget(adata)  # its columns may have changed since it was last shown
        with quiet():
            adata = super()._validate_anndata(adata, copy_if_view)
        transferred = self.get_anndata_manager(adata)
        keep_counts(transferred, counts)
        _note_data(transferred, manager.counts_digest if is_known else _digest_of(transferred))
        return adata

    def _forget(self, adata: AnnData) -> None:
        """Let the model forget the set-up that it has transferred to an AnnData."""
        self._per_instance_manager_store.get(self.id, {}).pop(adata.uns.get("_scvi_uuid"), None)

    def _check_own_counts(self) -> None:
        """Refuse the cells of the model where their counts are not those that it was built on."""
        manager = self.adata_manager
        if minified_type(self.adata) is None and hasattr(manager, "counts_digest") and not _has_same_counts(manager):
            where = "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]"
            raise CountsError(
                f"{where} must hold the counts that the model was built on; found others, or other cells. Was it "
                "normalised or filtered in place since? Put the counts back, and keep them: adata.layers['counts'] = "
                "adata.X.copy() before sc.pp.normalize_total, with layer='counts' for the model. Or pass cells with "
                "counts to the method."
            )

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

    def _check_columns(self, adata: AnnData, *, takes_new_batches: bool = False) -> None:
        """Check that ``obs`` holds what the model was set up with, of categories that it knows.

        With ``takes_new_batches`` batches may be new, if they are text as the known ones are or numbers as these are,
        and labels are not looked at.
        """
        batch_key, labels_key = self._obs_keys["batch_key"], self._obs_keys["labels_key"]
        self._check_columns_of(adata, self._obs_keys | ({"labels_key": None} if takes_new_batches else {}))
        for key, known in self._known_categories().items():
            if takes_new_batches and key == labels_key != batch_key:
                continue
            unknown = [each for each in adata.obs[key].unique().tolist() if each not in known]
            if takes_new_batches and key == batch_key:
                _check_kind(key, unknown, known)
            elif unknown:
                raise ValueError(
                    f"adata.obs[{key!r}] must hold categories that the model knows, {listed(known)}; found "
                    f"{listed(unknown)}. {self._remedy_for_categories(key, unknown, known)}"
                )

    def _check_columns_of(self, adata: AnnData, obs_keys: dict[str, Any]) -> None:
        """Check that ``obs`` has the columns of these roles, and that they hold what their roles need."""
        for argument, role in ROLES.items():
            for key in role.keys(obs_keys[argument], argument):
                if key not in adata.obs.columns:
                    raise ValueError(
                        f"Data for the model must have the column {key!r} in adata.obs, which was its `{argument}`; "
                        f"found {listed(adata.obs.columns)}. "
                        + (self._any_label_does() if argument == "labels_key" else "Add it.")
                    )
        check_obs(adata, is_new=True, **obs_keys)

    def _known_categories(self) -> dict[str, list]:
        """Categories of the batch, the labels and the covariates, by the column of ``obs``."""
        fields, known = self.registry["field_registries"], {}
        for argument, role in ROLES.items():
            state = fields.get(role.registry_key, {}).get("state_registry") or {}
            if role.is_categorical and self._obs_keys[argument] is not None:
                known |= (
                    state["mappings"]
                    if role.takes_several
                    else {self._obs_keys[argument]: state["categorical_mapping"]}
                )
        return {key: np.asarray(categories).tolist() for key, categories in known.items()}

    def _remedy_for_categories(self, key: str, unknown: list, known: list) -> str:
        setup = self._setup
        if {str(each) for each in unknown} <= {str(each) for each in known}:
            found, wanted = (type(values[0]).__name__ for values in (unknown, known))
            return f"Type {found} must be {wanted}: adata.obs[{key!r}] = adata.obs[{key!r}].astype({wanted})."
        if key == setup.get("batch_key"):
            return "Train the model on new batches with `SCVAE.load_query_data`, or leave these cells out."
        if key == setup.get("labels_key"):
            return self._any_label_does()
        return "Train a model on cells of these categories too, or leave these cells out."

    def _any_label_does(self) -> str:
        key = self._setup["labels_key"]
        return f"No result depends on it: any known label does, adata.obs[{key!r}] = {self._some_label()!r}."

    def _some_label(self) -> Any:
        """Some label that the model knows, as its column holds it."""
        return self._known_categories()[self._setup["labels_key"]][0]


def _check_kind(key: str, new: list, known: list) -> None:
    """Refuse new categories that are numbers where the known ones are text, or the other way round."""
    of_other_kind = [each for each in new if isinstance(each, str) != isinstance(known[0], str)]
    if of_other_kind:
        found, wanted = of_other_kind[0], known[0]
        raise ValueError(
            f"adata.obs[{key!r}] must hold categories of the type that the model knows, {type(wanted).__name__}, such "
            f"as {wanted!r}; found {type(found).__name__}, such as {found!r}. Convert the column: "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype({type(wanted).__name__})."
        )


def _digest_of(manager: AnnDataManager) -> int | None:
    """Digest of the counts of a manager; None where they are not in memory."""
    kept = kept_counts(manager)
    return digest_of_counts(manager.get_from_registry(REGISTRY_KEYS.X_KEY) if kept is None else kept)


def _note_data(manager: AnnDataManager, counts_digest: int | None) -> None:
    """Keep the columns as they are now, and the digest of the counts."""
    registered_columns(manager)
    manager.counts_digest = counts_digest


def _has_same_counts(manager: AnnDataManager) -> bool:
    """Whether the counts are those that were checked when the manager was made."""
    missing = object()
    return getattr(manager, "counts_digest", missing) == _digest_of(manager)


def _field_of(role: Role, keys: str | list[str] | None) -> BaseAnnDataField:
    """Field by which scvi-tools registers the columns of a role."""
    if role.takes_several:
        kind = UsedCategoriesJointField if role.is_categorical else NumericalJointObsField
        return kind(role.registry_key, keys)
    if role.is_categorical:
        return UsedCategoriesField(role.registry_key, keys)
    return NumericalObsField(role.registry_key, keys, required=False)
