"""Publishing of a model: the folder that `scvi.hub.HubModel` opens, with its metadata and model card."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._files import replacing, to_plain
from scvae_tools._version import __version__
from scvae_tools.model._persistence import PersistenceMixin
from scvae_tools.model._saved_file import ADATA_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Names of the files that `scvi.hub` reads beside the model and its data.
METADATA_FILE, CARD_FILE = "_scvi_required_metadata.json", "README.md"
#: Module from which `scvi.hub` takes the class of the model.
PARENT_MODULE = "scvae_tools"

CARD = """\
---
license: {license}
library_name: scvi-tools
tags:
{tags}
---

# {title}

{description}

A model of scvae-tools, a variational auto-encoder of single-cell counts{kind}. Latent codes, clusters and how well each
cell fits the model, for new cells with raw counts:

```python
import scvae_tools as svt

model = svt.SCVAE.load("FOLDER")  # where this file is; runs no code that is in it
svt.tl.predict(adata, model, fill_missing=True)
adata.obs["scvae_fit"]  # small: of none of the types that the model knows
```

`scvi.hub.HubModel("FOLDER").model` opens it too, where scvae-tools is installed.

| | |
|---|---|
{facts}

## Arguments of the model

```json
{model_arguments}
```

## Arguments of `setup_anndata`

```json
{setup_arguments}
```

## Training data and code

- Data: {data}
- Code: {code}

## References

{references}
"""


class HubMixin(PersistenceMixin):
    """Publishing of `SCVAE`."""

    @checked()
    def save_for_hub(
        self,
        dir_path: str | Path,
        *,
        license_info: str,
        title: str = "SCVAE model",
        description: str = "",
        tissues: Sequence[str] = (),
        references: str = "",
        training_data_url: str | None = None,
        training_code_url: str | None = None,
        save_anndata: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Save the model as a folder that can be published, such as on the scvi hub, with metadata and a model card.

        Parameters
        ----------
        dir_path
            Directory, made if need be. It gets ``model.pt``, ``adata.h5ad``, ``_scvi_required_metadata.json`` and the
            card, ``README.md``.
        license_info
            Licence of model and data by its name on the hub, such as ``"cc-by-4.0"``.
        title, description
            Of the card; the description in Markdown.
        tissues
            Tissues of the training data, which become tags.
        references
            What to cite beside scVAE, in Markdown.
        training_data_url, training_code_url
            Where the training data, and the code, can be found.
        save_anndata
            Whether to publish the data of the model too: the counts, or after `minify_adata` what is left without
            them, and all columns of ``obs``. Without data, `load` works as ever, and `scvi.hub.HubModel` needs some for
            its ``load_model``.
        overwrite
            Whether the directory may exist; as in `save`.

        Raises
        ------
        ValueError
            If the model is not trained, has no data to publish, or the directory exists.

        Notes
        -----
        The ``from_dir`` methods of `scvi.hub.HubMetadata` and `scvi.hub.HubModelCardHelper` read only files that may
        run code, and the latter only models of scvi-tools; this method stands for both.

        Examples
        --------
        >>> model.save_for_hub("atlas", license_info="cc-by-4.0", tissues=["lung"])
        >>> scvi.hub.HubModel("atlas").model.predict(soft=True)
        """
        if not self.is_trained_:
            raise ValueError("`save_for_hub` publishes a trained model; found one that is not trained. Call train().")
        if save_anndata and self.adata is None:
            raise ValueError(
                "`save_for_hub` publishes the data of the model; this one was loaded without. Load it with its data, "
                "SCVAE.load(folder, adata), or pass save_anndata=False."
            )
        metadata = {
            "scvi_version": self.registry["scvi_version"],
            "anndata_version": version("anndata"),
            "model_cls_name": type(self).__name__,
            "training_data_url": training_data_url,
            "model_parent_module": PARENT_MODULE,
        }
        card = CARD.format(
            license=json.dumps(license_info),
            tags="\n".join(f"- {json.dumps(tag)}" for tag in self._tags(metadata, tissues)),
            title=title,
            description=description,
            kind=f" with a mixture of {self.n_components} Gaussians, its clusters" if self.is_mixture else "",
            facts="\n".join(f"| {name} | {value} |" for name, value in self._facts().items()),
            model_arguments=_as_json(self.init_params_["non_kwargs"]),
            setup_arguments=_as_json(self.registry["setup_args"]),
            data=", ".join(filter(None, (training_data_url, self._published(save_anndata)))),
            code=training_code_url or "not published",
            references="- Grønbech et al. 2020, doi:10.1093/bioinformatics/btaa293\n" + references,
        )
        self.save(dir_path, overwrite=overwrite, save_anndata=save_anndata)
        for name, text in ((METADATA_FILE, json.dumps(metadata, indent=4)), (CARD_FILE, card)):
            with replacing(Path(dir_path) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _tags(self, metadata: dict[str, Any], tissues: Sequence[str]) -> list[str]:
        """Tags of the card, those of scvi-tools' own models among them."""
        versions = [f"{name}:{metadata[name]}" for name in ("model_cls_name", "scvi_version", "anndata_version")]
        return [
            "biology",
            "genomics",
            "single-cell",
            *versions,
            "modality:rna",
            *(f"tissue:{each}" for each in tissues),
        ]

    def _published(self, save_anndata: bool) -> str:  # noqa: FBT001
        """What of the data is in the folder."""
        if not save_anndata:
            return "not in this folder"
        without = " (minified: the posterior in place of the counts)" if self.minified_data_type is not None else ""
        return f"`{ADATA_FILE}` in this folder{without}"

    def _facts(self) -> dict[str, str]:
        """What a reader of the card wants to know of the model, by name."""
        stats, arguments = self.summary_stats, self.init_params_["non_kwargs"]
        versions = self.versions["elbo_validation"]
        elbo = versions.get(self.version, np.nan)
        facts = {
            "cells": f"{stats.n_cells:,}",
            "genes": f"{stats.n_vars:,}",
            "batches": f"{stats.n_batch:,}",
            "likelihood": arguments["likelihood"],
            "latent dimensions": f"{arguments['n_latent']}",
            "components": ", ".join(self.components) if self.is_mixture else "none: one Gaussian prior",
            "ELBO of held-out cells, nats per cell": f"{elbo:.1f}" if np.isfinite(elbo) else "not known",
            "cells that others are compared with (`get_fit`)": f"{self.n_fit_cells():,}",
            "scvae-tools": __version__,
        }
        return {name: value.replace("|", "\\|") for name, value in facts.items()}


def _as_json(value: Any) -> str:
    return json.dumps(to_plain(value, "arguments"), indent=4)
