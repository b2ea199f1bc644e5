"""Agreement with labels of our clusters beside those of scVI and of PCA, with the number of clusters given and not.

    python benchmarks/clustering.py [FOLDER] [--seeds 0 1 2] [--quick] [--simulated] [--only NAME ...]
        [--methods NAME ...] [--labels cell_type] [--ignore-batches] [--json FILE]

Takes every .h5ad of the folder with raw counts, CSR, in ``X``, and labels in ``obs``. All models of a file and a seed
hold out the same 10 % of the cells, have the NB likelihood, one hidden layer of 128 and 10 latent dimensions, and
know of ``obs["batch"]`` where there are several. ``--simulated`` adds simulated cells, whose components lie clearly
apart.

Setting "k known": the number of labels is given; "k unknown": it is not, nor any option in its place. scVI trains its
default number of epochs. Its latent space is trained once for all rows that cluster it; so is the space of PCA.

ARI and NMI leave out the cells labelled NA, ambiguous or unknown, as does the true number of labels. ELBO: nats per
held-out cell, mean of 5 samples. Seconds: until the clusters are known, with the training of the latent space, without
the computation of scores. "same batch": share of the 30 nearest neighbours in the latent space that come from the
cell's own batch; "if mixed": what it is if batches do not matter. Standard deviations (after ±) are over seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import platform
import time
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NO_LABEL = ("NA", "nan", "ambiguous", "unknown")
N_HIDDEN, N_LATENT = 128, 10
N_ELBO_SAMPLES = 5
QUICK_EPOCHS = 100
N_GENES_OF_PCA, N_PCS = 2_000, 30
N_NEIGHBORS_OF_BATCHES = 30
KNOWN, UNKNOWN = "k known", "k unknown"
FILES, SIMULATIONS = "files", "separated simulations"

#: Numbers of components; the largest has 50 times the cells of the smallest.
SIMULATED = (2, 5, 10, 20)
#: With the true means of the components at hand, every cell can be told.
SEPARATED = {"n_cells": 3_000, "n_genes": 500, "separation": 1.5, "share_changed": 0.3}


class Space(NamedTuple):
    """A latent space of all cells, the held-out ELBO of its model, and the seconds it took."""

    latent: np.ndarray  # (n_cells, n_latent)
    elbo: float
    seconds: float


class Found(NamedTuple):
    """Clusters, the space they are in, and the seconds until they were known."""

    cluster: np.ndarray  # (n_cells,)
    space: Space
    seconds: float


@dataclass(frozen=True, eq=False)
class Case:
    """Cells with labels, and one split of them.

    Parameters
    ----------
    section, name
        Of the table, and of the file or simulation.
    adata
        Counts, with the batch in ``obs`` if models are to know of it.
    label
        Label of each cell, (n_cells,); NaN where there is none.
    seed
        Of the split, and of all that is random in a method.
    scvi_epochs
        None for the default of scVI.
    """

    section: str
    name: str
    adata: anndata.AnnData
    label: np.ndarray = field(repr=False)
    seed: int
    scvi_epochs: int | None = None

    @property
    def is_labelled(self) -> np.ndarray:
        return ~pd.isna(self.label)

    @property
    def n_labels(self) -> int:
        return len(set(self.label[self.is_labelled]))

    @property
    def batch_key(self) -> str | None:
        return "batch" if "batch" in self.adata.obs else None

    @property
    def validation(self) -> np.ndarray:
        """Positions of the cells that are held out."""
        n = self.adata.n_obs
        return np.random.default_rng(self.seed).permutation(n)[: n // 10]

    @functools.cached_property
    def scvi(self) -> Space:
        """Latent space of scVI."""
        import scvi

        scvi.settings.verbosity = logging.ERROR
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.manual_seed(self.seed)
        adata, start = self.adata.copy(), time.perf_counter()
        scvi.model.SCVI.setup_anndata(adata, batch_key=self.batch_key)
        model = scvi.model.SCVI(adata, gene_likelihood="nb", n_hidden=N_HIDDEN, n_layers=1, n_latent=N_LATENT)
        train = np.setdiff1d(np.arange(adata.n_obs), self.validation)
        split = {"external_indexing": [train, self.validation]}
        model.train(self.scvi_epochs, datasplitter_kwargs=split, enable_progress_bar=False)
        latent = model.get_latent_representation()
        seconds = time.perf_counter() - start
        elbo = np.mean([float(model.get_elbo(indices=self.validation)) for _ in range(N_ELBO_SAMPLES)])
        return Space(latent, float(elbo), seconds)

    @functools.cached_property
    def pca(self) -> Space:
        """Principal components as in the tutorials of scanpy."""
        adata, start = self.adata.copy(), time.perf_counter()
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        if adata.n_vars > N_GENES_OF_PCA:
            sc.pp.highly_variable_genes(adata, n_top_genes=N_GENES_OF_PCA, subset=True)
        sc.pp.scale(adata, max_value=10)
        sc.pp.pca(adata, n_comps=min(N_PCS, min(adata.shape) - 1), random_state=self.seed)
        return Space(adata.obsm["X_pca"], np.nan, time.perf_counter() - start)


# -- methods -----------------------------------------------------------------------------------------------------------


def ours(case: Case, k: int | None, *, mixture: bool | str) -> Found:
    """Our model with its defaults."""
    adata, start = case.adata.copy(), time.perf_counter()
    svt.SCVAE.setup_anndata(adata, batch_key=case.batch_key)
    size = {"n_hidden": N_HIDDEN, "n_layers": 1, "n_latent": N_LATENT}
    model = svt.SCVAE(adata, likelihood="nb", mixture=mixture, n_components=k, random_state=case.seed, **size)
    model.train(validation_indices=case.validation, random_state=case.seed, progress=False)
    cluster, latent = model.predict(), model.get_latent_representation()
    seconds = time.perf_counter() - start
    elbo = model.get_elbo(indices=case.validation, n_samples=N_ELBO_SAMPLES)
    return Found(cluster, Space(latent, elbo, seconds), seconds)


def clustered(case: Case, k: int | None, *, space: str, cluster: Callable[..., np.ndarray]) -> Found:
    """Clusters of a space that other rows share."""
    found = getattr(case, space)
    start = time.perf_counter()
    labels = cluster(found.latent, k, case.seed)
    return Found(labels, found, found.seconds + time.perf_counter() - start)


def k_means(latent: np.ndarray, k: int, seed: int) -> np.ndarray:
    return KMeans(k, n_init=10, random_state=seed).fit_predict(latent)


def tied_mixture(latent: np.ndarray, k: int, seed: int) -> np.ndarray:
    mixture = GaussianMixture(k, covariance_type="tied", n_init=10, random_state=seed)
    return mixture.fit_predict(latent.astype(np.float64))


def leiden(latent: np.ndarray, _: None, seed: int) -> np.ndarray:
    cells = anndata.AnnData(latent)
    sc.pp.neighbors(cells, n_neighbors=15, use_rep="X", random_state=seed)
    options = {"flavor": "igraph", "n_iterations": 2, "directed": False}
    sc.tl.leiden(cells, resolution=1, random_state=seed, **options)
    return cells.obs["leiden"].to_numpy()


class Method(NamedTuple):
    """A row of each table: clusters of a case and k, which is None in the setting "k unknown"."""

    find: Callable[[Case, int | None], Found]
    settings: tuple[str, ...] = (KNOWN, UNKNOWN)


METHODS: dict[str, Method] = {
    "scvae-tools": Method(partial(ours, mixture=True)),
    "scvae-tools vade": Method(partial(ours, mixture="vade")),
    "scVI + k-means": Method(partial(clustered, space="scvi", cluster=k_means), (KNOWN,)),
    "scVI + tied mixture": Method(partial(clustered, space="scvi", cluster=tied_mixture), (KNOWN,)),
    "scVI + Leiden": Method(partial(clustered, space="scvi", cluster=leiden), (UNKNOWN,)),
    "PCA + k-means": Method(partial(clustered, space="pca", cluster=k_means), (KNOWN,)),
    "PCA + Leiden": Method(partial(clustered, space="pca", cluster=leiden), (UNKNOWN,)),
}
NOT_QUICK = ("scvae-tools vade",)
METHODS_OF_SIMULATIONS = ("scvae-tools",)


# -- data --------------------------------------------------------------------------------------------------------------


def unusable(adata: anndata.AnnData, labels: str) -> str | None:
    """Why a file is left out; None if it is not."""
    if labels not in adata.obs:
        return f"no obs[{labels!r}]"
    if not (sparse.issparse(adata.X) and adata.X.format == "csr"):
        return f"X is not CSR but {type(adata.X).__name__}"
    if (adata.X.data < 0).any() or (adata.X.data % 1 != 0).any():
        return "X holds no raw counts"
    return None


def cases_of_files(options: argparse.Namespace) -> Iterator[Case]:
    """Each file with each seed; says which are left out."""
    paths = sorted(options.folder.glob("*.h5ad"))
    if not paths:
        print(f"no .h5ad in {options.folder}", flush=True)
    for path in paths:
        if not is_chosen(path.stem, options.only):
            continue
        read = anndata.read_h5ad(path)
        reason = unusable(read, options.labels)
        if reason is not None:
            print(f"{path.stem}: left out, {reason}", flush=True)
            continue
        label = read.obs[options.labels].astype(object).to_numpy(copy=True)
        label[pd.isna(label) | np.isin(label.astype(str), NO_LABEL)] = np.nan
        has_batches = "batch" in read.obs and read.obs["batch"].nunique() > 1 and not options.ignore_batches
        adata = anndata.AnnData(read.X, obs=read.obs[["batch"] if has_batches else []].copy())
        for seed in options.seeds:
            yield Case(FILES, path.stem, adata, label, seed, QUICK_EPOCHS if options.quick else None)


def cases_of_simulations(options: argparse.Namespace) -> Iterator[Case]:
    """Components of very different sizes, each number with each seed."""
    for k in SIMULATED:
        name = f"simulated_{k}"
        if not is_chosen(name, options.only):
            continue
        sizes = np.geomspace(1, 1 / 50, k)
        for seed in options.seeds:
            whole = svt.datasets.simulate(
                n_components=k, proportions=sizes / sizes.sum(), random_state=seed, **SEPARATED
            )
            label = whole.obs["component"].astype(object).to_numpy()
            scvi_epochs = QUICK_EPOCHS if options.quick else None
            yield Case(SIMULATIONS, name, anndata.AnnData(whole.X), label, seed, scvi_epochs)


def is_chosen(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch(name, pattern) for pattern in patterns)


# -- scores ------------------------------------------------------------------------------------------------------------


def same_batch(case: Case, latent: np.ndarray) -> tuple[float, float]:
    """Share of neighbours that come from the cell's batch, and what it is if batches are mixed; NaN without batches."""
    if case.batch_key is None:
        return np.nan, np.nan
    batch = case.adata.obs[case.batch_key].astype(str).to_numpy()
    n_neighbors = min(N_NEIGHBORS_OF_BATCHES, len(batch) - 1)
    neighbors = NearestNeighbors(n_neighbors=n_neighbors).fit(latent).kneighbors(return_distance=False)
    shares = np.unique(batch, return_counts=True)[1] / len(batch)
    return float((batch[neighbors] == batch[:, None]).mean()), float((shares**2).sum())


