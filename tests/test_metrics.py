"""Metrics against plain definitions, recorded values, closed forms and invariances."""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fresh_process import ended, start_fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from diffusers_ext import metrics
from diffusers_ext.metrics import search

GOLDENS = Path(__file__).parent / "goldens"
SAMPLE_METRICS = ["average_knn_distance", "rarity_score", "precision_recall", "local_outlier_factor"]


def blobs(n, d, seed, scale=1.0):
    """Uneven random points: spread that differs between dimensions and between points."""
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, d)) * np.geomspace(1, 0.1, d) * rng.uniform(0.2, 2, (n, 1))


def pairwise(a, b):
    return np.sqrt(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(axis=-1))


def sphere_radii(points, k):
    return np.sort(pairwise(points, points), axis=1)[:, k]  # column 0 is the point itself


def plain_rarity(features, reference, k):
    radii = sphere_radii(reference, k)
    return np.array([min(radii[row <= radii], default=np.nan) for row in pairwise(features, reference)])


def plain_precision(features, reference, k):
    return (pairwise(features, reference) <= sphere_radii(reference, k)).any(axis=1).mean()


def plain_lof(features, reference, k):
    within = pairwise(reference, reference)
    np.fill_diagonal(within, np.inf)
    nearest = np.argsort(within, axis=1)[:, :k]
    radii = np.take_along_axis(within, nearest, axis=1)[:, -1]
    density = 1 / np.maximum(radii[nearest], np.take_along_axis(within, nearest, axis=1)).mean(axis=1)
    across = pairwise(features, reference)
    nearest = np.argsort(across, axis=1)[:, :k]
    own = 1 / np.maximum(radii[nearest], np.take_along_axis(across, nearest, axis=1)).mean(axis=1)
    return (density[nearest].mean(axis=1) / own).mean()


def without(*modules):
    """Make `import module` fail, as if it were not installed."""
    return mock.patch.dict(sys.modules, dict.fromkeys(modules))


@pytest.fixture(params=["faiss", "torch"])
def backend(request, monkeypatch):
    """Search with faiss, in the way that it takes large sets, or without it."""
    if request.param == "faiss":
        faiss = pytest.importorskip("faiss")
        monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)
        yield
    else:
        with without("faiss"):
            yield


@pytest.fixture(params=["one block", "small blocks"])
def blocks(request, monkeypatch):
    """Everything in one block, or in many ragged ones."""
    if request.param == "small blocks":
        monkeypatch.setattr(search, "ROWS", 7)
        monkeypatch.setattr(search, "COLUMNS", 11)


# Nearest neighbours and what is made of them: equal to brute force


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 4, 60])
def test_nearest_neighbours_are_those_of_brute_force(backend, blocks, dtype, k):
    queries, reference = blobs(50, 6, 0).astype(dtype), blobs(60, 6, 1).astype(dtype)
    distances, indices = metrics.nearest_neighbours(queries, reference, k)
    expected = pairwise(queries, reference)
    assert distances.shape == indices.shape == (50, k)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :k], rtol=1e-13)
    np.testing.assert_array_equal(indices, np.argsort(expected, axis=1)[:, :k])


def test_exclude_self_leaves_out_the_point_but_not_its_copies(backend, blocks):
    points = blobs(40, 5, 2)
    points[7] = points[3]
    expected = pairwise(points, points)
    np.fill_diagonal(expected, np.inf)
    distances, indices = metrics.nearest_neighbours(points, points, 3, exclude_self=True)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :3], rtol=1e-13)
    assert indices[7, 0] == 3 and indices[3, 0] == 7 and distances[7, 0] == distances[3, 0] == 0
    assert not (indices == np.arange(40)[:, None]).any()


def test_a_point_is_at_distance_zero_of_itself_far_from_the_origin(backend):
    points = (blobs(200, 8, 3) + 1e4).astype(np.float32)
    distances, indices = metrics.nearest_neighbours(points, points, 2)
    assert (distances[:, 0] == 0).all()
    np.testing.assert_array_equal(indices[:, 0], np.arange(200))
    np.testing.assert_allclose(distances[:, 1], sphere_radii(points, 1), rtol=1e-12)


