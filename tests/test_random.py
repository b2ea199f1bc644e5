"""Randomness as an argument."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

import scvae_tools as svt
from scvae_tools._random import RandomStream, isolated_random_state, seeded


def draw():
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


def test_random_states_are_seeded_inside_and_restored_outside():
    with isolated_random_state(11):
        first = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    with isolated_random_state(11):
        assert draw() == first
    assert draw() == expected
    with pytest.raises(KeyError), isolated_random_state(11):
        raise KeyError
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    assert draw() == expected


def test_a_seeded_call_inside_another_goes_on_with_its_stream():
    with seeded(5):
        expected = draw(), draw()
    with seeded(5):
        first = draw()
        with seeded(5):
            second = draw()
    assert (first, second) == expected
    assert first != second


def test_a_stream_goes_on_where_it_was_and_is_hidden_in_between():
    def drawn(stream):
        with stream.on():
            return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    with seeded(3):
        expected = [(random.random(), float(np.random.random()), float(torch.rand(()))) for _ in range(3)]  # noqa: NPY002
    stream, other = RandomStream(3), RandomStream(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    found = [drawn(stream), drawn(stream)]
    assert drawn(other) == expected[0]
    found.append(drawn(stream))
    assert found == expected
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_a_stream_inside_a_seeded_call_is_that_of_the_call():
    with seeded(5):
        expected = [random.random() for _ in range(2)]
    with seeded(5):
        found = []
        for _ in range(2):
            with RandomStream(99).on():
                found.append(random.random())
    assert found == expected


@pytest.mark.parametrize("seed", [1.5, "0", None, True, np.float32(0.5), np.True_])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="`random_state` must be a whole number"), isolated_random_state(seed):
        pass


def at_once(function):
    """What a function returns in each of two threads that call it at the same time."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(function())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_with_the_same_seed_draw_the_same_one_after_the_other():
    def drawn():
        with seeded(7):
            first = draw()
            time.sleep(0.2)
            return first, draw()

    with seeded(7):
        expected = draw(), draw()
    before = random.getstate(), torch.get_rng_state()
    assert at_once(drawn) == [expected, expected]
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())


def test_trainings_in_two_threads_are_the_same_as_alone():
    def trained():
        adata = svt.datasets.simulate(80, 20, 2)
        model = svt.tl.scvae(adata, n_components=2, max_epochs=3, return_model=True, progress=False)
        return model.history["elbo_train"].tolist()

    alone = trained()
    assert at_once(trained) == [alone, alone]


# -- the default type of torch -----------------------------------------------------------------------------------------


@pytest.fixture
def double():
    """Session in which torch's default type is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_type_is_float32_inside_and_comes_out_as_it_was(double):
    with seeded(0):
        assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_dtype() == torch.float64
    stream = RandomStream(0)
    with stream.on():
        assert torch.zeros(1).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float64


def all_results(**options):
    """Whatever a model computes, as arrays."""
    adata = svt.datasets.simulate(60, 20, 2, n_batches=2, random_state=0)
    adata.obs["age"] = np.linspace(0, 1, 60)
    small = {"n_hidden": 4, "n_latent": 2, "max_epochs": 3, "n_components": 2, "progress": False, "return_model": True}
    model = svt.tl.scvae(adata, batch_key="batch", continuous_covariate_keys=["age"], **small, **options)
    svt.tl.rank_components(adata, model, n_samples=20)
    svt.tl.ppc(adata, model, n_samples=2)
    new = model.sample(20)
    halves = {"idx1": np.arange(30), "idx2": np.arange(30, 60)}
    return {
        "counts": adata.X.toarray(),
        "written": adata.obsm["X_scvae"],
        "lambda": adata.layers["scvae_lambda"],
        **model.get_prior(),
        "ranks": adata.uns["rank_components"]["scores"][model.components[0]],
        "check": adata.uns["scvae_ppc"]["genes"].to_numpy(),
        "bound": model.get_elbo_terms(n_samples=2).to_numpy(),
        "tight": model.get_marginal_ll(n_mc_samples=5, return_mean=False),
        "kl": model.get_kl_by_dimension(),
        "probabilities": model.predict(soft=True).to_numpy(),
        **model.get_likelihood_parameters(n_samples=2),
        "expression": model.get_normalized_expression(n_samples=2).to_numpy(),
        "predictive": model.posterior_predictive_sample(n_samples=2).todense(),
        "new counts": new.X.toarray(),
        "new codes": new.obsm["X_latent"],
        "correlations": model.get_feature_correlation_matrix().to_numpy(),
        "genes": model.differential_expression(**halves).select_dtypes("number").to_numpy(),
        "decoded": np.concatenate([part.px.mu.numpy() for part in model.iter_decoded()]),
    }


@pytest.mark.parametrize("options", [{}, {"mixture": "vade", "likelihood": "zinb", "labels_key": "component"}], ids=str)
def test_all_results_are_those_of_float32_whatever_the_default_type(options, request):
    expected = all_results(**options)
    request.getfixturevalue("double")
    found = all_results(**options)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert torch.get_default_dtype() == torch.float64