def measure(case: Case, setting: str, name: str) -> dict[str, object]:
    """A row: one method, setting, file and seed."""
    k = case.n_labels if setting == KNOWN else None
    found = METHODS[name].find(case, k)
    label, cluster = case.label[case.is_labelled].astype(str), found.cluster[case.is_labelled]
    same, mixed = same_batch(case, found.space.latent)
    return {
        "section": case.section,
        "setting": setting,
        "file": case.name,
        "method": name,
        "seed": case.seed,
        "ARI": float(adjusted_rand_score(label, cluster)),
        "NMI": float(normalized_mutual_info_score(label, cluster)),
        "ELBO": float(found.space.elbo),
        "found": len(set(found.cluster)),
        "true": case.n_labels,
        "seconds": found.seconds,
        "same batch": same,
        "if mixed": mixed,
    }


def line(row: dict[str, object]) -> str:
    """What is printed of a row as soon as it is known."""
    where = f"{row['file']:<16} seed {row['seed']}  {row['setting']:<9}  {row['method']:<19}"
    scores = f"ARI {row['ARI']:6.3f}  NMI {row['NMI']:.3f}  ELBO {row['ELBO']:10.2f}"
    batches = "" if np.isnan(row["same batch"]) else f"  same batch {row['same batch']:.3f} of {row['if mixed']:.3f}"
    return f"{where}  {scores}  found {row['found']:>3} of {row['true']:>2}  {row['seconds']:6.1f} s{batches}"


