"""Which likelihood `svt.tl.compare` finds for simulated counts, of which the true one is known.

    python benchmarks/likelihood_choice.py [--quick] [--seeds 0 1 2 3] [--model-seeds 2]

Counts of each of the four likelihoods, 1,000 cells × 300 genes: one component for the seeds 0 and 1, four for 2 and 3,
and so on. A plain VAE of each likelihood is trained on each, with two seeds. The first table has how far each
likelihood is from the best by the importance-weighted bound, in nats per held-out cell, with the standard error, and
the likelihood that the ELBO prefers. The second counts where the true likelihood is found. Quick is two seeds
of the counts, and 20 epochs.
"""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Sequence

LIKELIHOODS = ("poisson", "nb", "zip", "zinb")
N_CELLS, N_GENES = 1_000, 300
COMPONENTS = (1, 1, 4, 4)  # by seed, again and again
QUICK_SEEDS, QUICK_EPOCHS = (0, 2), 20


def compared(
    truth: str, seed: int, *, n_cells: int = N_CELLS, n_genes: int = N_GENES, model_seeds: int = 1, **options: Any
) -> pd.DataFrame:
    """Rows of one simulated data set, one for each likelihood; the ELBO is the mean over the seeds of the models.

    Parameters
    ----------
    truth
        Likelihood of the counts.
    seed
        Of the counts and of the split.
    n_cells, n_genes
        Sizes of the data.
    model_seeds
        Number of models of each likelihood.
    **options
        Arguments of `svt.tl.compare`.
    """
    n_components = COMPONENTS[seed % len(COMPONENTS)]
    adata = svt.datasets.simulate(n_cells, n_genes, n_components, likelihood=truth, random_state=seed)
    grid = {"likelihood": list(LIKELIHOODS), "random_state": list(range(model_seeds))}
    found = svt.tl.compare(adata, grid, mixture=False, random_state=seed, progress=False, **options)
    elbo = found.groupby("likelihood")["elbo_test"].transform("mean")
    named = found.assign(truth=truth, seed=seed, components=n_components, elbo=elbo)
    return named.drop_duplicates("likelihood")


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Differences from the best likelihood, by data set; the recommended one has a star."""
    rows = []
    for (truth, seed), found in table.groupby(["truth", "seed"], sort=False):
        written = {
            row["likelihood"]: f"{row['difference']:+.2f} ± {row['difference_se']:.2f}" + " *" * row["is_recommended"]
            for row in found.to_dict("records")
        }
        of_elbo = found.loc[found["elbo"].idxmax(), "likelihood"]
        rows.append({"truth": truth, "seed": seed, "components": found["components"].iloc[0]} | written)
        rows[-1]["by the ELBO"] = of_elbo
    return pd.DataFrame(rows)


def counted(table: pd.DataFrame) -> dict[str, str]:
    """How often the true likelihood is found, of how many data sets."""
    true = table[table["truth"] == table["likelihood"]]
    highest = table.groupby(["truth", "seed"])["elbo"].transform("max")
    found = {
        "the best by the importance-weighted bound": true["rank"] == 1,
        "that, or within one standard error of the best": -true["difference"] <= true["difference_se"],
        "that, or tied with the best": (true["rank"] == 1) | true["is_tied"],
        "recommended": true["is_recommended"],
        "the best by the ELBO": true["elbo"] == highest[true.index],
    }
    return {name: f"{int(is_found.sum())} of {len(true)}" for name, is_found in found.items()}


def likelihood_choice(quick: bool, seeds: Sequence[int] = (0, 1, 2, 3), **options: Any) -> pd.DataFrame:  # noqa: FBT001
    """Rows of all data sets; see `compared`."""
    if quick:
        seeds, options = QUICK_SEEDS, {"max_epochs": QUICK_EPOCHS} | options
    tables = [compared(truth, seed, **options) for seed in seeds for truth in LIKELIHOODS]
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of the data [0 1 2 3]")
    parser.add_argument("--model-seeds", type=int, default=2, help="number of models of each likelihood [2]")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    table = likelihood_choice(given.quick, given.seeds, model_seeds=given.model_seeds)
    shown = differences(table).to_string(index=False)
    print(f"\nLess the best, nats per held-out cell; * is the recommended one\n\n{shown}")
    print("\nThe true likelihood is\n\n" + "\n".join(f"{name}: {n}" for name, n in counted(table).items()))


if __name__ == "__main__":
    main()