@pytest.mark.parametrize(("spread", "apart"), [(1.0, 1e5), (1.0, 1e9), (1e17, 1e20)])
def test_far_clusters_are_told_apart(backend, spread, apart):
    """Squared distances of about 1 beside |x|^2 of 1e10 or 1e18: products cannot tell them in float32, or float64."""
    offsets = apart * np.repeat(np.eye(3), 40, axis=0)
    points, others = blobs(120, 3, 4, spread) + offsets, blobs(120, 3, 9, spread) + offsets
    expected = pairwise(points, points)
    np.fill_diagonal(expected, np.inf)
    distances, indices = metrics.nearest_neighbours(points, points, 3, exclude_self=True)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :3], rtol=1e-12)
    np.testing.assert_array_equal(indices, np.argsort(expected, axis=1)[:, :3])
    scores = metrics.rarity_score(others, points, 3).scores
    np.testing.assert_allclose(scores, plain_rarity(others, points, 3), rtol=1e-12)
    assert 0 < np.isnan(scores).sum() < 60


def test_ordinary_features_need_no_second_look(monkeypatch):
    """The float32 proposals of faiss suffice, so its speed is what the user gets."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(search.ProductSearch, "__call__", mock.Mock(side_effect=AssertionError("second look")))
    metrics.nearest_neighbours(blobs(300, 64, 5), blobs(500, 64, 6), 5)


def test_ties_need_no_plain_differences(backend, monkeypatch):
    monkeypatch.setattr(search.DifferenceSearch, "squared", mock.Mock(side_effect=AssertionError("third look")))
    points = np.random.default_rng(22).integers(0, 2, (300, 8)) / 3
    distances, _ = metrics.nearest_neighbours(points, points, 4, exclude_self=True)
    np.testing.assert_allclose(distances, np.sort(pairwise(points, points), axis=1)[:, 1:5], rtol=1e-10)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_extreme_scales_neither_overflow_nor_vanish(backend, magnitude):
    queries, reference = blobs(30, 4, 7, magnitude), blobs(40, 4, 8, magnitude)
    distances, _ = metrics.nearest_neighbours(queries, reference, 2)
    np.testing.assert_allclose(distances, np.sort(pairwise(queries, reference), axis=1)[:, :2], rtol=1e-12)
    scores = metrics.rarity_score(queries, reference, 2).scores
    np.testing.assert_allclose(scores, plain_rarity(queries, reference, 2), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 60])
def test_average_knn_distance_is_its_definition(backend, blocks, k):
    features, reference = blobs(50, 6, 10), blobs(60, 6, 11)
    expected = np.sort(pairwise(features, reference), axis=1)[:, :k].mean()
    assert metrics.average_knn_distance(features, reference, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 59])
def test_rarity_score_is_its_definition(backend, blocks, k):
    features, reference = blobs(50, 3, 12), blobs(60, 3, 13)
    expected = plain_rarity(features, reference, k)
    result = metrics.rarity_score(features, reference, k)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-12)
    assert result.mean == pytest.approx(np.nanmean(expected), rel=1e-12)
    assert result.inside == pytest.approx(np.isfinite(expected).mean())


@pytest.mark.parametrize("k", [1, 3, 49])
def test_precision_and_recall_are_their_definitions(backend, blocks, k):
    features, reference = blobs(50, 3, 14), blobs(60, 3, 15) + 0.3
    precision, recall = metrics.precision_recall(features, reference, k)
    assert precision == pytest.approx(plain_precision(features, reference, k))
    assert recall == pytest.approx(plain_precision(reference, features, k))


def test_spheres_are_closed(backend):
    """Whole numbers: many distances equal a radius, exactly."""
    rng = np.random.default_rng(16)
    features, reference = rng.integers(0, 6, (60, 3)), rng.integers(0, 6, (50, 3))
    np.testing.assert_array_equal(
        metrics.rarity_score(features, reference, 2).scores, plain_rarity(features, reference, 2)
    )
    assert metrics.precision_recall(features, reference, 2).recall == plain_precision(reference, features, 2)


def test_rarity_score_on_a_line():
    reference = np.array([[0.0], [1.0], [3.0], [10.0]])  # radii for k=1: 1, 1, 2, 7
    features = np.array([[0.5], [-1.0], [4.0], [8.0], [20.0]])
    mean, inside, scores = metrics.rarity_score(features, reference, k=1)
    np.testing.assert_array_equal(scores, [1, 1, 2, 7, np.nan])
    assert (mean, inside) == (2.75, 0.8)
    assert metrics.precision_recall(features, reference, k=1).precision == 0.8


def test_rarity_score_of_samples_that_are_all_outside():
    mean, inside, scores = metrics.rarity_score(blobs(9, 2, 17) + 100, blobs(20, 2, 18))
    assert np.isnan(mean) and inside == 0 and np.isnan(scores).all()


def test_average_knn_distance_on_a_line():
    assert metrics.average_knn_distance(np.array([[1.0], [4.0]]), np.array([[0.0], [2.0], [5.0]]), k=2) == 1.25


def test_precision_recall_of_equal_disjoint_and_collapsed_sets(backend):
    reference = blobs(60, 5, 19)
    assert metrics.precision_recall(reference, reference) == (1, 1)
    assert metrics.precision_recall(reference[::-1], reference.astype(np.float64)) == (1, 1)
    assert metrics.precision_recall(reference + 1e6, reference) == (0, 0)
    assert metrics.precision_recall(np.repeat(reference[:1], 60, axis=0), reference) == (1, pytest.approx(1 / 60))


def test_no_block_of_distances_exceeds_its_limits(backend, monkeypatch):
    shapes = []
    products, distance = search.products, search.distance
    monkeypatch.setattr(search, "ROWS", 16)
    monkeypatch.setattr(search, "COLUMNS", 32)
    monkeypatch.setattr(search, "BLOCK", 2048)
    monkeypatch.setattr(search, "products", lambda x, y, b: shapes.append(len(x) * len(y)) or products(x, y, b))
    monkeypatch.setattr(search, "distance", lambda x, y: shapes.append((x - y).size / 4) or distance(x, y))
    metrics.precision_recall(blobs(150, 4, 20), blobs(150, 4, 21))
    assert shapes and max(shapes) <= 16 * 32


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_whole_numbers_any_search(data):
    """Ties and copies everywhere; whole numbers make every distance exact."""
    d = data.draw(st.integers(1, 3))
    points = st.lists(st.lists(st.integers(-4, 4), min_size=d, max_size=d), min_size=2, max_size=12).map(np.array)
    queries, reference = data.draw(points), data.draw(points)
    k = data.draw(st.integers(1, len(reference) - 1))
    for hidden in ([], ["faiss"]):
        with without(*hidden):
            distances, indices = metrics.nearest_neighbours(queries, reference, k)
            scores = metrics.rarity_score(queries, reference, k).scores
        np.testing.assert_array_equal(distances, np.sort(pairwise(queries, reference), axis=1)[:, :k])
        np.testing.assert_array_equal(np.take_along_axis(pairwise(queries, reference), indices, axis=1), distances)
        np.testing.assert_array_equal(scores, plain_rarity(queries, reference, k))


# Local outlier factor


@pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 50, 2, 1), (40, 50, 4, 7), (30, 60, 20, 20), (30, 21, 3, 20)])
def test_local_outlier_factor_is_its_definition(n, m, d, k):
    features, reference = blobs(n, d, 30), blobs(m, d, 31)
    expected = plain_lof(features, reference, k)
    assert metrics.local_outlier_factor(features, reference, k) == pytest.approx(expected, rel=1e-7)


def test_local_outlier_factor_scores_in_chunks(monkeypatch):
    features, reference = blobs(40, 3, 32), blobs(50, 3, 33)
    whole = metrics.local_outlier_factor(features, reference, 5)
    monkeypatch.setattr("diffusers_ext.metrics.lof.ROWS", 7)
    assert metrics.local_outlier_factor(features, reference, 5) == pytest.approx(whole, rel=1e-12)


def test_local_outlier_factor_ranks_typical_below_outlying():
    reference = blobs(100, 3, 34)
    typical = metrics.local_outlier_factor(blobs(50, 3, 35), reference)
    assert typical < 2 < metrics.local_outlier_factor(blobs(50, 3, 35) + 20, reference)


def test_local_outlier_factor_says_how_to_get_scikit_learn():
    with (
        without("sklearn.neighbors", "sklearn"),
        pytest.raises(ImportError, match="pip install scikit-learn"),
    ):
        metrics.local_outlier_factor(blobs(5, 2, 0), blobs(9, 2, 1), 2)


def test_the_module_needs_no_optional_library(tmp_path):
    code = (
        "from hidden_package import forget; forget('faiss', 'sklearn', 'scipy'); import diffusers_ext.metrics as m; "
    )
    code += "import numpy as np; x = np.eye(4); m.precision_recall(x, x, 2); s = m.feature_statistics(x); "
    code += "m.frechet_distance(s.mean, s.covariance, s.mean, s.covariance)"
    ended(start_fresh(code, said=tmp_path / "said"), tmp_path / "said")


# All metrics on samples: what must not matter


def value(name, features, reference):
    result = getattr(metrics, name)(features, reference, k=3)
    return result[:2] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", SAMPLE_METRICS)
def test_order_and_position_do_not_matter(name):
    features, reference = blobs(40, 3, 40), blobs(50, 3, 41)
    expected = value(name, features, reference)
    rng = np.random.default_rng(42)
    assert value(name, rng.permutation(features), rng.permutation(reference)) == pytest.approx(expected, rel=1e-9)
    assert value(name, features + 1e6, reference + 1e6) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", SAMPLE_METRICS)
def test_numpy_and_torch_of_any_dtype_agree(name):
    features, reference = blobs(40, 4, 43).astype(np.float16), blobs(50, 4, 44).astype(np.float16)
    expected = value(name, features.astype(np.float64), reference.astype(np.float64))
    for dtype in (np.float16, np.float32, np.longdouble):
        assert value(name, features.astype(dtype), reference) == pytest.approx(expected, rel=1e-6)
    for dtype in (torch.float16, torch.float32, torch.float64):
        tensor = torch.from_numpy(features).to(dtype).requires_grad_()
        assert value(name, tensor, reference) == pytest.approx(expected, rel=1e-6)
    assert value(name, np.asfortranarray(features), torch.from_numpy(reference).T.contiguous().T) == pytest.approx(
        expected, rel=1e-6
    )
    assert all(type(number) is float for number in np.atleast_1d(np.array(expected, dtype=object)))


def test_bfloat16_and_large_whole_numbers_are_taken():
    features = torch.arange(12).reshape(6, 2)
    expected = metrics.average_knn_distance(features.double(), features.double(), 2)
    assert metrics.average_knn_distance(features.bfloat16(), features, 2) == pytest.approx(expected)
    shifted = features + 2**40
    assert metrics.average_knn_distance(shifted, shifted.numpy(), 2) == pytest.approx(expected)


# Fréchet distance and its statistics


def golden(case):
    return load_file(GOLDENS / f"fid_{case}.safetensors"), json.loads((GOLDENS / f"fid_{case}.json").read_text())


CASES = ["float64", "fullrank", "singular"]


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_equals_the_recorded(case):
    tensors, recorded = golden(case)
    distance = metrics.frechet_distance(*(tensors[name] for name in ("mu_gen", "sigma_gen", "mu_ref", "sigma_ref")))
    tolerance = {"rel": recorded["tolerance"]["rtol"], "abs": recorded["tolerance"]["atol"]}
    assert type(distance) is float
    assert distance == pytest.approx(recorded["fid"], **tolerance)
    assert distance == pytest.approx(recorded["fid_eigh"], rel=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_feature_statistics_equal_the_recorded(case):
    tensors, recorded = golden(case)
    generated, real = (metrics.feature_statistics(tensors[f"{name}_features"]) for name in ("gen", "ref"))
    np.testing.assert_allclose(generated.mean, tensors["mu_gen"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(generated.covariance, tensors["sigma_gen"], rtol=1e-9, atol=1e-12)
    distance = metrics.frechet_distance(generated.mean, generated.covariance, real.mean, real.covariance)
    assert distance == pytest.approx(recorded["fid_if_features_float64"], rel=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_keeps_all_digits(case):
    """tr((S1 S2)^(1/2)) is the nuclear norm of the product of the centred features: no covariance, no square root."""
    tensors, _ = golden(case)
    sets = [tensors[f"{name}_features"].astype(np.float64) for name in ("gen", "ref")]
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in sets)
    means = np.square(sets[0].mean(axis=0) - sets[1].mean(axis=0)).sum()
    expected = means + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    s, r = (metrics.feature_statistics(x) for x in sets)
    assert metrics.frechet_distance(s.mean, s.covariance, r.mean, r.covariance) == pytest.approx(expected, rel=1e-12)
    assert 0 <= metrics.frechet_distance(s.mean, s.covariance, s.mean, s.covariance) < 1e-11


def test_frechet_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(50)
    mu1, mu2, std1, std2 = rng.uniform(0, 2, (4, 7))
    std1[0] = std2[1] = std1[2] = std2[2] = 0
    expected = np.square(mu1 - mu2).sum() + np.square(std1 - std2).sum()
    assert metrics.frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)
    q = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    rotated = (q @ mu1, q @ np.diag(std1**2) @ q.T, q @ mu2, q @ np.diag(std2**2) @ q.T)
    assert metrics.frechet_distance(*rotated) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_matrices_that_do_not_commute():
    """In two dimensions tr((S1 S2)^(1/2)) = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2))."""
    s1, s2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.5], [-1.5, 1.0]])
    fidelity = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    expected = np.trace(s1 + s2) - 2 * fidelity
    assert metrics.frechet_distance([0, 0], s1, [0, 0], s2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_takes_float32_tensors_and_constant_features():
    x, y = blobs(50, 6, 51), blobs(50, 6, 52)
    arguments = (x.mean(axis=0), np.cov(x, rowvar=False), y.mean(axis=0), np.cov(y, rowvar=False))
    expected = metrics.frechet_distance(*arguments)
    tensors = [torch.tensor(a, dtype=torch.float32) for a in arguments]
    assert metrics.frechet_distance(*tensors) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance([1.0, 2.0], np.zeros((2, 2)), [1.0, 0.0], np.zeros((2, 2))) == 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(1, 9))
def test_frechet_distance_is_a_distance(seed, n, d):
    """Any rank: symmetric, not negative, 0 of itself, and not changed by a rotation."""
    x, y = blobs(n, d, seed), blobs(n + 3, d, seed + 1)
    s, r = metrics.feature_statistics(x), metrics.feature_statistics(y)
    there = metrics.frechet_distance(s.mean, s.covariance, r.mean, r.covariance)
    assert there >= 0
    assert metrics.frechet_distance(r.mean, r.covariance, s.mean, s.covariance) == pytest.approx(there, abs=1e-11)
    assert metrics.frechet_distance(s.mean, s.covariance, s.mean, s.covariance) < 1e-11
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    s, r = metrics.feature_statistics(x @ q), metrics.feature_statistics(y @ q)
    turned = metrics.frechet_distance(s.mean, s.covariance, r.mean, r.covariance)
    assert turned == pytest.approx(there, rel=1e-6, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([0.0, 1.0, 1e6]), st.booleans())
def test_streamed_statistics_are_those_of_the_whole(sizes, offset, as_tensor):
    features = blobs(sum(sizes) + 1, 4, sum(sizes)) + offset
    batches = np.split(features, np.cumsum(sizes))
    statistics = metrics.feature_statistics(torch.from_numpy(b) if as_tensor else b for b in batches)
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-13, atol=1e-13)
    centred = features - features.mean(axis=0)
    np.testing.assert_allclose(statistics.covariance, np.cov(centred, rowvar=False), rtol=1e-7, atol=1e-10)


def test_large_offsets_and_one_row_batches_cost_no_digits(monkeypatch):
    features = blobs(2000, 5, 60)
    shifted = features + 1e6
    features = shifted - 1e6  # what is left of the features after rounding
    expected = np.cov(features, rowvar=False)
    for batches in (shifted, shifted[:, None], np.split(shifted, 40)):
        batches = list(batches) if isinstance(batches, np.ndarray) and batches.ndim == 3 else batches
        np.testing.assert_allclose(metrics.feature_statistics(batches).covariance, expected, rtol=1e-8, atol=1e-11)
    monkeypatch.setattr("diffusers_ext.metrics.frechet.ROWS", 300)
    np.testing.assert_allclose(metrics.feature_statistics(shifted).covariance, expected, rtol=1e-8, atol=1e-11)


def test_float32_features_are_summed_in_float64():
    features = (blobs(3000, 4, 61) + 1000).astype(np.float32)
    statistics = metrics.feature_statistics(torch.from_numpy(features))
    np.testing.assert_allclose(statistics.mean, features.astype(np.float64).mean(axis=0), rtol=1e-14)
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64


def test_update_leaves_the_features_and_earlier_means_alone():
    features = blobs(8, 3, 62)
    copy = features.copy()
    statistics = metrics.FeatureStatistics().update(features)
    mean = statistics.mean
    before = mean.copy()
    statistics.update(features + 1)
    np.testing.assert_array_equal(features, copy)
    np.testing.assert_array_equal(mean, before)


def test_saved_statistics_come_back_and_go_on(tmp_path):
    features = blobs(30, 3, 63)
    metrics.feature_statistics(features[:20]).save(tmp_path / "real.npz")
    statistics = metrics.FeatureStatistics.load(tmp_path / "real.npz")
    np.testing.assert_array_equal(statistics.mean, features[:20].mean(axis=0))
    statistics.update(features[20:])
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-12, atol=1e-14)
    assert statistics.count == 30


# Errors: the name, what was given, what is allowed

X, Y = np.zeros((4, 2)), np.ones((6, 2))
EYE = np.eye(2)
BROKEN = np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])


@pytest.mark.parametrize("name", SAMPLE_METRICS)
@pytest.mark.parametrize(
    ("features", "reference", "k", "message"),
    [
        (X, Y, 0, r"1 <= k <= \d \(.*reference\), got k=0|1 <= k <= 3 \(neighbours within features\), got k=0"),
        (X, Y, 7, r"need an integer k with 1 <= k <= \d \(.*\), got k=7"),
        (X, Y, 1.5, r"need an integer k .* got k=1.5"),
        (X, Y, True, r"need an integer k .* got k=True"),
        (X, np.ones((6, 3)), 1, "features and reference must have the same dimension .*, got 2 and 3"),
        (X[0], Y, 1, r"features must be 2-D, \(samples, dimensions\), got shape \(2,\)"),
        (X, Y[None], 1, r"reference must be 2-D, \(samples, dimensions\), got shape \(1, 6, 2\)"),
        (X[:0], Y, 1, r"features must have at least one sample and one dimension, got shape \(0, 2\)"),
        (X, Y[:, :0], 1, r"reference must have at least one sample and one dimension, got shape \(6, 0\)"),
        (BROKEN, Y, 1, "features must be finite, got NaN or infinity in 2 rows, the first is 1"),
        (X, torch.from_numpy(BROKEN), 1, "reference must be finite, got NaN or infinity in 2 rows"),
        (X + 1j, Y, 1, "features must be real numbers, got dtype complex128"),
    ],
)
def test_wrong_samples_and_k_are_named(name, features, reference, k, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(features, reference, k)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.nearest_neighbours(Y, Y, 6, exclude_self=True), r"1 <= k <= 5 \(neighbours within reference"),
        (lambda: metrics.nearest_neighbours(X, Y, 1, exclude_self=True), "exclude_self=True .* two different sets"),
        (lambda: metrics.rarity_score(X, Y, 6), r"1 <= k <= 5 \(neighbours within reference\), got k=6"),
        (lambda: metrics.local_outlier_factor(X, Y, 6), r"1 <= k <= 5 \(neighbours within reference\), got k=6"),
        (lambda: metrics.precision_recall(X, Y, 4), r"1 <= k <= 3 \(neighbours within features\), got k=4"),
        (lambda: metrics.feature_statistics([]), "at least one batch of features, got none"),
        (lambda: metrics.feature_statistics([X, np.ones((1, 3))]), "dimension 2 as before, got 3"),
        (lambda: metrics.feature_statistics([X, BROKEN]), "features must be finite"),
        (lambda: metrics.feature_statistics(X[:1]).covariance, "a covariance needs at least 2 samples, got 1"),
        (lambda: metrics.FeatureStatistics().mean, "a mean needs at least 1 sample"),
        (lambda: metrics.frechet_distance([0, 0], EYE, [0, 0, 0], np.eye(3)), "same dimension, got 2 and 3"),
        (lambda: metrics.frechet_distance([0, 0], EYE, [0, 0, 0], EYE), r"sigma2 must have shape \(3, 3\)"),
        (lambda: metrics.frechet_distance(EYE, EYE, [0, 0], EYE), r"mu1 must be 1-D, .* got shape \(2, 2\)"),
        (lambda: metrics.frechet_distance([0, np.nan], EYE, [0, 0], EYE), "mu1 must be finite"),
        (lambda: metrics.frechet_distance([0, 0], EYE, [0, 0], np.diag([1, np.inf])), "sigma2 must be finite"),
        (
            lambda: metrics.frechet_distance([0, 0], -EYE, [0, 0], EYE),
            "sigma1 must have no negative eigenvalue",
        ),
        (lambda: metrics.frechet_distance([0, 0], EYE, [0, 0], [[1, 0], [0.5, 1]]), "sigma2 must be symmetric"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_everything_public_is_listed():
    assert set(metrics.__all__) == {name for name in vars(metrics) if not name.startswith("_")} - {
        "features",
        "frechet",
        "lof",
        "neighbours",
        "search",
        "sequences",
        "texts",
    }
