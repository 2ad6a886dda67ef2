"""find_neighbours: brute force agrees, with and without faiss, within classes, by inverted file; balanced weights."""

import sys

import numpy as np
import pytest
import torch

from diffusers_ext.flow import Neighbours, balanced_weights, find_neighbours
from diffusers_ext.flow import neighbours as module

RNG = np.random.default_rng(0)
QUERIES, REFERENCE = RNG.normal(size=(70, 6)).astype(np.float32), RNG.normal(size=(300, 6)).astype(np.float32)


def brute_force(queries, reference, k):
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - reference, axis=-1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


@pytest.mark.parametrize("faiss", [True, False], ids=["faiss", "without"])
@pytest.mark.parametrize("k", [1, 20, 300])
def test_exact_is_brute_force(k, faiss, monkeypatch):
    if not faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)
    found = find_neighbours(QUERIES, torch.from_numpy(REFERENCE), k)
    indices, distances = brute_force(QUERIES, REFERENCE, k)
    assert torch.equal(found.indices, torch.from_numpy(indices))
    torch.testing.assert_close(found.distances, torch.from_numpy(distances).float())
    assert found.indices.dtype == torch.int64 and found.distances.dtype == torch.float32


def test_inverted_file_with_all_cells_is_exact_and_with_one_is_close():
    pytest.importorskip("faiss")
    indices, distances = brute_force(QUERIES, REFERENCE, 5)
    whole = find_neighbours(QUERIES, REFERENCE, 5, method="ivf", cells=6, probes=6)
    assert torch.equal(whole.indices, torch.from_numpy(indices))
    part = find_neighbours(QUERIES, REFERENCE, 5, method="ivf", cells=6, probes=1)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(part.indices.tolist(), indices, strict=True)])
    assert 0.3 < recall < 1
    own = np.linalg.norm(QUERIES[:, None].astype(np.float64) - REFERENCE[part.indices], axis=-1)
    torch.testing.assert_close(part.distances, torch.from_numpy(own).float())
    assert (part.distances.numpy() >= distances.astype(np.float32) - 1e-6).all()


def test_inverted_file_fills_up_what_its_cells_lack():
    pytest.importorskip("faiss")
    found = find_neighbours(QUERIES, REFERENCE, 290, method="ivf", cells=4, probes=1)
    assert torch.equal(found.indices, torch.from_numpy(brute_force(QUERIES, REFERENCE, 290)[0]))


def test_a_gpu_index_is_used_where_there_is_one(monkeypatch):
    faiss = pytest.importorskip("faiss")
    moved = []
    monkeypatch.setattr(module, "_gpus", lambda: 1)
    monkeypatch.setattr(
        faiss, "index_cpu_to_all_gpus", lambda index: moved.append(type(index).__name__) or index, raising=False
    )
    expected = torch.from_numpy(brute_force(QUERIES, REFERENCE, 4)[0])
    assert torch.equal(find_neighbours(QUERIES, REFERENCE, 4).indices, expected)
    assert torch.equal(find_neighbours(QUERIES, REFERENCE, 4, method="ivf", cells=3).indices, expected)
    assert moved == ["IndexFlatL2", "IndexIVFFlat"]


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_within_classes(method):
    pytest.importorskip("faiss")
    mine, theirs = np.arange(70) % 3, np.arange(300) % 4
    found = find_neighbours(QUERIES, REFERENCE, 3, torch.from_numpy(mine), theirs, method, cells=1)
    for label in range(3):
        members = np.flatnonzero(theirs == label)
        indices = members[brute_force(QUERIES[mine == label], REFERENCE[members], 3)[0]]
        assert torch.equal(found.indices[mine == label], torch.from_numpy(indices))


def test_save_and_load(tmp_path):
    found = find_neighbours(QUERIES, REFERENCE, 3)
    found.save(tmp_path / "new/pairs.safetensors")
    again = Neighbours.load(tmp_path / "new/pairs.safetensors")
    assert torch.equal(again.indices, found.indices) and torch.equal(again.distances, found.distances)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.safetensors"]
    Neighbours(found.indices, found.distances[:2]).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"wrong.safetensors must hold indices and distances of one shape"):
        Neighbours.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 301}, "k <= 300"),
        ({"k": 0}, "1 <= k"),
        ({"method": "hnsw"}, "method must be"),
        ({"probes": 0}, "cells and probes"),
        ({"query_labels": np.zeros(70, int)}, "reference_labels must be given"),
        ({"query_labels": np.zeros(69, int), "reference_labels": np.zeros(300, int)}, "query_labels must be 70"),
        ({"query_labels": np.zeros(70, int), "reference_labels": np.arange(300)}, "reference of class 0"),
        ({"method": "ivf", "cells": 301}, "cells within reference"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        find_neighbours(QUERIES, REFERENCE, **{"k": 2, **options})


def test_other_dimensions_and_missing_faiss(monkeypatch):
    with pytest.raises(ValueError, match="same dimension"):
        find_neighbours(QUERIES[:, :5], REFERENCE, 2)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        find_neighbours(QUERIES, REFERENCE, 2, method="ivf")


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([[0, 1], [0, 2]], [[1 / 3, 2 / 3], [1 / 3, 2 / 3]]),  # the hub 0 gets as much as 1 and 2
        ([[0, 1], [0, 1]], [[1 / 2, 1 / 2], [1 / 2, 1 / 2]]),
        ([[3], [3]], [[1.0], [1.0]]),  # there is nothing else to draw
        ([[0, 1], [1, 2], [2, 0]], [[1 / 2, 1 / 2]] * 3),
    ],
)
def test_balanced_weights_on_paper(lists, expected):
    weights = balanced_weights(torch.tensor(lists), 4, iterations=200)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_balanced_weights_visit_more_evenly_what_the_lists_hold():
    indices = find_neighbours(QUERIES, REFERENCE, 20).indices
    weights = balanced_weights(indices, len(REFERENCE))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(QUERIES)))
    assert weights.shape == indices.shape and (weights > 0).all()
    listed = indices.unique()
    visits = {
        name: torch.bincount(indices.flatten(), probabilities.flatten(), len(REFERENCE))[listed]
        for name, probabilities in {"even": torch.full(indices.shape, 1 / 20), "balanced": weights}.items()
    }
    assert visits["balanced"].std() < 0.4 * visits["even"].std()
    torch.testing.assert_close(visits["balanced"].sum(), torch.tensor(float(len(QUERIES))))


@pytest.mark.parametrize(
    "indices", [torch.tensor([0, 1]), torch.tensor([[0, 4]]), torch.tensor([[-1, 0]]), torch.zeros(0, 3)]
)
def test_balanced_weights_refuse_other_indices(indices):
    with pytest.raises(ValueError, match="indices must be"):
        balanced_weights(indices.long(), 4)
