"""Labels of some cells: what they do to the bound, to training, and to names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from independent import array, seeded
from mixtures import KINDS, make_cells, make_mixture_vae
from scipy.special import log_softmax

import scvae_tools as svt
from scvae_tools._module.bounds import LABEL_WEIGHT

LABEL = torch.tensor([0, 2, -1, 1, -1, 0])


def cells():
    return make_cells(n_cells=len(LABEL))


@pytest.mark.parametrize("kind", KINDS)
def test_cells_without_a_label_have_the_bound_of_no_labels(kind):
    module = make_mixture_vae(kind)
    with seeded(1), torch.no_grad():
        expected = module.bound(*cells(), n_samples=3)
    with seeded(1), torch.no_grad():
        found = module.bound(*cells(), n_samples=3, label=LABEL)
    unknown = LABEL < 0
    for term in ("log_likelihood", "kl_z", "kl_y"):
        np.testing.assert_allclose(getattr(found, term)[unknown], getattr(expected, term)[unknown], rtol=1e-12)
        if kind == "gmvae" or term != "log_likelihood":  # q(z|x) of VaDE does not depend on y
            assert not np.allclose(getattr(found, term)[~unknown], getattr(expected, term)[~unknown])
    assert expected.cross_entropy is None
    assert torch.all(found.cross_entropy[unknown] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_costs_the_log_of_its_weight(kind):
    """KL(q(y|x) ‖ p(y)) of a certain y is −log π_y."""
    module = make_mixture_vae(kind)
    with torch.no_grad():
        found = module.bound(*cells(), label=LABEL)
    known = LABEL >= 0
    expected = -log_softmax(array(module.mixture.logits))[LABEL[known]]
    np.testing.assert_allclose(found.kl_y[known], expected, rtol=1e-12)


def test_the_bound_of_a_labelled_cell_is_that_of_its_component():
    """As for a posterior that is certain of the label by itself."""
    module, n = make_mixture_vae("gmvae"), len(LABEL)
    with torch.no_grad():
        posterior = module.posterior(module.encode(*cells()))
        kl = module.mixture.kl(posterior.mean, posterior.log_var)
        with seeded(1):
            found = module.bound(*cells(), n_samples=2, label=LABEL)
        with seeded(1):
            z = posterior.sample_each(2)
        x, size, covariates = cells()
        own = z[:, LABEL.clamp(min=0), torch.arange(n)]
        log_likelihood = module.log_likelihood(x, own, module.log_size(size), covariates).mean(0)
    known = LABEL >= 0
    np.testing.assert_allclose(found.log_likelihood[known], log_likelihood[known], rtol=1e-10)
    np.testing.assert_allclose(found.kl_z[known], kl[LABEL.clamp(min=0), torch.arange(n)][known], rtol=1e-10)
    np.testing.assert_allclose(
        found.cross_entropy[known], -posterior.log_q_y[torch.arange(n), LABEL.clamp(min=0)][known], rtol=1e-10
    )


def test_vade_takes_the_density_of_the_labelled_component():
    module = make_mixture_vae("vade")
    with torch.no_grad():
        posterior = module.posterior(module.encode(*cells()))
        with seeded(1):
            found = module.bound(*cells(), label=LABEL)
        with seeded(1):
            z = posterior.sample_each(1)[:, 0]
        log_each = module.mixture.log_prob_each(z)[0].T  # (n, k)
        each = log_each + module.mixture.log_weights()
    known = array(LABEL >= 0)
    expected = -log_softmax(array(each), axis=1)[np.arange(len(LABEL)), LABEL.clamp(min=0)]
    np.testing.assert_allclose(found.cross_entropy[known], expected[known], rtol=1e-10)
    entropy = 0.5 * (posterior.log_var[0] + 1 + np.log(2 * np.pi)).sum(1)
    density = log_each[torch.arange(len(LABEL)), LABEL.clamp(min=0)]
    np.testing.assert_allclose(found.kl_z[known], (-entropy - density)[known], rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_with_labels_is_finite_and_that_of_finite_differences(kind):
    module = make_mixture_vae(kind).train()

    def loss():
        with seeded(2):
            return module.bound(*cells(), is_averaged=True, label=LABEL).loss()

    loss().backward()
    for name, parameter in module.named_parameters():
        direction = torch.ones_like(parameter)
        with torch.no_grad():
            parameter.add_(1e-6)
            expected = float(loss())
            parameter.sub_(2e-6)
            expected = (expected - float(loss())) / 2e-6
            parameter.add_(1e-6)
        found = 0.0 if parameter.grad is None else float((parameter.grad * direction).sum())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_loss_adds_the_cross_entropy_and_can_leave_kl_of_y_out():
    module = make_mixture_vae("gmvae")
    with torch.no_grad():
        bound = module.bound(*cells(), label=LABEL)
    mean = {name: float(getattr(bound, name).mean()) for name in ("log_likelihood", "kl_z", "kl_y", "cross_entropy")}
    surprise = LABEL_WEIGHT * mean["cross_entropy"]
    expected = -mean["log_likelihood"] + 0.5 * (mean["kl_z"] + mean["kl_y"]) + surprise
    assert float(bound.loss(0.5)) == pytest.approx(expected)
    expected = -mean["log_likelihood"] + 0.5 * mean["kl_z"] + surprise
    assert float(bound.loss(0.5, y_term="none")) == pytest.approx(expected)


# -- the model ---------------------------------------------------------------------------------------------------------


def make_adata(*, hidden=0.8, without=()):
    """Simulated components, most cells without a label, some components without any."""
    adata = svt.datasets.simulate(600, 100, n_components=4, median_counts=800)
    names = np.array(["type " + str(name) for name in adata.obs["component"]])
    is_hidden = (np.random.default_rng(0).random(len(names)) < hidden) | np.isin(names, without)
    adata.obs["truth"] = names
    adata.obs["label"] = np.where(is_hidden, "?", names)
    return adata


def fit(adata, **options):
    setup = {"labels_key": "label", "unlabeled_category": "?"}
    train = {"max_epochs": 40, "progress": False, "return_model": True}
    return svt.tl.scvae(adata, **setup | train | options)


@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_cells_get_the_names_of_labels(mixture):
    adata = make_adata()
    model = fit(adata, mixture=mixture)
    assert model.components == [f"type {i}" for i in range(4)]
    assert (adata.obs["scvae"].astype(str) == adata.obs["truth"]).mean() > 0.95


def test_a_type_without_a_label_gets_a_component_of_its_own():
    adata = make_adata(without=["type 2"])
    model = fit(adata, n_components=4)
    assert model.components == ["type 0", "type 1", "type 3", "new 0"]
    truth = adata.obs["truth"].replace({"type 2": "new 0"})
    assert (adata.obs["scvae"].astype(str) == truth).mean() > 0.95


def test_components_with_names_are_ranked_and_joined():
    adata = make_adata(without=["type 2"])
    model = fit(adata, n_components=4)
    svt.tl.rank_components(adata, model)
    svt.tl.dendrogram(adata, model)
    names = {"type 0", "type 1", "type 3", "new 0"}
    assert set(adata.uns["rank_components"]["names"].dtype.names) == names
    assert set(adata.uns["dendrogram_scvae"]["categories_ordered"]) == names
    # The genes that were made to differ most are those that are ranked first.
    true = adata.varm["component_log_mean"]
    change = true[:, 0] - np.delete(true, 0, axis=1).mean(1)
    first = [int(adata.var_names.get_loc(name)) for name in adata.uns["rank_components"]["names"]["type 0"][:10]]
    assert change[first].mean() > np.quantile(change, 0.9)


def test_names_survive_saving(tmp_path):
    adata = make_adata()
    model = fit(adata, max_epochs=3)
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", model.adata)
    assert loaded.components == model.components
    np.testing.assert_array_equal(loaded.predict(), model.predict())


def test_labels_play_no_part_with_the_other_y_terms():
    adata = make_adata()
    for y_term in ("kl", "none"):
        assert fit(adata, y_term=y_term, n_components=3, max_epochs=2).components == ["0", "1", "2"]


def weights_of(model):
    return model.module.mixture.log_weights().exp().detach().numpy()


def shares_of_labels(adata, model):
    """Among the training cells that have a label: others are not looked at."""
    labels = adata.obs["label"].iloc[model.train_indices]
    return labels[labels != "?"].value_counts(normalize=True).sort_index().to_numpy()


@pytest.mark.parametrize("hidden", [0.2, 0.5])
def test_weights_from_labels_are_their_shares_in_the_training_cells(hidden):
    adata = make_adata(hidden=hidden)
    model = fit(adata, weights="labels", max_epochs=4)
    np.testing.assert_allclose(weights_of(model), shares_of_labels(adata, model), atol=1e-6)


def test_components_beyond_the_labels_keep_their_share():
    adata = make_adata(hidden=0.5, without=["type 3"])
    model = fit(adata, weights="labels", n_components=4, max_epochs=16, kl_weight_start=0)
    *of_labels, new = weights_of(model)
    assert 0.05 < new < 0.5
    np.testing.assert_allclose(of_labels, (1 - new) * shares_of_labels(adata, model), atol=1e-6)


def test_weights_from_labels_that_do_not_train_go_to_the_components_by_size():
    adata = make_adata(hidden=0.3)
    model = fit(adata, weights="labels", y_term="kl", max_epochs=10)
    assert model.n_components == 4
    np.testing.assert_allclose(np.sort(weights_of(model)), np.sort(shares_of_labels(adata, model)), atol=1e-6)
    with pytest.raises(ValueError, match=r"must be the number of labels for weights='labels'; found 6 for the 4"):
        fit(adata, weights="labels", y_term="kl", n_components=6)


def test_new_data_are_mapped_onto_the_labels_of_the_reference():
    model = fit(make_adata(), max_epochs=4)
    query = make_adata(hidden=0.5)
    mapped = svt.SCVAE.load_query_data(query.copy(), model)
    assert mapped.components == model.components
    query.obs["label"] = np.where(np.arange(query.n_obs) < 7, "type 9", query.obs["label"])
    with pytest.raises(ValueError, match=r"labels of the reference model.*found 'type 9' in 7 cells.*'\?'"):
        svt.SCVAE.load_query_data(query, model)
    del query.obs["label"]
    with pytest.raises(ValueError, match=r"found no such column. Give cells without one of them '\?'"):
        svt.SCVAE.load_query_data(query, model)


ERRORS = {
    "too few components": ({"n_components": 2}, r"one component for each label.*found 2 for the 4 labels 'type 0'"),
    "a range": ({"n_components": (2, 6)}, r"`n_components` must be a number of at least one component for each label"),
    "a category that is not there": ({"unlabeled_category": "none"}, r"`unlabeled_category` must be .*found 'none'"),
    "no labels at all": ({"labels_key": "empty"}, r"must hold a label for some cells; found '\?' in all 600"),
    "a category without a key": ({"labels_key": None}, r"`unlabeled_category` needs `labels_key`"),
    "cross-entropy without labels": (
        {"labels_key": None, "unlabeled_category": None, "y_term": "cross-entropy"},
        r"y_term='cross-entropy' needs labels; found none",
    ),
    "weights that do not add up": ({"n_components": 4, "weights": [0.5, 0.1, 0.1, 0.1]}, r"add up to 1; found 4"),
    "too few weights": ({"n_components": 4, "weights": [0.5, 0.5]}, r"`weights` must be .*4 positive.*found 2"),
    "an unknown y_term": ({"y_term": "entropy"}, r"`y_term` must be one of 'kl', 'none', 'cross-entropy'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_the_labels_is_refused(case):
    options, message = ERRORS[case]
    adata = make_adata()
    adata.obs["empty"] = "?"
    with pytest.raises(ValueError, match=message):
        fit(adata, **options)
    assert "scvae" not in adata.uns
