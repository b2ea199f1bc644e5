"""Stages of a training: KL warm-up, VAE, mixture; how many epochs each has, and the default number of epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: Nats that a squared distance of 1 of the latent means from the principal codes costs at the start. It falls to 0, and
#: ten times as much gave the same (docs/model.md).
PULL = 10.0
#: Steps for which the VAE waits for a better validation ELBO, as many as twenty epochs of 4,000 cells have.
PATIENCE_STEPS = 640


@dataclass(frozen=True)
class Stage:
    """A named part of the training.

    Parameters
    ----------
    name
        Name in the history.
    max_epochs
        Largest number of epochs.
    warms_up
        Whether the weight of the KL terms goes from ``kl_weight_start`` to 1 over the stage; such a stage never stops
        early.
    is_mixture
        Whether the mixture's bound is trained.
    drops_out
        Whether dropout acts.
    kl_weight_start
        Weight of the KL terms at the beginning of a stage that warms up, relative to that in the other stages.
    patience
        Epochs without a better validation ELBO after which the stage ends.
    has_codes
        Whether the latent means are drawn to principal codes while the stage warms up.
    """

    name: str
    max_epochs: int
    warms_up: bool = False
    is_mixture: bool = False
    drops_out: bool = False
    kl_weight_start: float = 0.0
    patience: int = 20
    has_codes: bool = False

    def kl_weight(self, share: float) -> float:
        """Weight of the KL terms, relative to that in the other stages, when a share of the steps is done."""
        if not self.warms_up:
            return 1.0
        done = min(1.0, share)
        return (1 - done) * self.kl_weight_start + done

    def pull(self, share: float) -> float | None:
        """Weight of the distance from the principal codes when a share of the steps is done; None where it is none."""
        return PULL * (1 - min(1.0, share)) if self.has_codes else None


def noise_edge(n_cells: int, n_genes: int) -> float:
    """Largest variance of a direction in which cells do not differ, relative to the noise of one gene, ≥ 1.

    It is the upper edge (1 + √(g/n))² of the eigenvalues of the covariance of g standardised genes in n cells without
    any structure (Marchenko and Pastur 1967, doi:10.1070/SM1967v001n04ABEH001994). A linear VAE with this weight of the
    KL terms uses a latent dimension only where the variance is larger (Lucas et al. 2019, arXiv:1911.02469).
    """
    return (1 + math.sqrt(n_genes / n_cells)) ** 2


def default_max_epochs(n_cells: int) -> int:
    """Epochs for about 4,000 steps of 128 cells, at least 20 and at most 400."""
    return int(np.clip(round(4_000 * 128 / n_cells), 20, 400))


def default_patience(n_steps: int, *, is_mixture: bool = False) -> int:
    """Epochs without a better validation ELBO after which a stage ends, at ``n_steps`` an epoch.

    Twenty; for the VAE, as many as have `PATIENCE_STEPS` steps, if that is more. Dimensions that hold a small
    difference grow slowly at first, and the twenty epochs of 1,000 cells have 160 steps: the VAE ended before such a
    dimension had begun to pay. A mixture starts with the dimensions that are there.
    """
    return 20 if is_mixture else max(20, math.ceil(PATIENCE_STEPS / max(1, n_steps)))


def plan_stages(
    max_epochs: int,
    *,
    mixture: bool,
    resumes_vae: bool = False,
    resumes_mixture: bool = False,
    n_warm_up_epochs: int | None = None,
) -> list[Stage]:
    """Divide the epochs into stages: KL warm-up (a quarter of the VAE's, unless given), VAE, mixture.

    The mixture starts from a trained VAE, since from random weights all but one or two components die
    (docs/model.md). Dropout acts in the last stage: it raises the held-out bound, yet a VAE that had it from the start
    may have a latent space in which the mixture finds worse components (docs/clustering.md). A model that was trained
    before continues with the stage that it has reached.

    Raises
    ------
    ValueError
        If the warm-up is longer than the VAE is trained, or is given for a mixture that is trained further.
    """
    if resumes_mixture and n_warm_up_epochs:
        raise ValueError(
            "`n_warm_up_epochs` is of the VAE that a mixture starts from; found one that was trained before, and goes "
            "on. Leave it out."
        )
    if resumes_mixture:
        return [Stage("mixture", max_epochs, is_mixture=True, drops_out=True)]
    n_mixture = max(1, round(0.3 * max_epochs)) if mixture else 0
    n_vae = max_epochs - n_mixture
    n_warm_up = 0 if resumes_vae else round(0.25 * n_vae)
    if n_warm_up_epochs is not None:
        n_warm_up = n_warm_up_epochs
        if n_warm_up > n_vae:
            raise ValueError(
                f"`n_warm_up_epochs` must be at most the number of epochs of the VAE, {n_vae} of the {max_epochs} in "
                f"`max_epochs`{' before those of the mixture' if mixture else ''}; found {n_warm_up}. Pass fewer, or "
                "more `max_epochs`."
            )
    stages = [Stage("warm-up", n_warm_up, warms_up=True), Stage("vae", n_vae - n_warm_up, drops_out=not mixture)]
    stages.append(Stage("mixture", n_mixture, is_mixture=True, drops_out=True))
    return [stage for stage in stages if stage.max_epochs > 0]
