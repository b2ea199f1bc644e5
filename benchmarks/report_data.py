"""Experiments of a reviewed report, and those that it left open, on the counts that it used and on other real counts.

    python benchmarks/report_data.py NAME [--quick] [--folder FOLDER] [--only FILE ...] [--cells N] [--epochs N]
        [--seeds 0 1]

``EXPERIMENTS`` has them by name; each returns tables with a sentence that says of what data and how. Bounds are in nats
per held-out cell; higher is better.

mouse-brain: the four likelihoods on the 20,000 cells of the report, or on simulated cells in the same shape where the
file cannot be had; every title says which. likelihoods: the same four, plain VAE, on every .h5ad of the folder (raw
counts, CSR, in ``X``, with labels) and on the PBMC that scanpy ships. latent-spaces: clusters of the latent space of a
VAE, by k-means and Leiden, beside those of both mixtures, on the labelled sets.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata
import numpy as np
import pandas as pd
from clustering import FILES, N_HIDDEN, N_LATENT, Case, cases_of_files, is_chosen, k_means, leiden, spread
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
SHIPPED = "pbmc68k_reduced"
#: Of the files, what quick runs take beside the shipped cells.
QUICK_FILE = "pbmc_10x_4k"
QUICK_CELLS, QUICK_EPOCHS = 2_000, 10
FULL_EPOCHS_OF_MOUSE_BRAIN = 50
SHARES = {"train_size": 0.81, "test_size": 0.10}
BOUNDS = {"elbo_test": "held-out ELBO", "importance_weighted_test": "importance-weighted bound"}
N_IMPORTANCE_SAMPLES = 20

Tables = list[tuple[str, pd.DataFrame]]


class Reported(NamedTuple):
    """A row of tables 2 and 3 of the report."""

    n_latent: int
    one_epoch: float  # ELBO of its grid search, nats per cell
    final: float  # ELBO of its test cells after 500 epochs, nats per cell


REPORTED = {
    "poisson": Reported(50, -12743.27, -7178.45),
    "nb": Reported(100, -6992.24, -6568.23),
    "zip": Reported(50, -12492.06, -7176.42),
    "zinb": Reported(100, -10834.93, -7181.14),
}
#: What the report trains with, and with the same networks what the package does unless told otherwise.
SETTINGS = {
    "the report's": {"lr": 1e-4, "weight_decay": 5e-2, "normalization": "batch", "posterior_variance": "shared"}
    | {"dropout_rate": 0.0},
    "our defaults": {},
}


# -- mouse brain -------------------------------------------------------------------------------------------------------


def mouse_brain_cells(n_cells: int | None, seed: int) -> tuple[anndata.AnnData, str]:
    """Cells of the report, or simulated ones in their place, and which they are. None for all 20,000."""
    try:
        adata = svt.datasets.mouse_brain_20k()
    except OSError:  # neither in the cache nor to be downloaded
        adata = svt.datasets.mouse_brain_20k_like(n_cells or 20_000, random_state=seed)
        return adata, "simulated in the same shape, not real"
    if n_cells is not None and n_cells < adata.n_obs:
        chosen = np.random.default_rng(seed).permutation(adata.n_obs)[:n_cells]
        adata = adata[np.sort(chosen)].copy()
    return adata, "real"


def mouse_brain(quick: bool = False, *, cells: int | None = None, epochs: int | None = None) -> Tables:  # noqa: FBT001, FBT002
    """Likelihoods in the sizes of the report, after one epoch and after all, beside its numbers.

    Parameters
    ----------
    quick
        One epoch on 2,000 cells, in place of 50 on all.
    cells, epochs
        Numbers in place of these.
    """
    adata, kind = mouse_brain_cells(cells or (QUICK_CELLS if quick else None), seed=0)
    epochs = epochs or (1 if quick else FULL_EPOCHS_OF_MOUSE_BRAIN)
    rows = [row for name in SETTINGS for likelihood in REPORTED for row in _trained(adata, likelihood, name, epochs)]
    table = pd.DataFrame(rows)
    size = f"{adata.n_obs:,} cells × {adata.n_vars:,} genes"
    data = f"Mouse brain, {kind}: {size}, 81 / 9 / 10 % to train on, to stop by and to test on"
    return [_beside_the_report(table, after, data, kind) for after in sorted({1, epochs})]


def _trained(adata: anndata.AnnData, likelihood: str, settings: str, epochs: int) -> Iterator[dict[str, object]]:
    """Rows of one likelihood: trained for one epoch and, anew, for all."""
    grid = {"likelihood": [likelihood], "max_epochs": sorted({1, epochs})}
    sizes = {"mixture": False, "n_layers": 1, "n_hidden": 100, "n_latent": REPORTED[likelihood].n_latent}
    options = SHARES | sizes | SETTINGS[settings] | {"n_importance_samples": N_IMPORTANCE_SAMPLES}
    found = svt.tl.compare(adata, grid, progress=False, **options)
    for row in found.to_dict("records"):
        yield row | {"settings": settings, "n_latent": sizes["n_latent"]}


def _beside_the_report(table: pd.DataFrame, epochs: int, data: str, kind: str) -> tuple[str, pd.DataFrame]:
    rows = table[table["max_epochs"] == epochs]
    theirs, column = ("one_epoch", "report, 1 epoch") if epochs == 1 else ("final", "report, 500 epochs")
    shown = {
        "likelihood": rows["likelihood"],
        "settings": rows["settings"],
        "latent": rows["n_latent"],
        "epochs": rows["epochs"],
        **{title: rows[name].round(2) for name, title in BOUNDS.items()},
        column: [getattr(REPORTED[name], theirs) for name in rows["likelihood"]],
        "seconds": rows["seconds"].round(1),
        "state": rows["state"],
    }
    cells = "" if kind == "real" else " The report's numbers are of the real cells: only the order can be compared."
    title = (
        f"{data}; {epochs} epoch{'s' * (epochs > 1)} at most. Encoder and decoder have one layer of 100, since ours "
        f"are equal: the report's decoders, and its encoder of the Poisson grid, are deeper.{cells}"
    )
    return title, pd.DataFrame(shown).reset_index(drop=True)


# -- data sets ---------------------------------------------------------------------------------------------------------


def labelled_sets(quick: bool, folder: Path, seeds: Sequence[int], only: Sequence[str] | None) -> Iterator[Case]:  # noqa: FBT001
    """The shipped cells and each file, with each seed."""
    only = only or ([SHIPPED, QUICK_FILE] if quick else None)
    if is_chosen(SHIPPED, only):
        shipped = svt.datasets.pbmc68k_reduced()
        label = shipped.obs["bulk_labels"].astype(object).to_numpy()
        yield from (Case(FILES, SHIPPED, anndata.AnnData(shipped.X), label, seed) for seed in seeds)
    options = {"labels": "cell_type", "ignore_batches": False, "quick": quick}
    yield from cases_of_files(argparse.Namespace(folder=folder, seeds=seeds, only=only, **options))


def _sentence(cases: Sequence[Case]) -> str:
    """Name the data and their sizes."""
    named = {case.name: f"{case.name} ({case.adata.n_obs:,} × {case.adata.n_vars:,})" for case in cases}
    return f"Real counts, cells × genes: {', '.join(named.values()) or 'none found'}"


# -- likelihoods -------------------------------------------------------------------------------------------------------


def likelihoods(
    quick: bool = False,  # noqa: FBT001, FBT002
    *,
    folder: Path = FOLDER,
    only: Sequence[str] | None = None,
    epochs: int | None = None,
    seeds: Sequence[int] = (0, 1),
) -> Tables:
    """Four likelihoods of a plain VAE on every set, for whether ZINB beats NB on UMI counts.

    Parameters
    ----------
    quick
        The shipped cells and one file with ten epochs, in place of all with about 4,000 steps.
    folder, only
        Where the .h5ad are, and which of them.
    epochs
        Number in place of these.
    seeds
        Of the models; the split of a set is the same for all.
    """
    cases = list(labelled_sets(quick, folder, [0], only))
    epochs = epochs or (QUICK_EPOCHS if quick else None)
    tables = [_compared(case, epochs, seeds) for case in cases]
    about = f"{_sentence(cases)}. Plain VAE, {_in_words(epochs)}; one split of each set, 80 / 10 / 10 %"
    deviation = f"mean ± standard deviation over {len(seeds)} seeds"
    return [
        (f"{about}. Bounds of the test cells in nats per cell, {deviation}.", _bounds(cases, tables)),
        (
            f"{about}. Bounds less those of NB of the same seed, in nats per cell, {deviation}: above 0 where the "
            "likelihood beats NB.",
            _less_nb(cases, tables),
        ),
    ]


def _in_words(epochs: int | None) -> str:
    return "about 4,000 steps at most" if epochs is None else f"{epochs} epochs at most"


def _compared(case: Case, epochs: int | None, seeds: Sequence[int]) -> pd.DataFrame:
    grid = {"likelihood": list(REPORTED), "random_state": list(seeds)}
    options = {"mixture": False, "n_hidden": N_HIDDEN, "n_latent": N_LATENT, "batch_key": case.batch_key}
    return svt.tl.compare(
        case.adata, grid, max_epochs=epochs, n_importance_samples=N_IMPORTANCE_SAMPLES, progress=False, **options
    )


def _bounds(cases: Sequence[Case], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    rows = [
        {"data": case.name, "likelihood": name}
        | {title: spread(found[bound], 2) for bound, title in BOUNDS.items()}
        | {"epochs": spread(found["epochs"].astype(float), 0), "seconds": spread(found["seconds"], 1)}
        | {"failed": int((found["state"] != "finished").sum())}
        for case, table in zip(cases, tables, strict=True)
        for name, found in table.groupby("likelihood", sort=False)
    ]
    return pd.DataFrame(rows)


def _less_nb(cases: Sequence[Case], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One row for each set, one column for each other likelihood and bound."""
    rows = []
    for case, table in zip(cases, tables, strict=True):
        of = {bound: table.pivot_table(bound, "random_state", "likelihood", dropna=False) for bound in BOUNDS}
        others = [name for name in REPORTED if name != "nb"]
        columns = {
            f"{name}, {title}": spread(of[bound][name] - of[bound]["nb"], 2)
            for name in others
            for bound, title in BOUNDS.items()
        }
        rows.append({"data": case.name} | columns)
    return pd.DataFrame(rows)


