"""scvi.autotune with `SCVAE`: the same grid on many machines goes through Ray Tune, and no scheduler of our own."""

from __future__ import annotations

import shutil
import tempfile

import numpy as np
import pytest

import scvae_tools as svt

N_EPOCHS = 4


@pytest.fixture(scope="module")
def ray():
    """Ray of two workers on this machine, that speaks to no other and leaves nothing behind."""
    ray = pytest.importorskip("ray")
    for package in ("hyperopt", "scib_metrics"):  # without which scvi.autotune does not start
        pytest.importorskip(package)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets have short names only
    options = {"include_dashboard": False, "log_to_driver": False, "_node_ip_address": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else its workers wait for whatever else the machine does
        patch.setenv("RAY_AIR_NEW_OUTPUT", "0")  # as run_autotune leaves it
        ray.init(num_cpus=2, num_gpus=0, _temp_dir=folder, **options)
        try:
            yield ray
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray and of jax, which scib-metrics loads
def test_ray_tune_finds_what_training_by_hand_finds(ray, tmp_path):
    from ray import tune
    from scvi.autotune import run_autotune

    adata = svt.datasets.simulate(120, 20, 2, n_batches=2, median_counts=200, separation=2, random_state=1)
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    sizes = {"n_hidden": 8, "n_latent": 2, "n_components": 2}
    training = {"max_epochs": N_EPOCHS, "batch_size": 32, "accelerator": "cpu", "devices": 1, "progress": False}
    choice = tune.grid_search(["poisson", "nb"])
    experiment = run_autotune(
        svt.SCVAE,
        adata,
        metrics="elbo_validation",
        mode="max",
        search_space={"model_params": {"likelihood": choice, **sizes}, "train_params": training},
        num_samples=1,
        scheduler="fifo",
        searcher="random",
        seed=0,
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
        ignore_reinit_error=True,
    )
    results = list(experiment.result_grid)
    assert [result.error for result in results] == [None, None]
    by_hand = {}
    for result in results:
        likelihood = result.config["model_params"]["likelihood"]
        model = svt.SCVAE(adata, likelihood=likelihood, **sizes)
        model.train(**training)
        expected = by_hand[likelihood] = model.history["elbo_validation"].to_numpy()
        # A report per epoch, of all stages; float32 sums of another process.
        np.testing.assert_allclose(result.metrics_dataframe["elbo_validation"], expected, rtol=1e-4)
    assert set(by_hand) == {"poisson", "nb"}
    best = experiment.result_grid.get_best_result("elbo_validation", "max")
    assert best.config["model_params"]["likelihood"] == max(by_hand, key=lambda name: by_hand[name][-1])
    assert not (tmp_path / "lightning_logs").exists()
