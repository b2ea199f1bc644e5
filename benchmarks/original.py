"""Our GMVAE beside a run of the original scVAE, on the same cells: the curve of the validation ELBO, clusters, seconds.

    python benchmarks/original.py FILE [--quick] [--settings original|ours|both|all] [--seeds 0]

``FILE`` holds the counts of ``pbmc_10x_4k.h5ad`` (4,271 × 2,000), with labels in ``obs["cell_type"]``. The numbers of
the original are in ``tests/references``, with their origin; none of its code is run here.

``original`` trains with the settings of that run, as far as the model has them, ``ours`` with our defaults, ``all``
also with these but no size factor (three ways); always on the same split, for the same number of epochs, and with 8
components. Bounds are in nats per cell; higher is better. ``--quick`` trains for ten epochs.

The original trains its mixture from the first epoch on. Ours trains by stages within the same number of epochs: a
plain VAE with and after the warm-up of the KL terms, then, for the last 30 %, the mixture. So the curve is that of the
VAE at first.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata
import numpy as np
import pandas as pd
from report import as_markdown
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "references" / "original_gmvae_pbmc.json"
SPLIT_SEED, SPLIT_FRACTION = 42, 0.9  # of the original
EPOCHS, QUICK_EPOCHS = 200, 10
#: Tolerance of "at least as high", in nats per cell: the error of rounding in the numbers of the original.
ROUNDING = 0.01
N_COMPONENTS = 8
#: Of the model and of `train`. The original's run: its defaults, and what its command sets.
ORIGINAL = (
    {
        "n_hidden": (100, 100),
        "dropout_rate": 0.0,
        "dispersion": "gene-cell",
        "covariance": "diag",
        "weights": "uniform",
        "normalization": "batch",
        "encoder_input": "counts",
        "use_size_factor": False,
    },
    {"lr": 1e-4, "batch_size": 100, "n_warm_up_epochs": 50, "kl_weight_start": 0.0},
)
SIZE_IN_Z = {"use_size_factor": False, "encoder_input": "log1p"}
SETTINGS = {
    "original": ORIGINAL,
    "ours": ({}, {}),
    # Else the bound is of counts whose total is known, which the original's is not; "log1p" lets the encoder see it.
    "ours, no size factor": ({"use_size_factor": False}, {}),
    "ours, no size factor, log1p": (SIZE_IN_Z, {}),
    "ours, its likelihood": (SIZE_IN_Z | {"dispersion": "gene-cell"}, {}),
}
CHOICES = {"original": ["original"], "ours": ["ours"], "both": ["original", "ours"], "all": [*SETTINGS]}


class Split(NamedTuple):
    """Positions of the cells in the file."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def original_split(n_cells: int) -> Split:
    """Random split of the original: 81, 9 and 10 % of the cells, from its seed."""
    n_kept = int(SPLIT_FRACTION * n_cells)
    n_train = int(SPLIT_FRACTION * n_kept)
    order = np.random.RandomState(SPLIT_SEED).permutation(n_cells)
    return Split(order[:n_train], order[n_train:n_kept], order[n_kept:])