# -- tables ------------------------------------------------------------------------------------------------------------


def spread(values: pd.Series, digits: int) -> str:
    """Mean and standard deviation over seeds; nothing where there is no value."""
    if values.isna().all():
        return ""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


DIGITS = {"ARI": 3, "NMI": 3, "ELBO": 2, "less scVI's": 2, "found": 1, "seconds": 1, "same batch": 3}


def less_scvi(rows: pd.DataFrame) -> pd.Series:
    """ELBO minus that of scVI on the same cells; NaN where scVI was not run."""
    of_scvi = rows[rows["method"].str.startswith("scVI")].groupby(["file", "seed"])["ELBO"].first()
    return rows["ELBO"] - of_scvi.reindex(pd.MultiIndex.from_frame(rows[["file", "seed"]])).to_numpy()


def by_file(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each file and method."""
    table = []
    for (file, method), seeds in rows.groupby(["file", "method"], sort=False):
        scores = {name: spread(seeds[name], digits) for name, digits in DIGITS.items()}
        scores["if mixed"] = spread(seeds["if mixed"].head(1), 3)
        table.append({"file": file, "method": method, "true": seeds["true"].iloc[0]} | scores)
    table = pd.DataFrame(table)
    return table.loc[:, (table != "").any()]


def over_files(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each method: what its ARI is on average, and how much it depends on the seed."""
    each = rows.groupby(["method", "file"], sort=False)["ARI"].agg(["mean", "std"])
    table = each.groupby("method", sort=False).agg(["mean", "size"])
    columns = {
        "mean ARI": ("mean", "mean"),
        "mean standard deviation over seeds": ("std", "mean"),
        "files": ("mean", "size"),
    }
    return pd.DataFrame({name: table[of] for name, of in columns.items()}).round(3).reset_index()


def print_tables(rows: list[dict[str, object]]) -> None:
    if not rows:
        return
    table = pd.DataFrame(rows)
    table["less scVI's"] = less_scvi(table)
    for (section, setting), part in table.groupby(["section", "setting"], sort=False):
        print(f"\n{section}, {setting}\n{by_file(part).to_string(index=False)}")
        print(f"\n{section}, {setting}, over files\n{over_files(part).to_string(index=False)}", flush=True)


def facts(options: argparse.Namespace) -> dict[str, object]:
    """What the numbers depend on."""
    packages = ("scvae-tools", "scvi-tools", "torch", "scanpy")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "labels": options.labels,
        "quick": options.quick,
    }


