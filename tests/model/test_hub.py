"""Published models: `scvi.hub` opens the folder, and the card says what is in it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import scvae_tools as svt


def small(**options):
    adata = svt.datasets.simulate(80, 15, 2, separation=2.0, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, **{"n_components": 2, "n_latent": 2, "n_hidden": 4} | options)
    model.train(3, progress=False)
    return model


@pytest.fixture(scope="module")
def model():
    return small()


def publish(model, folder, **options):
    options = {"license_info": "cc-by-4.0", "title": "Lung", "tissues": ["lung", 'a "strange": one']} | options
    model.save_for_hub(folder, **options)
    return folder


def front_matter(folder):
    yaml = pytest.importorskip("yaml")
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_scvi_hub_opens_the_folder(model, tmp_path):
    pytest.importorskip("huggingface_hub")
    from scvi.hub import HubModel

    hub = HubModel(str(publish(model, tmp_path / "lung")))
    assert isinstance(hub.model, svt.SCVAE)
    assert hub.adata.n_obs == hub.model.adata.n_obs == 80
    np.testing.assert_allclose(hub.model.get_latent_representation(), model.get_latent_representation(), rtol=1e-5)
    assert hub.metadata.model_cls_name == "SCVAE"
    assert hub.model_card.data.license == "cc-by-4.0"
    assert "tissue:lung" in hub.model_card.data.tags
    hub.save(overwrite=True)  # the hub writes its own files over ours
    assert isinstance(HubModel(str(tmp_path / "lung")).model, svt.SCVAE)


def test_scvi_hub_opens_minified_models_and_those_without_data(tmp_path):
    pytest.importorskip("huggingface_hub")
    from scvi.hub import HubModel

    model = small()
    cells = model.adata.copy()
    bare = HubModel(str(publish(model, tmp_path / "bare", save_anndata=False)))
    bare.load_model(adata=cells)
    np.testing.assert_allclose(bare.model.get_latent_representation(), model.get_latent_representation(), rtol=1e-5)
    model.minify_adata()
    hub = HubModel(str(publish(model, tmp_path / "minified")))
    assert hub.model.minified_data_type == "latent_posterior_parameters"
    assert hub.model.adata.X.nnz == 0
    assert "minified" in (tmp_path / "minified" / "README.md").read_text(encoding="utf-8")


def test_the_metadata_are_those_that_the_hub_needs(model, tmp_path):
    folder = publish(model, tmp_path / "lung", training_data_url="https://example.org/lung.h5ad")
    metadata = json.loads((folder / "_scvi_required_metadata.json").read_text())
    assert metadata.pop("anndata_version").count(".") >= 2
    assert metadata == {
        "scvi_version": model.registry["scvi_version"],
        "model_cls_name": "SCVAE",
        "training_data_url": "https://example.org/lung.h5ad",
        "model_parent_module": "scvae_tools",
    }
    assert {each.name for each in folder.iterdir()} == {
        "model.pt",
        "adata.h5ad",
        "README.md",
        "_scvi_required_metadata.json",
    }


def test_the_card_says_what_the_model_is(model, tmp_path):
    header, text = front_matter(publish(model, tmp_path / "lung", description="Cells of **lungs**."))
    assert header["license"] == "cc-by-4.0"
    assert header["library_name"] == "scvi-tools"
    assert {"model_cls_name:SCVAE", "tissue:lung", 'tissue:a "strange": one'} <= set(header["tags"])
    assert "# Lung\n\nCells of **lungs**." in text
    for fact in ("| cells | 80 |", "| genes | 15 |", "| likelihood | nb |", "| components | 0, 1 |"):
        assert fact in text
    arguments = text.split("## Arguments of the model")[1].split("```json\n")[1].split("```")[0]
    assert json.loads(arguments)["n_latent"] == 2


def test_the_code_of_the_card_runs(model, tmp_path):
    _, text = front_matter(publish(model, tmp_path / "lung", save_anndata=False))
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "lung"))
    adata = svt.datasets.simulate(30, 15, 2, separation=2.0, random_state=0)
    exec(compile(code, "README.md", "exec"), {"adata": adata})
    assert adata.obs["scvae_fit"].between(0, 1).all()


@pytest.mark.parametrize("mixture", [False, "vade"])
def test_every_kind_of_model_can_be_published(mixture, tmp_path):
    publish(small(mixture=mixture, n_components=2 if mixture else None), tmp_path / "model")
    assert svt.SCVAE.load(tmp_path / "model").is_trained_


def test_what_cannot_be_published_is_refused_before_anything_is_written(model, tmp_path):
    untrained = svt.SCVAE(small().adata, n_components=2)
    with pytest.raises(ValueError, match=r"not trained\. Call train\(\)"):
        publish(untrained, tmp_path / "untrained")
    model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"loaded without. Load it with its data.*save_anndata=False"):
        publish(svt.SCVAE.load(tmp_path / "saved"), tmp_path / "bare")
    with pytest.raises(ValueError, match="exists already"):
        publish(model, tmp_path / "saved")
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]
    assert [each.name for each in (tmp_path / "saved").iterdir()] == ["model.pt"]
