"""Tools: AnnData in, keys out. The only writer of results."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.special import xlogy

from scvae_tools._adata import build_model, write
from scvae_tools._arguments import require_writable
from scvae_tools._calibration import ambiguous_cells
from scvae_tools._compare import compare
from scvae_tools._evaluate import evaluate
from scvae_tools._keys import Keys
from scvae_tools._messages import inform, warn
from scvae_tools._ppc import _is_ppc, ppc
from scvae_tools._rank import dendrogram, rank_components
from scvae_tools._reconstruction import summarize_reconstruction

if TYPE_CHECKING:
    from collections.abc import Sequence

    import h5py
    import zarr
    from anndata import AnnData

    from scvae_tools.model import SCVAE

__all__ = [
    "ambiguous_cells",
    "compare",
    "dendrogram",
    "evaluate",
    "ppc",
    "rank_components",
    "scvae",
    "summarize_reconstruction",
]

#: λ is dense: it is left out where it would take more than this share of the free memory.
LARGEST_SHARE_OF_MEMORY = 0.25
#: Monte Carlo samples per cell for the ELBO that is stored: a validation set is small, so each cell gets more.
ELBO_SAMPLES = {"train": 1, "validation": 5}


def scvae(
    adata: AnnData,
    *,
    likelihood: Literal[
        "poisson", "nb", "zip", "zinb", "constrained_poisson", "bernoulli", "gaussian", "log_normal", "lomax"
    ] = "nb",
    mixture: bool | Literal["gmvae", "vade"] = True,
    n_components: int | tuple[int, int] | None = None,
    n_latent: int = 10,
    n_hidden: int | Sequence[int] = 128,
    n_layers: int | None = None,
    layer: str | None = None,
    mask_var: str | np.ndarray | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    train_size: float = 0.9,
    early_stopping: bool = True,
    accelerator: str = "auto",
    random_state: int | np.random.RandomState | None = 0,
    rng: int | np.random.Generator | None = None,
    key_added: str = "scvae",
    write_lambda: bool | np.ndarray | zarr.Array | h5py.Dataset | None = None,
    allow_non_integer: bool = False,
    verbose: bool = True,
    copy: bool = False,
    return_model: bool = False,
    **kwargs: Any,
) -> AnnData | SCVAE | tuple[AnnData, SCVAE] | None:
    """Embed and cluster cells with a (Gaussian-mixture) variational auto-encoder trained on raw counts.

    scVAE [Grønbech20]_: a decoder maps a latent code z to the parameters of a count distribution of every gene. With a
    mixture, z has a Gaussian mixture as its prior, whose components are the clusters.

    Parameters
    ----------
    adata
        Annotated data, cells x genes, with raw counts; never changed but for the keys below.
    likelihood
        Distribution of the counts: ``"poisson"``, ``"nb"`` (negative binomial), or their zero-inflated forms ``"zip"``
        and ``"zinb"``; ``"constrained_poisson"``, whose λ add up to the size factor of the cell; ``"bernoulli"``, of
        whether a count is above 0; or a density, ``"gaussian"``, ``"log_normal"`` or ``"lomax"``, whose bounds cannot
        be compared with those of the others (docs/likelihoods.md).
    mixture
        ``True`` or ``"gmvae"`` for the model of the paper, ``"vade"`` for one that decodes each cell once instead of
        once per likely component, ``False`` for a plain VAE without clusters.
    n_components
        Number of components; the smallest and largest that may be found, such as ``(4, 20)``; or None to find any. It
        is found by merging the components of a finer mixture until no two overlap (docs/clustering.md,
        `svt.pl.components`).
    n_latent
        Dimensions of the latent space.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder; or the widths of those of the encoder from first to
        last, such as ``(250, 100)``, which the decoder has in reverse. ``n_layers`` is 1, or the number of widths.
    layer
        Layer with the counts; None for ``adata.X``.
    mask_var
        Genes to use: a boolean column of ``adata.var`` such as ``"highly_variable"``, or a boolean array. None for all.
    batch_key
        Column of ``obs`` that the decoder is given, so that the latent space need not hold it.
    labels_key
        Column of ``obs`` with the labels of the cells that are known: each label gets a component of its name, and the
        cells without one are assigned to these, and to further ones if ``n_components`` is larger.
    unlabeled_category
        What ``labels_key`` holds for cells without a label; None if all have one.
    size_factor_key
        Column of ``obs`` with size factors; None for each cell's total count over the genes used.
    categorical_covariate_keys, continuous_covariate_keys
        Further columns of ``obs`` that the decoder is given; those with numbers are standardised by the training cells.
    max_epochs
        Most epochs of all stages together; None for about 4,000 steps of 128 cells.
    batch_size
        Cells a training step.
    train_size
        Share of the cells to train on. The others choose the best weights and tell when to stop.
    early_stopping
        Whether a stage ends when the validation ELBO no longer rises.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"``, ``"mps"``.
    random_state, rng
        Seed, or generator to draw one from; give one of the two. The global random states are left as they were.
    key_added
        Name of the results.
    write_lambda
        Whether to write the layer of λ, or where to. None writes it into memory, unless it would take more than a
        quarter of what is free. True always writes it; if ``adata`` is backed and not copied, into its file, which must
        be open with ``backed="r+"``. An array of shape (n_cells, n_genes) and a floating type of 32 bits or more, such
        as a zarr array, an h5py dataset, or a memory map, is filled, and becomes the layer. Neither a file nor an array
        on disk needs more than about 0.3 GB of memory, whatever the size of λ.
    allow_non_integer
        Accept estimated (non-integer) counts, with a warning.
    verbose
        Whether to show a progress bar.
    copy
        Whether to return a copy of ``adata`` with the results instead of writing into it.
    return_model
        Whether to return the trained `SCVAE`.
    **kwargs
        Further arguments of `SCVAE` (such as ``dispersion``, ``covariance``, ``dropout_rate``) and `SCVAE.train` (such
        as ``lr``, ``weight_decay``, ``patience``).

    Returns
    -------
    None; or the copy, the model, or (copy, model), as asked for. Sets the following fields:

    ``adata.obsm["X_scvae"]`` : (n_cells, n_latent) float32
        Mean of q(z|x); for a mixture the mean over q(y|x).
    ``adata.obs["scvae"]`` : categorical
        Most probable component, "0", "1", ... by decreasing size; with labels, their names. Mixture only.
    ``adata.obsm["scvae_probs"]`` : (n_cells, n_components) float32
        Probability of each component: by decreasing size, unused ones last; with labels in their order. Mixture only.
    ``adata.layers["scvae_lambda"]`` : (n_cells, n_genes) float32
        Mean λ of the count distribution before zero inflation, in counts; NaN for genes that ``mask_var`` leaves out.
        The array passed as ``write_lambda`` itself, where AnnData takes its kind as a layer (NumPy, zarr, h5py).
    ``adata.varm["scvae_loadings"]`` : (n_genes, n_latent) float32
        Derivatives of log λ by z, see `SCVAE.get_loadings`; NaN for genes that ``mask_var`` leaves out. With
        ``linear_decoder=True`` only.
    ``adata.uns["scvae"]`` : dict
        ``params``; ``history``, a table with a row per epoch; ``elbo``, for ``train`` and ``validation`` the bound and
        its terms in nats per cell; ``kl_by_dimension``, (n_latent,), see `SCVAE.get_kl_by_dimension`; ``version``; for
        a mixture ``components``: their number ``n_components``, of which ``n_used`` are some cell's most probable one,
        ``n_effective`` = exp(H(mean of q(y|x))), the prior's ``weights`` (k,), ``means`` (k, d) and ``covariances``
        (k, d, d), and where the number was to be found ``curve``, a table with a row per number: ``overlap`` (the
        largest between two components, median over runs, in nats per cell of the smaller), ``share_of_runs`` that stop
        there, ``chosen``.

    Raises
    ------
    CountsError
        If the counts are not raw counts, with the cell and the gene.
    ValueError
        If an argument is unknown or does not fit the data.
    NonFiniteError
        If the training broke down twice.

    Notes
    -----
    Ctrl-C ends the training; results are written from the best weights so far, and a warning says which. Before the
    first epoch has ended nothing is written.

    Results of an earlier call under the same ``key_added`` are replaced as a whole: what this call does not write, such
    as λ where it is left out, or what `svt.tl.ppc` made of the earlier model, is deleted.

    λ in the file of a backed AnnData is there at once, and is an ``h5py.Dataset`` in ``adata.layers``; all other
    results are in memory until ``adata.write()``, which copies the layer within the file and leaves its former room
    unused (``h5repack`` frees it). ``adata.file.close()`` leaves the layer readable, and with it the file open, until
    the layer is deleted or the AnnData is gone. When anndata opens the file again, it reads all layers into memory,
    backed or not. ``adata.copy()`` fails in anndata where a layer is in zarr or h5py; ``adata.to_memory()`` works.

    References
    ----------
    .. [Grønbech20] Grønbech, Vording, Timshel, Sønderby, Pers, Winther (2020) scVAE: variational auto-encoders for
       single-cell gene expression data. Bioinformatics 36:4415.

    Examples
    --------
    >>> adata = svt.datasets.pbmc68k_reduced()
    >>> svt.tl.scvae(adata, likelihood="zinb")
    >>> sc.pp.neighbors(adata, use_rep="X_scvae")
    """
    from scvae_tools._counts import read_counts, require_anndata, resolve_mask_var
    from scvae_tools._random import as_seed

    require_anndata(adata)
    require_writable(adata, copy=copy)
    _require_place_for_rate(adata, write_lambda, copy=copy)
    keys = Keys(key_added)
    seed = as_seed(random_state, rng)
    model_options, train_options = _split_options(kwargs)
    mask = resolve_mask_var(adata, mask_var)
    counts = read_counts(adata, layer=layer, mask_var=mask, allow_non_integer=allow_non_integer)
    obs_keys = {
        "batch_key": batch_key,
        "labels_key": labels_key,
        "unlabeled_category": unlabeled_category,
        "size_factor_key": size_factor_key,
        "categorical_covariate_keys": _as_list(categorical_covariate_keys),
        "continuous_covariate_keys": _as_list(continuous_covariate_keys),
    }
    options = {"likelihood": likelihood, "mixture": mixture, "n_components": n_components, "random_state": seed}
    options |= {"n_latent": n_latent, "n_hidden": n_hidden, "n_layers": n_layers, **model_options}
    model = build_model(adata, counts, mask, obs_keys, options, allow_non_integer=allow_non_integer)
    training = {"batch_size": batch_size, "train_size": train_size, "early_stopping": early_stopping, **train_options}
    model.train(max_epochs, accelerator=accelerator, random_state=seed, progress=verbose, **training)

    params = {**_params_of(model), **training, **obs_keys, "layer": layer}
    params |= {"mask_var": mask_var if isinstance(mask_var, str) else None, "random_state": seed}
    params |= {"max_epochs": max_epochs}
    results = _results(model, keys, params) | {"varm": _loadings(model, keys, mask)}
    target = _copied(adata) if copy else adata
    _replace(target, results, keys)
    # Last, because it takes longest and may fill a disk.
    _write_rate(target, model, keys.rate, mask, write_lambda)
    returned = ([target] if copy else []) + ([model] if return_model else [])
    return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)


def _params_of(model: SCVAE) -> dict[str, Any]:
    """Arguments of the model, None for those that mean nothing to a plain VAE."""
    params = model.init_params_["non_kwargs"]
    return params if params["mixture"] else params | dict.fromkeys(("covariance", "weights", "n_components"))


def _replace(adata: AnnData, results: dict[str, dict[str, Any]], keys: Keys) -> None:
    """Write results, and delete those of an earlier model under the same keys that these leave as they are."""
    earlier = adata.uns.get(keys.uns)
    write(adata, results)
    for slot, names in keys.by_model.items():
        for name in names:
            if name not in results.get(slot, {}) and _is_earlier(earlier, adata, slot, name, keys):
                del getattr(adata, slot)[name]


def _is_earlier(earlier: object, adata: AnnData, slot: str, name: str, keys: Keys) -> bool:
    """Whether a result of ours is there, and no column or entry of the user that has its name by chance."""
    if not (isinstance(earlier, Mapping) and {"params", "history", "version"} <= set(earlier)):
        return False
    if name not in getattr(adata, slot) or (slot == "obs" and "components" not in earlier):
        return False
    return name != keys.ppc or _is_ppc(adata.uns[name])


def _results(model: SCVAE, keys: Keys, params: dict) -> dict[str, dict[str, Any]]:
    """Everything to write but λ, by the slot of the AnnData."""
    elbo = {
        subset: model.get_elbo_terms(indices=indices, n_samples=ELBO_SAMPLES[subset]).mean().to_dict()
        for subset, indices in (("train", model.train_indices), ("validation", model.validation_indices))
        if len(indices) > 0
    }
    return _results_of(model, keys, params, elbo)


def _results_of(
    model: SCVAE, keys: Keys, params: dict, elbo: dict, adata: AnnData | None = None
) -> dict[str, dict[str, Any]]:
    """Everything to write but λ, of the cells of the model or of others with its genes."""
    from scvae_tools import __version__

    history = model.history.copy()
    history.index = history.index.astype(str)
    # A path is none of what the results depend on, and AnnData writes none.
    params = {key: value for key, value in params.items() if value is not None and key not in ("adata", "checkpoint")}
    summary = {"params": params, "history": history, "elbo": elbo, "version": __version__}
    results: dict[str, dict[str, Any]] = {
        "obs": {},
        "obsm": {keys.latent: model.get_latent_representation(adata)},
        "uns": {keys.uns: summary | {"kl_by_dimension": model.get_kl_by_dimension(adata)}},
    }
    if model.is_mixture:
        probabilities = model.predict(adata, soft=True).to_numpy()
        component = probabilities.argmax(1)
        names = [model.components[c] for c in np.unique(component)]  # the model numbers them by size
        results["obs"][keys.component] = pd.Categorical(np.array(model.components)[component], categories=names)
        results["obsm"][keys.probabilities] = probabilities
        results["uns"][keys.uns]["components"] = _summary_of_components(model, probabilities)
    return results


def _loadings(model: SCVAE, keys: Keys, mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """Loadings of all genes by key; none where log λ is not linear in z."""
    if not (model.module.decoder.is_linear and model.module.likelihood.rate_is_head):
        return {}
    loadings = model.get_loadings().to_numpy()
    return {keys.loadings: loadings if mask is None else _among_all_genes(loadings.T, mask).T.copy()}


def _summary_of_components(model: SCVAE, probabilities: np.ndarray) -> dict[str, Any]:
    """How many components there are, are used, and are worth; how their number was found."""
    share = probabilities.mean(0, dtype=np.float64)
    summary = {
        "n_components": len(share),
        "n_used": len(np.unique(probabilities.argmax(1))),
        "n_effective": float(np.exp(-xlogy(share, share).sum())),
    } | model.get_prior()
    curve = model.component_curve_
    if curve is None:
        return summary
    return summary | {"curve": curve.set_index(curve.index.astype(str))}  # h5ad wants names


def _copied(adata: AnnData) -> AnnData:
    """Copy in memory; `AnnData.copy` fails with layers on disk."""
    is_on_disk = any(not hasattr(layer, "copy") for key, layer in adata.layers.items() if key is not None)
    return adata.to_memory(copy=True) if adata.isbacked or is_on_disk else adata.copy()


# -- the layer of λ ----------------------------------------------------------------------------------------------------


def _require_place_for_rate(adata: AnnData, place: object, *, copy: bool) -> None:
    """Refuse, before any training, a file or an array into which λ cannot be written."""
    if place is None or isinstance(place, bool | np.bool_):
        if place and adata.isbacked and not copy:
            _require_writable_file(adata)
        return
    rule = f"`write_lambda` must be True, False, None, or an array of shape {adata.shape} that takes rows of float32"
    remedy = f"Pass, for example, zarr.create_array(path, shape={adata.shape}, dtype='float32')."
    try:
        shape, dtype = tuple(place.shape), np.dtype(place.dtype)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{rule}; found {_kind(place)} without shape or type. {remedy}") from None
    if shape != adata.shape:
        raise ValueError(f"{rule}; found the shape {shape}. {remedy}")
    if dtype.kind != "f" or dtype.itemsize < 4:
        raise ValueError(f"{rule}; found the type {dtype}. {remedy}")
    try:
        place[0:1] = np.asarray(place[0:1], dtype=dtype)  # stays as it is
    except Exception as error:
        raise ValueError(
            f"{rule}; found {_kind(place)} that takes none ({error}). Open it for writing. {remedy}"
        ) from error


def _require_writable_file(adata: AnnData) -> None:
    if not adata.file.is_open:
        adata.file.open()
    if adata.file["obs"].file.mode == "r":
        raise ValueError(
            "write_lambda=True writes λ into the file of a backed AnnData, which must be open for writing; found "
            f"{adata.filename.name!r} open to be read. Open it with anndata.read_h5ad(path, backed='r+'), or pass "
            "write_lambda=np.empty(adata.shape, 'float32') for λ in memory, an array on disk, or False."
        )


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _write_rate(adata: AnnData, model: SCVAE, key: str, mask: np.ndarray | None, place: Any) -> None:
    """Write λ of all genes, unless it is not wanted or too large, chunk by chunk."""
    if place is None and _is_too_large(adata, key):
        return
    if place is None or isinstance(place, bool | np.bool_):
        if place is None or place:
            in_file = bool(place) and adata.isbacked
            adata.layers[key] = _rate_in_file(adata, model, key, mask) if in_file else _rate(adata.shape, model, mask)
        return
    _fill(place, model, mask)
    try:
        # anndata writes plain arrays to files, and no memory maps; the plain one is the same memory.
        adata.layers[key] = np.asarray(place) if isinstance(place, np.ndarray) else place
    except ValueError:
        inform("λ is in the array passed as `write_lambda` alone: AnnData takes no %s as a layer.", _kind(place))


def _is_too_large(adata: AnnData, key: str) -> bool:
    """Whether λ would take too much of the free memory; says so."""
    n_bytes, free = 4 * adata.n_obs * adata.n_vars, _free_memory()
    if n_bytes <= LARGEST_SHARE_OF_MEMORY * free:
        return False
    warn(
        f"layers[{key!r}] is left out: it would take {_size(n_bytes)}, more than a quarter of the {_size(free)} of "
        "free memory. Pass write_lambda=True to write it all the same (of a backed AnnData into its file), an array on "
        "disk to write it there (zarr, h5py, or a memory map of NumPy), or return_model=True and call "
        "model.get_lambda(indices=..., gene_list=...) in chunks."
    )
    return True


def _rate(shape: tuple[int, int], model: SCVAE, mask: np.ndarray | None) -> np.ndarray:
    rate = np.empty(shape, dtype=np.float32)
    _fill(rate, model, mask)
    return rate


def _rate_in_file(adata: AnnData, model: SCVAE, key: str, mask: np.ndarray | None) -> h5py.Dataset:
    """Write λ into the layers of a backed AnnData's file, in the format of anndata."""
    import h5py

    # A handle of its own: `AnnData.write` closes that of the AnnData before it reads the layers.
    file = h5py.File(adata.file["obs"].file.id.reopen())
    layers = file.require_group("layers")
    for name, value in {"encoding-type": "dict", "encoding-version": "0.1.0"}.items():
        layers.attrs.setdefault(name, value)
    # Without a name until it is complete: after an interruption nothing is left of it.
    rate = file.create_dataset(None, shape=adata.shape, dtype=np.float32)
    rate.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    _fill(rate, model, mask)
    if key in layers:
        del layers[key]
    layers[key] = rate
    file.flush()
    return layers[key]