def write(path: Path, about: dict[str, object], rows: list[dict[str, object]]) -> None:
    """Write the single rows; JSON knows no NaN."""
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    path.write_text(json.dumps({"about": about, "rows": plain}, indent=1) + "\n")


# -- the command -------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    names = ", ".join(repr(name) for name in METHODS)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=folder, help="of the .h5ad; ../shared/data if not given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 if not given")
    parser.add_argument("--quick", action="store_true", help="seed 0, without vade, scVI with 100 epochs")
    parser.add_argument("--simulated", action="store_true", help="simulations too, by default with scvae-tools alone")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files without .h5ad, or simulated_2; also patterns")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=names)
    parser.add_argument("--labels", default="cell_type", help="column of obs")
    parser.add_argument("--ignore-batches", action="store_true", help="models know nothing of obs['batch']")
    parser.add_argument("--json", type=Path, help="file to write, after each row anew")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    return options


def warm_up(methods: Sequence[str]) -> None:
    """Import and compile what would else count for the first row that needs it."""
    svt.SCVAE  # noqa: B018, imports all that it needs
    cells = svt.datasets.simulate(200, 50, 2)
    if any(name.startswith("PCA") for name in methods):
        _ = Case(SIMULATIONS, "", cells, np.array([]), 0).pca
    if any(name.endswith("Leiden") for name in methods):
        leiden(np.random.default_rng(0).standard_normal((5_000, N_LATENT)), None, 0)  # exact neighbors below 4,096


def main() -> None:
    """Run, print the tables and write the file."""
    options = parse()
    warnings.simplefilter("ignore")
    about, rows = facts(options), []
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    default = [name for name in METHODS if not (options.quick and name in NOT_QUICK)]
    plan = [(cases_of_files(options), options.methods or default)]
    if options.simulated:
        plan.append((cases_of_simulations(options), options.methods or METHODS_OF_SIMULATIONS))
    warm_up([name for _, methods in plan for name in methods])
    for cases, methods in plan:
        for case in cases:
            for setting in (KNOWN, UNKNOWN):
                for name in (name for name in methods if setting in METHODS[name].settings):
                    rows.append(measure(case, setting, name))
                    print(line(rows[-1]), flush=True)
                    if options.json is not None:
                        write(options.json, about, rows)
    print_tables(rows)


if __name__ == "__main__":
    main()
