"""Cells that a model reads: its own cells in batches, and other cells, checked and shown to it for a while."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvae_tools._checks import cell_positions, check_whole
from scvae_tools._data.counts import digest_of_counts, read_counts
from scvae_tools._data.host_windows import WindowLoader
from scvae_tools._data.loader import EVALUATION_BATCH_SIZE, CountDataset, CountLoader, kept_counts
from scvae_tools._data.roles import columns_in
from scvae_tools._data.stored import StoredCounts
from scvae_tools._data.windows import held_on_device
from scvae_tools._files import digest_of_names
from scvae_tools._messages import said_before
from scvae_tools._random import seeded
from scvae_tools._threads import sleeping_threads
from scvae_tools._train.progress import is_shown
from scvae_tools.model._setup import SetupMixin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scipy.sparse import csr_matrix

    from scvae_tools._data.resident import ResidentCells
    from scvae_tools._data.windows import CellWindows


#: Share of the cells from which on all of them are copied to a device in order to read these; chosen, not measured.
SMALLEST_SHARE_TO_COPY = 0.1


#: AnnData of the user by the id of a model that has been given a copy of the counts; kept alive by neither.
_ANNOTATED: weakref.WeakValueDictionary[str, AnnData] = weakref.WeakValueDictionary()


class CellsMixin(SetupMixin):
    """Reading of cells by `SCVAE`."""

    _data_loader_cls = CountLoader
    #: Digests of the names and of the counts of the cells that the split counts, of a model without these cells.
    _digest_of_cells: str | None = None
    _digest_of_counts: int | None = None
    _held: ResidentCells | CellWindows | None = None  #: cells of the model on the device that trains, while it does

    @torch.inference_mode()
    def _batches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterable[dict[str, torch.Tensor]] | None = None,
        *,
        needs_counts: str | None = None,
        **options: Any,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Batches on the model's device, for a module in evaluation mode; ``options`` are of the loader."""
        self._check_if_trained(warn=True)
        if needs_counts is not None and self.minified_data_type is not None:
            raise ValueError(f"{needs_counts} needs the counts, which minified data no longer hold.")
        if dataloader is None:
            adata = self._validate_anndata(adata)
            size = check_whole("batch_size", batch_size, or_none=True) or EVALUATION_BATCH_SIZE
            positions = cell_positions(indices, adata.n_obs)
            held = self._cells_on_device(adata, positions)
            if held is None:
                dataloader = self._make_data_loader(adata, indices=positions, batch_size=size, **options)
            else:
                dataloader = held.batches(positions, size)
        self.module.eval()
        with seeded(0):
            batches = iter(dataloader)  # draws a seed for its workers, if any, from the global state
        with sleeping_threads():
            for tensors in batches:
                yield self.module.moved(tensors)

    def _cells_on_device(self, adata: AnnData, positions: np.ndarray) -> ResidentCells | CellWindows | None:
        """Cells on the device of the model, or None where their batches are made by the host.

        They are copied to a CUDA device for one pass over many of them.
        """
        if self._held is not None and adata is self.adata:
            return self._held
        if self.module.device.type != "cuda" or self.minified_data_type is not None:
            return None
        if len(positions) < SMALLEST_SHARE_TO_COPY * adata.n_obs:
            return None
        manager = self.get_anndata_manager(adata, required=True)
        return held_on_device(CountDataset(manager, self.module.likelihood), self.module.device, hold=None)

    def _make_data_loader(self, adata: AnnData, indices: Sequence[int] | None = None, **options: Any) -> Iterable:
        """Loader of cells given by position or by one boolean each."""
        indices = cell_positions(indices, adata.n_obs, may_be_none=True)
        manager = self.get_anndata_manager(adata, required=True)
        if kept_counts(manager) is not None:
            indices = np.arange(adata.n_obs) if indices is None else indices
            dataset = CountDataset(manager, self.module.likelihood)
            return WindowLoader(dataset, indices, options.get("batch_size") or EVALUATION_BATCH_SIZE)
        return super()._make_data_loader(adata, indices, likelihood=self.module.likelihood, **options)

    def counts_of_model(self) -> csr_matrix | StoredCounts:
        """Counts of the cells of the model, (n_cells, n_genes), as `read_counts` returns them."""
        if (kept := kept_counts(self.adata_manager)) is not None:
            return kept
        with said_before():
            return read_counts(self.adata, layer=self.layer, allow_non_integer=True)

    def other_cells(
        self,
        adata: AnnData,
        *,
        indices: Sequence[int] | Sequence[bool] | None = None,
        layer: str | None = None,
        any_labels: bool = False,
        fill_missing: bool | None = None,
        may_stay: bool = False,
    ) -> OtherCells:
        """Check cells that are to be shown to the model, and take what it reads of them; ``adata`` stays as it was.

        Parameters
        ----------
        adata
            Cells with the genes of the model, in any order and among others.
        indices
            Positions of the cells, or one boolean per cell; None for all. Each is taken once, in order.
        layer
            Layer of the counts; None for that of the model.
        any_labels
            Whether labels that the model does not know, or none, do: no bound depends on them, but scvi-tools wants
            some.
        fill_missing
            Whether genes that the cells lack have no counts, or are refused; None where the user has no such choice.
        may_stay
            Whether the counts of a large file stay there, as in `read_counts`; not if cells are chosen or lack genes.

        Raises
        ------
        CountsError
            If the counts are not raw counts, with the cell and the gene.
        ValueError
            If genes or columns of ``obs`` that the model was trained with are missing or unfit, or no cell is chosen.
        """
        cells = np.unique(cell_positions(indices, adata.n_obs))
        places = self._places_of_genes(adata, fill_missing=fill_missing)
        obs = self._obs_to_show(adata, any_labels=any_labels)
        if len(cells) < adata.n_obs:
            adata, obs = adata[cells], obs.iloc[cells]
        mask = None if np.array_equal(places, np.arange(adata.n_vars)) else np.isin(np.arange(adata.n_vars), places)
        layer = self.layer if layer is None else layer
        options = {"allow_non_integer": self.allows_non_integer, "progress": may_stay and is_shown()}
        may_stay = may_stay and not adata.is_view and (places >= 0).all()
        counts = read_counts(adata, layer=layer, mask_var=mask, may_stay=may_stay, **options)
        counts = _in_order_of_model(counts, places)
        layers = {} if self.layer is None else {self.layer: counts}
        var = pd.DataFrame(index=self.var_names.astype(object))
        return OtherCells(counts, AnnData(counts, obs=obs.copy(), var=var, layers=layers), places)

    def _obs_to_show(self, adata: AnnData, *, any_labels: bool) -> pd.DataFrame:
        """Columns of ``obs`` that the model reads, (n_cells, n_columns), checked."""
        obs_keys, label = self._obs_keys, self._obs_keys["labels_key"]
        checked = obs_keys | {"labels_key": None} if any_labels else obs_keys
        self._check_columns_of(adata, checked)
        obs = adata.obs[columns_in(checked)]
        if any_labels and label is not None:
            obs = obs.assign(**{label: self._some_label()})
        return obs[columns_in(obs_keys)]

    def _places_of_genes(self, adata: AnnData, *, fill_missing: bool | None) -> np.ndarray:
        """Position of each gene of the model among those of the cells, (n_genes,), −1 where they lack it."""
        wanted, names = self.var_names, pd.Index(adata.var_names.astype(str))
        if len(wanted) == len(names) and (wanted == names).all():
            return np.arange(len(names))
        missing = wanted[~pd.Index(wanted).isin(names)]
        if len(missing) == len(wanted) or (len(missing) > 0 and not fill_missing):
            if len(missing) == len(wanted):
                remedy = f"Names such as {names[0]!r} may be of another kind: rename adata.var_names."
            elif fill_missing is None:
                remedy = (
                    "Pass the AnnData that the model was trained on, with all genes, or give new data its genes with "
                    "SCVAE.prepare_query_anndata."
                )
            else:
                remedy = "Pass data with these genes, or fill_missing=True to count them as 0."
            raise ValueError(
                f"`adata` must have the genes of the model; {len(missing)} of {len(wanted)} are missing, the first "
                f"{str(missing[0])!r}. {remedy}"
            )
        repeated = names[names.duplicated() & names.isin(wanted)]
        if len(repeated) > 0:
            raise ValueError(
                f"`adata` must have each gene of the model once; found {repeated[0]!r} more than once. Pass each gene "
                "once, for example after adata.var_names_make_unique()."
            )
        place_of = {name: place for place, name in enumerate(names)}  # of names that may repeat among the others
        return np.array([place_of.get(name, -1) for name in wanted])

    def _note_cells(self) -> None:
        """Keep digests of the cells, by which `has_cells` knows them when the data are gone.

        A model that was read from a file has that of the names, and may be shown other cells just now.
        """
        if self.adata is not None and self._digest_of_cells is None:
            self._digest_of_cells = digest_of_names(self.adata.obs_names)
            is_whole = self.minified_data_type is None
            self._digest_of_counts = digest_of_counts(self.counts_of_model()) if is_whole else None

    def has_cells(self, names: pd.Index, counts: csr_matrix | None = None) -> bool:
        """Whether cells are those that the model was built on, in the same order.

        Parameters
        ----------
        names
            Names of the cells.
        counts
            Their counts, (n_cells, n_genes), as `other_cells` returns them; None to go by the names alone. Where the
            model no longer has its own, digests are compared; a model that was read from a file has none of them.
        """
        if self.adata is None:
            known = self._digest_of_counts is not None and self._digest_of_cells == digest_of_names(names)
            return known and (counts is None or self._digest_of_counts == digest_of_counts(counts))
        if not names.equals(self.adata.obs_names):
            return False
        return counts is None or _are_equal(counts, self.counts_of_model())

    def find_columns_in(self, adata: AnnData) -> None:
        """Let methods find columns of ``obs`` in an AnnData with the cells of the model too, which may die before it.

        The tools build a model on cells of its own, with no columns but those that it reads.

        Parameters
        ----------
        adata
            That of the user.
        """
        _ANNOTATED[self.id] = adata

    @property
    def _annotated(self) -> AnnData | None:
        """The user's AnnData with the cells of the model, as long as it is there and has these cells."""
        adata = _ANNOTATED.get(self.id)
        return (
            adata
            if adata is not None and self.adata is not None and adata.obs_names.equals(self.adata.obs_names)
            else None
        )

    @contextmanager
    def _columns_of_user(self, adata: AnnData | None) -> Iterator[AnnData]:
        """Context in which cells have the columns of ``obs`` that the user sees, and after which they are as before."""
        data = self._validate_anndata(adata)
        others = None if adata is not None else self._annotated
        columns = set(data.obs)
        for column in () if others is None else set(others.obs) - columns:
            data.obs[column] = others.obs[column].array
        try:
            yield data
        finally:
            for column in set(data.obs) - columns:
                del data.obs[column]

    @contextmanager
    def shown(self, cells: OtherCells) -> Iterator[AnnData]:
        """Context in which the model can read other cells; it forgets them afterwards, and does not keep them alive.

        Yields
        ------
        The AnnData to pass to methods of the model.
        """
        own = self._adata, self._adata_manager
        try:
            with said_before():  # the counts have been checked
                self._validate_anndata(cells.adata)
            yield cells.adata
        finally:
            self._adata, self._adata_manager = own
            self._forget(cells.adata)
            self._setup_adata_manager_store.pop(cells.adata.uns.get("_scvi_uuid"), None)