# -- latent spaces -----------------------------------------------------------------------------------------------------


def latent_spaces(
    quick: bool = False,  # noqa: FBT001, FBT002
    *,
    folder: Path = FOLDER,
    only: Sequence[str] | None = None,
    epochs: int | None = None,
    seeds: Sequence[int] = (0, 1),
) -> Tables:
    """Clusters of the latent space of a VAE beside the components of the mixtures, by their agreement with labels.

    Parameters
    ----------
    quick
        The shipped cells and one file, seed 0, with at most 30 epochs, in place of all with about 4,000 steps.
    folder, only
        Where the .h5ad are, and which of them.
    epochs
        Number in place of these.
    seeds
        Of split and models.
    """
    cases = list(labelled_sets(quick, folder, [0] if quick else seeds, only))
    epochs = epochs or (3 * QUICK_EPOCHS if quick else None)
    table = pd.DataFrame(list(chain.from_iterable(_agreements(case, epochs) for case in cases)))
    about = (
        f"{_sentence(cases)}. NB, {N_LATENT} latent dimensions, {_in_words(epochs)}. Adjusted Rand index of all "
        "labelled cells and their labels, mean ± standard deviation over seeds"
    )
    return [
        (f"{about}; the number of labels is given to every method.", _agreement_table(table, is_known=True)),
        (f"{about}, and the number of clusters found; it is given to none.", _agreement_table(table, is_known=False)),
    ]


