"""Expression by a trained model: λ, parameters, normalized and differential expression, correlations."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.model.base import RNASeqMixin
from scvi.utils import track
from torch import Tensor

from scvae_tools._checks import cell_positions, check_choice, checked
from scvae_tools._data.loader import kept_counts
from scvae_tools._messages import warn
from scvae_tools._module.mixture_vaes import GMVAE
from scvae_tools._random import seeded, with_random_state
from scvae_tools._train.run import REMEDY
from scvae_tools._upstream import quiet, rows_as_arrays
from scvae_tools.model._chunks import FilledRows, check_overall, put
from scvae_tools.model._decoding import Codes, DecodingMixin
from scvae_tools.model._differential import with_p_values
from scvae_tools.model._groups import compared_cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from anndata import AnnData

#: The parameters of p(x|z) that scvi-tools knows, by our heads.
SCVI_PARAMETERS = {"log_rate": ("mean", "mu"), "log_r": ("dispersions", "theta"), "gate": ("dropout", "zi_probs")}


class ExpressionMixin(DecodingMixin):
    """Expression by `SCVAE`, in place of the methods of scvi-tools, which hold the result twice."""

    @checked()
    @torch.inference_mode()
    def iter_lambda(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[np.ndarray]:
        """λ in chunks of cells, each (n_cells of the chunk, n_genes) float32; parameters as in `get_lambda`."""
        adata = self._validate_anndata(adata)
        genes = self._gene_positions(gene_list)
        if self.minified_data_type is not None and isinstance(self.module, GMVAE):
            raise ValueError(
                "λ of a GMVAE needs q(z|x,y) of each component, which minified data do not hold. Call `get_lambda` "
                "before minifying, or `get_normalized_expression` now."
            )
        n_decoded = self.n_components if isinstance(self.module, GMVAE) and self.is_mixture else 1
        n_bytes = self._decoded_bytes(n_decoded * self._n_genes(genes))
        n_unfit = 0
        for tensors in self._batches(adata, indices, batch_size or self._cells_at_once(adata, n_bytes)):
            if REGISTRY_KEYS.LATENT_QZM_KEY in tensors:
                _, size, covariates = self.module.data(tensors)
                rate = self.module.decode(tensors[REGISTRY_KEYS.LATENT_QZM_KEY], size, covariates, genes).mu
            else:
                rate = self.module.rate(*self.module.data(tensors), genes=genes)
            n_unfit += int((~torch.isfinite(rate.amax(1))).sum())
            yield rate.cpu().numpy()
        if n_unfit:
            warn(f"λ of {n_unfit:,} cells is NaN or infinite. {REMEDY}")

    @checked()
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
        adata, indices
            As in `get_elbo_terms`.
        gene_list
            Names of the genes, in the order of the result; None for all.
        batch_size
            Cells decoded at a time; None for as many as take about ``CHUNK_BYTES`` (256 MB), which is then the memory
            needed above the result, or above nothing where ``out`` is on disk. The result does not depend on it but
            for rounding.
        out
            Array-like of shape (n_cells, n_genes) to write into by slices of rows, for example a memory map, or an
            array of zarr or h5py; None for a new array.

        Returns
        -------
        ``out``, or an array (n_cells, n_genes) float32.

        Raises
        ------
        ValueError
            If a gene is not one of the model, ``out`` has another shape, or the model is a GMVAE with minified data.
        """
        adata = self._validate_anndata(adata)
        n_cells = len(cell_positions(indices, adata.n_obs))
        rows = FilledRows((n_cells, self._n_genes(self._gene_positions(gene_list))), out)
        for chunk in self.iter_lambda(adata, indices, gene_list, batch_size):
            array, start = rows.add(len(chunk))
            array[start : start + len(chunk)] = chunk
        return rows.result()

    @checked()
    @torch.inference_mode()
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
        adata, indices, random_state
            As in `get_elbo_terms`.
        n_samples
            Draws of z per cell.
        give_mean
            Whether to average over the draws.
        batch_size
            Cells encoded at a time, 128 for None. They are decoded in parts of about ``CHUNK_BYTES`` (256 MB), which
            is the memory needed above the result. The draws depend on ``batch_size``, as in scvi-tools, and on nothing
            else but ``random_state``.
        dataloader
            Batches, in place of ``adata``. One of unknown length (without the attribute ``indices``) needs the memory
            of the result twice.

        Returns
        -------
        ``"mean"`` (λ, in counts) and, where the likelihood has them, ``"dispersions"`` (r) and ``"dropout"``
        (probability of an excess zero); other parameters by the name of their head and as it is declared, such as
        ``"log_sigma"`` or ``"category_0"``. Each (n_cells, n_genes), or (n_samples, n_cells, n_genes), float32.
        """
        keys = {head: SCVI_PARAMETERS.get(head, (head, None)) for head in self.module.likelihood.head_names}
        averages = give_mean and n_samples > 1
        draws = (n_samples,) if n_samples > 1 and not averages else ()
        shape = (*draws, self._n_cells(adata, indices, dataloader), len(self.var_names))
        rows = {key: FilledRows(shape) for key, _ in keys.values()}
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size or settings.batch_size, dataloader):
                codes = self._draw(tensors, n_samples)
                places = {key: each.add(len(codes)) for key, each in rows.items()}
                for cells, part in self._parts(codes, None):
                    px = self._decode(codes, None, cells, part)
                    for head, (key, attribute) in keys.items():
                        value = px.params[head] if attribute is None else getattr(px, attribute)
                        value = value.expand(px.batch_shape)
                        put(places[key], cells, part, value.mean(0) if averages else value)
        return {key: value.result() for key, value in rows.items()}

    @checked()
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: Literal["uniform", "importance"] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        return_numpy: bool | None = None,  # noqa: FBT001
        silent: bool = True,  # noqa: FBT001, FBT002
        dataloader: Iterable | None = None,
        data_loader_kwargs: dict[str, Any] | None = None,
        *,
        out: Any = None,
        random_state: int = 0,
        **importance_weighting_kwargs: Any,
    ) -> pd.DataFrame | np.ndarray | Any:
        """λ over the size factor, at draws of z from q(z|x): expression as if all cells had the same size.

        Where λ depends on the size in another way too (``decode_size``, ``k_max``), it is that of a cell of the typical
        size, the median that the model was built on. Without a size factor (``use_size_factor=False``) it is λ itself.

        Arguments and numbers are those of scvi-tools, in less memory and time: only the genes asked for, and of
        ``n_samples_overall`` only the draws chosen, are decoded.

        Parameters
        ----------
        adata, indices
            As in `get_elbo_terms`.
        transform_batch
            Batch, or batches to average over, in place of each cell's own; None for its own.
        gene_list
            Names of genes; the result has them in the order of the data. Names that the model does not know are left
            out, with a warning. None for all.
        library_size
            Factor of the result, in counts; or ``"latent"`` for λ itself, with the cell's own size factor.
        n_samples
            Draws of z per cell.
        n_samples_overall
            Number of draws from all cells together, chosen at random with replacement; in place of ``n_samples``.
        weights
            Of that choice: ``"uniform"``, the same as None. The importance weights of scvi-tools are for its own prior
            and distributions.
        batch_size
            Cells encoded at a time, ``scvi.settings.batch_size`` (128) for None. They are decoded in parts of about
            ``CHUNK_BYTES`` (256 MB), which is the memory needed above the result. The draws depend on ``batch_size``,
            as in scvi-tools, and on nothing else but ``random_state``.
        return_mean
            Whether to average over the draws.
        return_numpy
            Whether to return an array in place of a table.
        silent
            Whether to show no progress over ``transform_batch``.
        dataloader
            Batches, in place of ``adata``. One of unknown length (without the attribute ``indices``) needs the memory
            of the result twice.
        data_loader_kwargs
            Further arguments of the loader that is made of ``adata``.
        out
            Array-like of the shape of the result to write into by slices of rows, for example a memory map, or an
            array of zarr or h5py; None for a new array.
        random_state
            Seed of the draws.
        **importance_weighting_kwargs
            Ignored; scvi-tools passes some.

        Returns
        -------
        ``out`` if given. Otherwise a table of cells x genes, or an array (n_cells, n_genes) float32 if asked for or if
        the cells came from a ``dataloader``. An array (n_samples, n_cells, n_genes) where draws are not averaged, and
        (n_samples_overall, n_genes) where their number is given.

        Raises
        ------
        ValueError
            If no gene or a batch is not one of the model, ``out`` has another shape, ``weights`` are not uniform, or
            ``n_samples_overall`` comes with ``n_samples``, ``out`` or a ``dataloader`` of unknown length.
        """
        if weights not in (None, "uniform"):
            raise ValueError(f"`weights` must be 'uniform' or None; found {weights!r}. Leave it out.")
        n_cells = self._n_cells(adata, indices, dataloader)
        check_overall(n_samples_overall, n_samples, out, n_cells)
        genes = self._genes_of_model(gene_list)
        decoding = _Decoding(
            genes,
            self._batch_codes(transform_batch),
            *(("mu", 1) if library_size == "latent" else ("scale", library_size)),
            averages=n_samples > 1 and return_mean,
            silent=silent,
        )
        with seeded(random_state):
            batch_size, loading = batch_size or settings.batch_size, data_loader_kwargs or {}
            batches = self._batches(adata, indices, batch_size, dataloader, **loading)
            if n_samples_overall is not None:
                return self._chosen_expression(batches, decoding, n_cells, n_samples_overall)
            array = self._expression(batches, decoding, n_cells, n_samples, out)
        if return_numpy or dataloader is not None or out is not None:
            return array
        if array.ndim == 2:
            return self._table(array, self._validate_anndata(adata), indices, genes)
        if return_numpy is False:
            warn("A table has two axes, and draws that are not averaged have three: returned is an array.")
        return array

    def _table(
        self, array: np.ndarray, adata: AnnData, indices: Sequence[int] | None, genes: Tensor | None
    ) -> pd.DataFrame:
        """An array (n_cells, n_genes) with the names of cells and genes, and without a copy."""
        index = adata.obs_names[cell_positions(indices, adata.n_obs)]
        columns = adata.var_names if genes is None else adata.var_names[genes.cpu().numpy()]
        return pd.DataFrame(array, index=index, columns=columns, copy=False)

    @torch.inference_mode()
    def _expression(self, batches: Iterable, decoding: _Decoding, n_cells: int | None, n_samples: int, out: Any) -> Any:
        """Normalized expression of all cells, (n_cells, n_genes), or (n_samples, n_cells, n_genes)."""
        draws = () if n_samples == 1 or decoding.averages else (n_samples,)
        rows = FilledRows((*draws, n_cells, self._n_genes(decoding.genes)), out)
        for tensors in batches:
            codes = self._draw_each(tensors, n_samples, decoding)
            place = rows.add(len(codes[0]))
            for cells, part, value in self._expression_parts(codes, decoding):
                put(place, cells, part, value)
        return rows.result()

    @torch.inference_mode()
    def _chosen_expression(self, batches: Iterable, decoding: _Decoding, n_cells: int, n_chosen: int) -> np.ndarray:
        """Normalized expression at draws that are chosen at random from those of all cells, (n_chosen, n_genes)."""
        n_samples = n_chosen // n_cells + 1
        # Chosen beforehand, which scvi-tools does afterwards: the stream is that of NumPy, and z comes from torch's.
        chosen = np.random.choice(n_samples * n_cells, n_chosen)  # noqa: NPY002
        sample, cell = np.divmod(chosen, n_cells)
        result = np.empty((n_chosen, self._n_genes(decoding.genes)), dtype=np.float32)
        start = 0
        for tensors in batches:
            codes = self._draw_each(tensors, n_samples, decoding)
            stop = start + len(codes[0])
            rows = np.flatnonzero((start <= cell) & (cell < stop))
            codes = [each.chosen(sample[rows], cell[rows] - start) for each in codes]
            for at, part, value in self._expression_parts(codes, decoding):
                result[rows[at], part] = value.cpu().numpy()
            start = stop
        return result

    def _draw_each(self, tensors: dict[str, Any], n_samples: int, decoding: _Decoding) -> list[Codes]:
        """Draws of z for each batch to transform to; new ones for each, as in scvi-tools."""
        is_typical = decoding.key == "scale"
        batches = track(decoding.batches, disable=decoding.silent)
        return [self._draw(tensors, n_samples, batch, at_typical_size=is_typical) for batch in batches]

    def _expression_parts(self, codes: list[Codes], decoding: _Decoding) -> Iterator[tuple[slice, slice, Tensor]]:
        """Expression, averaged over batches to transform to and, if asked for, draws: cells, genes, values."""
        for cells, part in self._parts(codes[0], decoding.genes):
            each = (self._decode(code, decoding.genes, cells, part).get_normalized(decoding.key) for code in codes)
            value = sum(each) / len(codes)
            value = value.mean(0) if decoding.averages else value
            yield cells, part, value * decoding.factor

    @checked()
    def get_feature_correlation_matrix(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 10,
        batch_size: int = 64,
        rna_size_factor: float = 1000,
        transform_batch: str | Sequence[str] | None = None,
        correlation_type: Literal["spearman", "pearson"] = "spearman",
        silent: bool = True,  # noqa: FBT001, FBT002
        *,
        random_state: int = 0,
    ) -> pd.DataFrame:
        """Correlations of the genes over the cells, in expression without differences of size.

        Over draws of z from q(z|x) of all cells, and at each of ``rna_size_factor`` · λ over the size factor, λ being
        that before zero inflation. As in scvi-tools, a likelihood with r adds the gamma noise of its negative binomial
        (variance: mean squared over r), independently for each gene; one without r adds none, so that its correlations
        are higher. For correlations of λ without noise, correlate the columns of `get_lambda` or
        `get_normalized_expression`.

        Parameters
        ----------
        adata, indices
            As in `get_elbo_terms`.
        n_samples
            Draws of z per cell.
        batch_size
            Cells at a time. The draws depend on it.
        rna_size_factor
            Counts of each cell, the same for all.
        transform_batch
            Batch, or batches to average the correlations over, in place of each cell's own; None for its own.
        correlation_type
            ``"spearman"``, of ranks, or ``"pearson"``.
        silent
            Whether to show no progress over ``transform_batch``.
        random_state
            Seed of the draws.

        Returns
        -------
        Table of genes x genes, (n_genes, n_genes).

        Notes
        -----
        All draws of all cells are in memory at once, about 12 · n_cells · n_samples · n_genes bytes: pass ``indices``
        for a part of many cells.
        """
        self._batch_codes(transform_batch)  # refuses unknown ones
        check_choice("correlation_type", correlation_type, ("spearman", "pearson"))
        options = {"batch_size": batch_size, "rna_size_factor": rna_size_factor, "silent": silent}
        options |= {"transform_batch": transform_batch, "correlation_type": correlation_type}
        with seeded(random_state):
            return super().get_feature_correlation_matrix(adata, indices, n_samples, **options)

    @torch.inference_mode()
    def _get_denoised_samples(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 25,
        batch_size: int = 64,
        rna_size_factor: float = 1000,
        transform_batch: int | None = None,
        dataloader: Iterable | None = None,
        **data_loader_kwargs: Any,
    ) -> np.ndarray:
        """Expression that scvi-tools correlates, (n_cells, n_genes), or (n_cells, n_genes, n_samples)."""
        draws = []
        for tensors in self._batches(adata, indices, batch_size, dataloader, **data_loader_kwargs):
            codes = self._draw(tensors, n_samples, transform_batch, at_typical_size=True)
            px = self._decode(codes, None, slice(None), slice(0, len(self.var_names)))
            draw = _with_gamma_noise(rna_size_factor * px.scale.cpu(), px.theta.cpu())  # (n, g) or (s, n, g)
            draws.append(draw.numpy() if draw.ndim == 2 else draw.permute(1, 2, 0).numpy())
        return np.concatenate(draws)

    def differential_expression(
        self, adata: AnnData | None = None, *args: Any, random_state: int = 0, **kwargs: Any
    ) -> pd.DataFrame:
        """Genes whose expression differs between groups of cells: a row per gene and comparison.

        The probabilities, the arguments and the columns of the table are those of scvi-tools
        (`guide <https://docs.scvi-tools.org/en/stable/user_guide/background/differential_expression.html>`__). What is
        compared is ours: λ over the size factor at draws of z from q(z|x), that before zero inflation, as
        `get_normalized_expression` gives it. Beside them are p-values, which take into account that the decoder's
        weights have errors too: the difference between the groups is tested on the counts, as in
        :func:`scvae_tools.tl.rank_components`. The calls of genes are by these p-values.

        Parameters
        ----------
        adata
            As in `get_elbo_terms`. A model of :func:`scvae_tools.tl.scvae` has cells of its own; for None it finds the
            columns of the AnnData that was passed there too, as long as it exists and has the same cells.
        groupby, group1, group2
            Column of ``obs``, the groups of it to compare, and the group to compare them with; None for each group, and
            for all other cells.
        idx1, idx2
            Cells in place of groups: their positions, a mask, or a query of ``obs``; None for all others.
        mode, delta
            ``"change"`` for the probability that the log2 fold change is beyond ``delta`` in either direction,
            ``"vanilla"`` for that of more expression in the first group.
        batch_correction
            Whether to decode the cells of both groups as of the same batches, instead of each as of its own, and to
            test for differences within batches.
        fdr_target
            False discovery rate of the calls.
        **kwargs
            The others are those of scvi-tools.
        random_state
            Seed of the draws.

        Returns
        -------
        Table indexed by the genes. Among its columns: with ``mode="change"`` ``"proba_de"`` and ``"lfc_mean"`` (of
        log2), with ``"vanilla"`` ``"proba_m1"``; ``"bayes_factor"``; ``"scale1"`` and ``"scale2"``, the mean expression
        in each group; and the means of the counts themselves. Columns that scvi-tools has not:

        ``lfc_counts``, ``lfc_se``
            Difference between the groups of the mean over the cells of log2 expression, corrected by the counts, and
            its standard error.
        ``pval``
            p-value, two-sided, of the hypothesis that this difference is within ±``delta`` (``mode="change"``) or 0.
        ``pval_adj``
            The same, adjusted for all genes (Benjamini and Hochberg). With ``mode="change"``, ``"is_de_fdr_0.05"``
            (named by ``fdr_target``) says where it is at most that rate. Only where a ``change_fn`` or
            ``m1_domain_fn`` of your own says what a difference is, this is by the probabilities, as in scvi-tools.

        They are left out, and the calls as in scvi-tools, where minified data hold no counts. Cells are taken as
        independent, and groups as given beforehand: groups found in the same counts differ by the way they were found.
        The AnnData stays as it was.

        Raises
        ------
        ValueError
            If a column, a group or a cell is none of the data, or there are no cells to compare with.
        """
        with self._columns_of_user(adata) as data:
            method = super().differential_expression
            given = inspect.signature(method).bind(data, *args, **kwargs)
            given.arguments |= compared_cells(data, given.arguments)
            manager = self.get_anndata_manager(data, required=True)
            with seeded(random_state), quiet(), rows_as_arrays(manager, kept_counts(manager)):
                table = method(*given.args, **given.kwargs)
            return with_p_values(self, table, data, given.arguments, random_state)

    # For completion and the reference: the arguments of the scvi-tools that is installed.
    differential_expression.__signature__ = inspect.signature(with_random_state(RNASeqMixin.differential_expression))
    differential_expression = checked()(differential_expression)


@dataclass(frozen=True)
class _Decoding:
    """Arguments of normalized expression beside the cells."""

    genes: Tensor | None
    batches: list[int | None]  # codes to transform to; None for each cell's own
    key: str  # of `CountDistribution.get_normalized`
    factor: float
    averages: bool  # over the draws
    silent: bool


def _with_gamma_noise(mean: Tensor, r: Tensor) -> Tensor:
    """Draws from gamma distributions of the given mean and variance mean² / r; the mean where r is infinite."""
    if torch.isinf(r).all():
        return mean
    return mean * torch.distributions.Gamma(r, torch.ones_like(r)).sample() / r