@dataclass(frozen=True)
class OtherCells:
    """Checked cells that are not the model's own, with its genes.

    Parameters
    ----------
    counts
        (n_cells, n_genes), as `read_counts` returns them.
    adata
        An AnnData of the counts and the columns of ``obs`` that the model reads, of its own.
    places
        Position of each gene of the model among those that the cells came with, (n_genes,); −1 where they lacked it.
    """

    counts: csr_matrix | StoredCounts
    adata: AnnData
    places: np.ndarray


def _are_equal(left: csr_matrix | StoredCounts, right: csr_matrix | StoredCounts) -> bool:
    """Whether two matrices without explicit zeros, their columns in order, are the same."""
    if left.shape != right.shape or not np.array_equal(left.indptr, right.indptr):
        return False
    stored = [each for each in (left, right) if isinstance(each, StoredCounts)]
    if len(stored) == 2:
        return left.digest == right.digest
    parts = [slice(*bounds) for bounds in stored[0].blocks()] if stored else [slice(None)]
    pairs = ((left[part], right[part]) if stored else (left, right) for part in parts)
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for one, other in pairs for name in ("indices", "data")
    )


def _in_order_of_model(counts: csr_matrix | StoredCounts, places: np.ndarray) -> csr_matrix | StoredCounts:
    """Counts of the genes that have a place, in the order of the places, as counts of all genes of the model."""
    if isinstance(counts, StoredCounts):  # which has all genes of the model
        rank = np.argsort(np.argsort(places))
        return counts if np.array_equal(rank, np.arange(len(rank))) else counts.in_order(rank)
    known = np.flatnonzero(places >= 0)
    column = known[np.argsort(places[known])]  # of the model, for each column of the counts
    if np.array_equal(column, np.arange(len(places))):
        return counts
    arrays = counts.data, column.astype(counts.indices.dtype)[counts.indices], counts.indptr
    ordered = type(counts)(arrays, shape=(counts.shape[0], len(places)), copy=True)
    ordered.sort_indices()
    return ordered