def _model(case: Case, epochs: int | None, *, mixture: str | bool, k: int | None = None) -> svt.SCVAE:
    adata = case.adata.copy()
    svt.SCVAE.setup_anndata(adata, batch_key=case.batch_key)
    size = {"n_hidden": N_HIDDEN, "n_latent": N_LATENT, "n_components": k}
    model = svt.SCVAE(adata, likelihood="nb", mixture=mixture, random_state=case.seed, **size)
    model.train(epochs, validation_indices=case.validation, random_state=case.seed, progress=False)
    return model


def _partitions(case: Case, epochs: int | None) -> Iterator[tuple[str, bool, np.ndarray]]:
    """Method, whether it is given the number of labels, and clusters, (n_cells,)."""
    latent = _model(case, epochs, mixture=False).get_latent_representation()
    yield "VAE + k-means", True, k_means(latent, case.n_labels, case.seed)
    yield "VAE + Leiden", False, leiden(latent, None, case.seed)
    for name, mixture in {"GMVAE": "gmvae", "VaDE": "vade"}.items():
        yield name, True, _model(case, epochs, mixture=mixture, k=case.n_labels).predict()
        yield name, False, _model(case, epochs, mixture=mixture).predict()


def _agreements(case: Case, epochs: int | None) -> Iterator[dict[str, object]]:
    label = case.label[case.is_labelled].astype(str)
    for method, is_known, cluster in _partitions(case, epochs):
        agreement = adjusted_rand_score(label, np.asarray(cluster)[case.is_labelled])
        found = {"ARI": float(agreement), "found": len(set(cluster)), "labels": case.n_labels}
        yield {"data": case.name, "method": method, "is_known": is_known, "seed": case.seed} | found


def _agreement_table(table: pd.DataFrame, *, is_known: bool) -> pd.DataFrame:
    if table.empty:
        return table
    rows = [
        {"data": data, "method": method, "labels": seeds["labels"].iloc[0], "ARI": spread(seeds["ARI"], 3)}
        | ({} if is_known else {"found": spread(seeds["found"], 1)})
        for (data, method), seeds in table[table["is_known"] == is_known].groupby(["data", "method"], sort=False)
    ]
    return pd.DataFrame(rows)


# -- the command -------------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[..., Tables]] = {
    "mouse-brain": mouse_brain,
    "likelihoods": likelihoods,
    "latent-spaces": latent_spaces,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="few cells, sets and epochs")
    parser.add_argument("--folder", type=Path, help="of the .h5ad; ../shared/data if not given")
    parser.add_argument("--only", nargs="+", metavar="FILE", help=f"files without .h5ad, {SHIPPED}; also patterns")
    parser.add_argument("--cells", type=int, help="of the mouse brain")
    parser.add_argument("--epochs", type=int, help="at most, of each training")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 if not given")
    return parser.parse_args()


def main() -> None:
    """Run one experiment and print its tables; an option that it does not know is an error."""
    options = vars(parse())
    warnings.simplefilter("ignore")
    run = partial(EXPERIMENTS[options.pop("name")], options.pop("quick"))
    for title, table in run(**{name: value for name, value in options.items() if value is not None}):
        print(f"\n{title}\n\n{table.to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