def _fill(rate: Any, model: SCVAE, mask: np.ndarray | None) -> None:
    """Write λ into an array by slices of rows; NaN for genes that are left out."""
    from scvae_tools import _decoding

    # A part of the memory: zarr holds several copies of what it is given.
    rows_at_once = max(1, _decoding.CHUNK_BYTES // (4 * 4 * rate.shape[1]))
    start = 0
    for chunk in model.iter_lambda():
        for at in range(0, len(chunk), rows_at_once):
            rows = chunk[at : at + rows_at_once]
            rate[start : start + len(rows)] = rows if mask is None else _among_all_genes(rows, mask)
            start += len(rows)


def _among_all_genes(rate: np.ndarray, mask: np.ndarray) -> np.ndarray:
    full = np.full((len(rate), len(mask)), np.nan, dtype=np.float32)
    full[:, mask] = rate
    return full


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2g} GiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def _free_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _as_list(value: Sequence[str] | str | None) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else list(value)


def _split_options(options: dict) -> tuple[dict, dict]:
    """Arguments of `SCVAE` and of `SCVAE.train`.

    Raises
    ------
    ValueError
        If one belongs to neither.
    """
    from scvae_tools.model import SCVAE

    def known(function: object) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(inspect.signature(scvae).parameters)

    of_model, of_training = known(SCVAE.__init__), known(SCVAE.train) - {"progress"}
    for name in options:
        if name not in of_model | of_training:
            close = difflib.get_close_matches(name, [*of_model, *of_training, *inspect.signature(scvae).parameters])
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Unknown argument {name!r}.{hint} Beside its own, scvae takes {', '.join(sorted(of_model))} for the "
                f"model and {', '.join(sorted(of_training))} for the training."
            )
    return {k: v for k, v in options.items() if k in of_model}, {k: v for k, v in options.items() if k in of_training}