def majority_labels(label: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Label of most cells of each cell's cluster, as the original predicts it: from the cells that are judged."""
    return pd.Series(label).groupby(np.asarray(cluster)).transform(lambda own: own.value_counts().index[0]).to_numpy()


class Run(NamedTuple):
    """A training and what it is judged by."""

    history: pd.DataFrame
    scores: dict[str, float]


def run(adata: anndata.AnnData, split: Split, settings: str, seed: int, epochs: int) -> Run:
    """Train on all but the test cells; the bound and the clusters of the test cells.

    Parameters
    ----------
    adata
        Counts, with labels in ``obs["cell_type"]``.
    split
        Which cells are trained on, validated and tested.
    settings
        Key of `SETTINGS`.
    seed
        Of weights, order of cells and draws.
    epochs
        Of all stages together; the warm-up is shortened to what fits.
    """
    seen = adata[np.r_[split.train, split.validation]].copy()
    test = adata[split.test].copy()
    svt.SCVAE.setup_anndata(seen)
    of_model, of_training = (dict(options) for options in SETTINGS[settings])
    if "n_warm_up_epochs" in of_training:
        of_training["n_warm_up_epochs"] = min(of_training["n_warm_up_epochs"], epochs // 4)
    model = svt.SCVAE(seen, likelihood="nb", n_components=N_COMPONENTS, n_latent=10, random_state=seed, **of_model)
    held_out = np.arange(len(split.train), seen.n_obs)
    start, started = time.perf_counter(), time.process_time()
    model.train(
        epochs, validation_indices=held_out, early_stopping=False, progress=False, random_state=seed, **of_training
    )
    seconds, of_processor = time.perf_counter() - start, time.process_time() - started
    cluster, label = model.predict(test), test.obs["cell_type"].astype(str).to_numpy()
    given = majority_labels(label, cluster)
    scores = {
        "test ELBO": model.get_elbo(test),
        "ARI, clusters": adjusted_rand_score(label, cluster),
        "ARI, majority labels": adjusted_rand_score(label, given),
        "accuracy": float((given == label).mean()),
        "seconds": seconds,
        "seconds of processor": of_processor,
    }
    return Run(model.history, scores)


def read_reference() -> dict:
    """Numbers of the original; where they come from is said beside them."""
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def curves(reference: dict, runs: dict[tuple[str, int], Run], epochs: int) -> pd.DataFrame:
    """Validation ELBO after every tenth epoch, of the original and of each run, and whether the run's is as high."""
    theirs = pd.Series({row["epoch"]: row["validation_elbo"] for row in reference["curve"]})
    shown = pd.Index([epoch for epoch in theirs.index if epoch <= epochs], name="epoch")
    table = pd.DataFrame({"epoch": shown, "original scVAE": theirs.loc[shown].to_numpy()})
    for (settings, seed), of_run in runs.items():
        name = _title(settings, seed, runs)
        table[name] = of_run.history.set_index("epoch")["elbo_validation"].reindex(shown).to_numpy()
        table[f"{name}: as high"] = np.where(table[name] >= table["original scVAE"] - ROUNDING, "yes", "no")
    return table


def scores(reference: dict, runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """Scores of the test cells and seconds of the training, a row for each run."""
    theirs, n_trained = reference["test"], reference["n_cells"]["training"]
    seconds = EPOCHS * n_trained / 100 * reference["speed"]["train_seconds_per_100_cells"]
    first = {
        "test ELBO": theirs["elbo_corrected"],
        "ARI, clusters": theirs["ari_clusters"],
        "ARI, majority labels": theirs["ari_majority_labels"],
        "accuracy": theirs["accuracy"],
        "seconds": round(seconds),
        "seconds of processor": np.nan,
    }
    rows = [{"run": "original scVAE"} | first]
    for (settings, seed), of_run in runs.items():
        own = {name: round(value) if name.startswith("seconds") else value for name, value in of_run.scores.items()}
        rows.append({"run": _title(settings, seed, runs)} | own)
    return pd.DataFrame(rows)


def _title(settings: str, seed: int, runs: dict[tuple[str, int], Run]) -> str:
    name = {"original": "its settings"}.get(settings, settings.replace("ours", "our defaults"))
    return name if len({seed for _, seed in runs}) == 1 else f"{name}, seed {seed}"


def measure(
    adata: anndata.AnnData, settings: Sequence[str], seeds: Sequence[int], epochs: int
) -> Iterator[tuple[tuple[str, int], Run]]:
    """Runs by settings and seed, one after the other."""
    split = original_split(adata.n_obs)
    for name in settings:
        for seed in seeds:
            yield (name, seed), run(adata, split, name, seed, epochs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs in place of {EPOCHS}")
    parser.add_argument("--settings", choices=CHOICES, default="both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args(arguments)
    adata, epochs = anndata.read_h5ad(given.file), QUICK_EPOCHS if given.quick else EPOCHS
    split, reference = original_split(adata.n_obs), read_reference()
    sizes = [len(part) for part in split]
    print(f"{adata.n_obs:,} cells × {adata.n_vars:,} genes: {sizes} to train, validate and test; {epochs} epochs")
    if sizes != list(reference["n_cells"].values()):
        print("These are not the cells of the original's run: its numbers are of other data.")
    runs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for key, done in measure(adata, CHOICES[given.settings], given.seeds, epochs):
            runs[key] = done
            print(*key, {name: round(value, 3) for name, value in done.scores.items()}, flush=True)
    print("\nValidation ELBO\n\n" + as_markdown(curves(reference, runs, epochs)))
    print("\nTest cells\n\n" + as_markdown(scores(reference, runs)))


if __name__ == "__main__":
    main()
