"""Keys of the results of `scvae_tools.tl.scvae` and `ppc` in an AnnData, and keys of minified AnnData objects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Keys of the results of `scvae_tools.tl.scvae` in an AnnData, made from ``key_added``."""

    key_added: str = "scvae"

    @property
    def latent(self) -> str:
        """``obsm``: posterior mean of z."""
        return f"X_{self.key_added}"

    @property
    def component(self) -> str:
        """``obs``: most probable component."""
        return self.key_added

    @property
    def probabilities(self) -> str:
        """``obsm``: q(y|x)."""
        return f"{self.key_added}_probs"

    @property
    def fit(self) -> str:
        """``obs``: how well the cell fits the model, a p-value."""
        return f"{self.key_added}_fit"

    @property
    def rate(self) -> str:
        """``layers``: λ."""
        return f"{self.key_added}_lambda"

    @property
    def loadings(self) -> str:
        """``varm``: derivatives of log λ by z, of a linear decoder."""
        return f"{self.key_added}_loadings"

    @property
    def uns(self) -> str:
        """``uns``: parameters, history, ELBO, version."""
        return self.key_added

    @property
    def ppc(self) -> str:
        """``uns``: result of `scvae_tools.tl.ppc`."""
        return f"{self.key_added}_ppc"

    @property
    def by_model(self) -> dict[str, tuple[str, ...]]:
        """Keys by slot of the results that not every model has, or that another tool adds later."""
        return {
            "obs": (self.component, self.fit),
            "obsm": (self.probabilities,),
            "layers": (self.rate,),
            "varm": (self.loadings,),
            "uns": (self.ppc,),
        }


#: Keys in minified AnnData objects, which hold the posterior in place of the counts.
LATENT_MEAN = "scvae_latent_qzm"
LATENT_VARIANCE = "scvae_latent_qzv"
LATENT_PROBABILITIES = "scvae_latent_probs"
