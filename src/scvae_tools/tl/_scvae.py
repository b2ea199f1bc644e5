"""Train a model on an AnnData and write its results: the main job."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scvae_tools._checks import as_plain, check_arguments, check_key, check_random_source, checked
from scvae_tools._data.counts import read_counts, read_tables, require_anndata, resolve_mask_var
from scvae_tools._data.roles import obs_keys_of
from scvae_tools._interrupts import interrupts_held
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names, unknown_argument
from scvae_tools._random import as_seed
from scvae_tools._results.writing import copy_in_memory, replace_results, require_writable
from scvae_tools._train.progress import Parts, is_shown
from scvae_tools.model._build import build_model
from scvae_tools.model._scvae import SCVAE
from scvae_tools.model._trainer_options import TRAINER_OPTIONS, check_trainer_options, join_processes
from scvae_tools.tl._lambda_layer import require_place_for_rate, write_rate
from scvae_tools.tl._results_of_model import elbo_of, loadings_of, params_of, results_of
from scvae_tools.tl._training_of_result import noted_beside

if TYPE_CHECKING:
    from collections.abc import Sequence

    import h5py
    import zarr
    from anndata import AnnData

#: Own arguments that go to `SCVAE` and to `SCVAE.train` as they are.
OF_MODEL = ("likelihood", "mixture", "n_components", "n_latent", "n_hidden", "n_layers")
OF_TRAINING = ("batch_size", "train_size", "early_stopping")


@answers_other_names
@checked(random_state=check_random_source, rng=check_random_source)
def scvae(
    adata: AnnData,
    *,
    likelihood: str = "nb",
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
    progress: bool | None = None,
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
        Annotated data, cells x genes, with raw counts; never changed but for the keys below. Counts in a file or a dask
        array that are large stay there (docs/large-data.md); of lazily read data, obs and var are read into memory.
    likelihood
        Distribution of the counts, a key of ``svt.likelihoods.LIKELIHOODS``, such as ``"poisson"``, ``"nb"`` (negative
        binomial), and their zero-inflated forms ``"zip"`` and ``"zinb"``. docs/likelihoods.md has all of them and
        helps to choose.
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
        Largest number of epochs, of all stages together; None for about 4,000 steps of 128 cells, and at least 20. An
        epoch ends when all training cells were seen, or 400,000 of them.
    batch_size
        Cells a training step, on each device (docs/devices.md).
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
        Whether to write the layer of λ, or where to. λ is dense. None writes it into memory where it takes at most
        192 MiB, such as 4,000 cells x 12,000 genes, and a quarter of the free memory, and ``mask_var`` leaves out no
        gene; otherwise a warning says that it is left out. True always writes it, with NaN for genes that ``mask_var``
        leaves out; if ``adata`` is backed and not copied, into its file, which must be open with ``backed="r+"``. An
        array of shape (n_cells, n_genes) and a floating type of 32 bits or more, such as a zarr array, an h5py dataset,
        or a memory map, is filled, and becomes the layer. Neither a file nor an array on disk needs more than about
        0.3 GB of memory, whatever the size of λ.
    allow_non_integer
        Accept estimated (non-integer) counts, with a warning.
    progress
        Whether to show progress bars; None to do so unless ``scanpy.settings.verbosity`` is 0 or
        ``scvi.settings.verbosity`` above INFO.
    copy
        Whether to return a copy of ``adata`` with the results instead of writing into it.
    return_model
        Whether to return the trained `SCVAE`. Tools such as `svt.tl.rank_components` find it without, as long as the
        results are in memory.
    **kwargs
        Further arguments of `SCVAE` (such as ``dispersion``, ``covariance``, ``dropout_rate``) and `SCVAE.train` (such
        as ``lr``, ``weight_decay``, ``patience``), and options of Lightning's trainer (such as ``logger``).

    Returns
    -------
    None; or the copy, the model, or (copy, model), as asked for. Sets the following fields:

    ``adata.obsm["X_scvae"]`` : (n_cells, n_latent) float32
        Mean of q(z|x); for a mixture the mean over q(y|x).
    ``adata.obs["scvae"]`` : categorical
        Most probable component, "0", "1", ... by decreasing size; with labels, their names. Mixture only.
    ``adata.obsm["scvae_probs"]`` : (n_cells, n_components) float32
        Probability of each component, calibrated by the held-out cells (`SCVAE.temperature`); by decreasing size,
        unused ones last; with labels in their order. Mixture only.
    ``adata.layers["scvae_lambda"]`` : (n_cells, n_genes) float32
        Mean λ of the count distribution before zero inflation, in counts; NaN for genes that ``mask_var`` leaves out.
        The array passed as ``write_lambda`` itself, where AnnData takes its kind as a layer (NumPy, zarr, h5py).
    ``adata.varm["scvae_loadings"]`` : (n_genes, n_latent) float32
        Derivatives of log λ by z, see `SCVAE.get_loadings`; NaN for genes that ``mask_var`` leaves out. With
        ``linear_decoder=True`` only.
    ``adata.uns["scvae"]`` : dict
        ``params``; ``history``, a table with a row per epoch; ``elbo``, for ``train`` and ``validation`` the bound and
        its terms in nats per cell; ``null_log_likelihood``, for both the log-likelihood of a model without latent
        variables, see `SCVAE.null_log_likelihood`; ``kl_by_dimension``, (n_latent,), see
        `SCVAE.get_kl_by_dimension`; ``version``; for a mixture ``components``: their number ``n_components``, of which
        ``n_used`` are some cell's most probable one, ``n_effective`` = exp(H(mean probability)), the ``temperature`` of
        the probabilities, the prior's ``weights`` (k,), ``means`` (k, d) and ``covariances`` (k, d, d),
        ``valley_p_values`` (k, k), the probability of each two that they are one population, see
        `SCVAE.valley_p_values_`, and where the number was to be found ``curve``, a table with a row per number:
        ``overlap`` (the largest between two components, median over runs, in nats per cell of the smaller),
        ``share_of_runs`` that stop there, ``chosen``.

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
    first epoch has ended nothing is written. After the training Ctrl-C leaves out λ alone, with a warning, and during
    the start of the mixture the training of the mixture. Pressed a second time there, it ends the call at once, and
    ``adata`` is as it was.

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
    arguments = dict(locals())
    read_tables(adata)
    require_anndata(adata)
    require_writable(adata, copy=copy)
    require_place_for_rate(adata, write_lambda, copy=copy)
    keys = Keys(check_key("key_added", key_added))
    seed = as_seed(random_state, rng)
    of_model, of_training, of_trainer = _split_options(kwargs)
    mask = resolve_mask_var(adata, mask_var)
    # Here, so that all processes read at the same time.
    is_first = join_processes(accelerator, of_training.get("devices", "auto"), of_trainer).is_first
    shown = is_shown(progress, of_trainer.pop("enable_progress_bar", None)) and is_first
    reading = {"allow_non_integer": allow_non_integer, "may_stay": True, "progress": shown}
    counts = read_counts(adata, layer=layer, mask_var=mask, **reading)
    obs_keys = obs_keys_of(arguments)
    options = {name: arguments[name] for name in OF_MODEL} | {"random_state": seed, **of_model}
    model = build_model(adata, counts, mask, obs_keys, options, allow_non_integer=allow_non_integer)
    training = {name: arguments[name] for name in OF_TRAINING} | of_training
    of_call = training | obs_keys | {"layer": layer, "max_epochs": max_epochs, "random_state": seed}
    of_call["mask_var"] = mask_var if isinstance(mask_var, str) else None
    of_call |= noted_beside(n_components, training, n_genes=counts.shape[1], allow_non_integer=allow_non_integer)
    with interrupts_held():  # else what was trained would be lost with the model
        model.train(max_epochs, accelerator=accelerator, random_state=seed, progress=shown, **training, **of_trainer)
        target = copy_in_memory(adata) if copy else adata
        model.find_columns_in(target)
        _write_results(target, model, keys, params_of(model) | of_call, mask, write_lambda, progress=shown)
    returned = ([target] if copy else []) + ([model] if return_model else [])
    return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)


def _write_results(
    adata: AnnData, model: SCVAE, keys: Keys, params: dict, mask: np.ndarray | None, place: Any, *, progress: bool
) -> None:
    """Write all results of a model; ``place`` is the argument ``write_lambda``."""
    gene_places = None if mask is None else np.flatnonzero(mask)
    with Parts("results", 3, enable=progress) as parts:
        parts.begin("bounds")
        elbo = elbo_of(model)
        parts.begin("latent codes")
        results = results_of(model, keys, params, elbo)
        results["varm"] = loadings_of(model, keys, gene_places, adata.n_vars)
        replace_results(adata, results, keys)
        # Last, because it takes longest and may fill a disk.
        parts.begin("λ")
        with contextlib.suppress(KeyboardInterrupt):  # of which a warning tells
            write_rate(adata, model, keys.rate, place, gene_places=gene_places)


def _split_options(options: dict) -> tuple[dict, dict, dict]:
    """Divide further arguments into those of `SCVAE`, of `SCVAE.train`, and of Lightning's trainer.

    Raises
    ------
    UnknownArgument
        If one belongs to none.
    ValueError
        If one is out of range, or an option of the trainer does not work here.
    """

    def known(function: object) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(inspect.signature(scvae).parameters)

    of_model, of_training = known(SCVAE.__init__), known(SCVAE.train)
    for name in options:
        if name not in of_model | of_training | TRAINER_OPTIONS:
            takes = (
                f"Beside its own, it takes {', '.join(sorted(of_model))} for the model, "
                f"{', '.join(sorted(of_training))} for the training, and options of Lightning's trainer."
            )
            raise unknown_argument(
                "scvae", name, [*of_model, *of_training, *inspect.signature(scvae).parameters], takes
            )
    check_arguments(SCVAE.__init__, options)
    check_arguments(SCVAE.train, options)
    options = as_plain(options)
    parts = of_model, of_training, TRAINER_OPTIONS
    check_trainer_options({name: value for name, value in options.items() if name in TRAINER_OPTIONS}, SCVAE.train)
    return tuple({name: value for name, value in options.items() if name in part} for part in parts)
