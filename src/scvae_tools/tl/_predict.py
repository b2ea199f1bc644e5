"""Write what a trained model says of cells that it has not seen: latent codes, components, λ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvae_tools._checks import check_key, checked
from scvae_tools._data.counts import read_tables
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.writing import copy_in_memory, replace_results, require_writable
from scvae_tools.tl._lambda_layer import require_place_for_rate, write_rate
from scvae_tools.tl._models import find_model, require_encoder_of_counts
from scvae_tools.tl._results_of_model import loadings_of, params_of, results_of

if TYPE_CHECKING:
    from pathlib import Path

    import h5py
    import numpy as np
    import zarr
    from anndata import AnnData

    from scvae_tools.model._scvae import SCVAE

#: Component of cells that fit none.
NONE = "none"


@answers_other_names
@checked()
def predict(
    adata: AnnData,
    model: SCVAE | str | Path,
    *,
    layer: str | None = None,
    fill_missing: bool = False,
    key_added: str = "scvae",
    none_below: float | None = None,
    write_lambda: bool | np.ndarray | zarr.Array | h5py.Dataset | None = False,
    copy: bool = False,
) -> AnnData | None:
    """Write the results of a trained model for other cells: their latent codes and components.

    The model stays as it is. New batches need a model that is trained on them: see `SCVAE.load_query_data`.

    Parameters
    ----------
    adata
        Annotated data with raw counts and the genes of the model, in any order and among others; never changed but for
        the keys below. Counts in a file or a dask array that are large stay there, unless genes of the model are
        missing; of lazily read data, obs and var are read into memory.
    model
        Trained `SCVAE`, as ``svt.tl.scvae(adata, return_model=True)`` or ``SCVAE.load`` returns it, or the folder where
        one is saved.
    layer
        Layer with the counts; None for ``adata.X``, or for the layer that `SCVAE.setup_anndata` was given.
    fill_missing
        Whether genes of the model that ``adata`` lacks count as 0, or are an error.
    key_added
        Name of the results.
    none_below
        Value of ``obs["scvae_fit"]`` below which a cell is of the component ``"none"``. Of cells like those of the
        training about this share is called none too. None to name the most probable component of all cells.
    write_lambda
        Whether to write the layer of λ, or where to; as in `scvae`.
    copy
        Whether to return a copy of ``adata`` with the results instead of writing into it.

    Returns
    -------
    None, or the copy. Sets the fields of `scvae`:

    ``adata.obsm["X_scvae"]`` : (n_cells, n_latent) float32
        Mean of q(z|x); for a mixture the mean over q(y|x).
    ``adata.obs["scvae"]`` : categorical
        Most probable component by its name in the model: with labels theirs, else "0", "1", ... by decreasing size in
        the data that the model was trained on. With ``none_below`` also "none", the last. Mixture only.
    ``adata.obs["scvae_fit"]`` : float64
        Probability that a cell like those of the training would fit the model as badly, above 0 and up to 1: small
        values are of cells that are none of these. See `SCVAE.get_fit`, also for how small values can be. Each
        cell is decoded for it. Not of models that were saved by versions without it.
    ``adata.obsm["scvae_probs"]`` : (n_cells, n_components) float32
        Probability of each component, calibrated as in `scvae`, in the order of ``model.components``. Mixture only.
    ``adata.layers["scvae_lambda"]`` : (n_cells, n_genes) float32
        With ``write_lambda``: λ in counts; NaN for genes that the model does not have.
    ``adata.varm["scvae_loadings"]`` : (n_genes, n_latent) float32
        With ``linear_decoder=True``: as in `scvae`.
    ``adata.uns["scvae"]`` : dict
        ``params`` and ``history`` of the model; ``kl_by_dimension`` and ``components`` of these cells; ``fit``, with
        the number of reference cells, and ``none_below`` if it was given; ``version``.
        ``elbo`` is empty: `evaluate` tells how well the model describes new cells.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    CountsError
        If the counts are not raw counts, with the cell and the gene.
    ValueError
        If the model is not trained or holds minified data; ``adata`` lacks genes of the model, or columns
        of ``obs`` that it was trained with. If ``none_below`` is given and the model has no mixture, a component of the
        name "none", no reference cells, or too few for a value so small.

    Examples
    --------
    >>> model = svt.SCVAE.load("model")
    >>> svt.tl.predict(new, model, none_below=0.01)
    >>> svt.pl.probs(new)
    """
    keys = Keys(check_key("key_added", key_added))
    read_tables(adata)
    model = find_model(adata, model, key_added)
    require_encoder_of_counts(model, "svt.tl.predict")
    n_fit_cells = model.n_fit_cells()  # before it is shown other cells
    _check_none_below(model, none_below, n_fit_cells)
    require_writable(adata, copy=copy)
    require_place_for_rate(adata, write_lambda, copy=copy)
    cells = model.other_cells(adata, layer=layer, any_labels=True, fill_missing=fill_missing, may_stay=True)
    with model.shown(cells) as shown:
        params = params_of(model) | {"layer": layer}
        results = results_of(model, keys, params, {}, shown)
        if n_fit_cells > 0:
            _add_fit(results, keys, model.get_fit(shown), none_below, n_fit_cells)
        results["varm"] = loadings_of(model, keys, cells.places, adata.n_vars)
        target = copy_in_memory(adata) if copy else adata
        replace_results(target, results, keys)
        write_rate(target, model, keys.rate, write_lambda, cells=shown, gene_places=cells.places)
    return target if copy else None


def _check_none_below(model: SCVAE, none_below: float | None, n_fit_cells: int) -> None:
    """Refuse a limit that no cell could be below, or a model without components that a cell could be none of."""
    if none_below is None:
        return
    if not model.is_mixture:
        raise ValueError(
            "`none_below` needs a mixture, of whose components a cell is none; found a model without. Leave it out, "
            'and read obs["scvae_fit"].'
        )
    if NONE in model.components:
        raise ValueError(
            f"`none_below` calls cells {NONE!r}, which must be no component; found one of this name. Leave it out, and "
            'read obs["scvae_fit"]; or train with other labels.'
        )
    if n_fit_cells == 0:
        model.get_fit()  # raises the error that says why
    smallest = 1 / (1 + n_fit_cells)
    if none_below <= smallest:
        raise ValueError(
            f"`none_below` must be above {smallest:.2g}, the smallest fit by {n_fit_cells:,} reference cells; "
            f"found {none_below}. Pass a larger number, or train with more cells held out (`train_size`)."
        )


def _add_fit(results: dict[str, dict], keys: Keys, fit: np.ndarray, none_below: float | None, n_fit_cells: int) -> None:
    """Add the fit to results, and with ``none_below`` the component of cells that fit none."""
    results["obs"][keys.fit] = fit
    results["uns"][keys.uns]["fit"] = {"n_reference": n_fit_cells}
    if none_below is None:
        return
    results["uns"][keys.uns]["fit"]["none_below"] = none_below
    component = results["obs"][keys.component].add_categories(NONE)
    component[fit < none_below] = NONE
    results["obs"][keys.component] = component.remove_unused_categories()
