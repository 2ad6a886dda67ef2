"""Features on disk: found again whole or not at all."""

import os

import numpy as np
import pytest

from diffusers_ext.evaluation import cache
from diffusers_ext.evaluation.cache import cache_path, default_cache, load_features, save_features

FEATURES = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


@pytest.mark.parametrize("features", [FEATURES, FEATURES.astype(np.float64)], ids=["float32", "float64"])
def test_what_is_saved_comes_back(tmp_path, features):
    path = tmp_path / "new" / "features.safetensors"
    assert load_features(path, 6) is None
    save_features(path, features)
    found = load_features(path, 6)
    assert found.dtype == features.dtype
    np.testing.assert_array_equal(found, features)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_none(tmp_path):
    path = tmp_path / "features.safetensors"
    save_features(path, FEATURES)
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert load_features(path, 6) is None
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        found = load_features(path, 6)
        assert found is None or np.array_equal(found, FEATURES)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert load_features(path, 6) is None
    path.write_bytes(whole)
    assert load_features(path, 5) is None and load_features(path, 6) is not None


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match="features are not kept in .*: disk full"):
        save_features(tmp_path / "features.safetensors", FEATURES)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="features are not kept"):
        save_features(tmp_path / "file" / "features.safetensors", FEATURES)


def test_the_key_is_of_images_extractor_weights_and_version(tmp_path, monkeypatch):
    paths = [
        cache_path(tmp_path, *key) for key in (("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"))
    ]
    monkeypatch.setattr(cache, "FEATURES_VERSION", cache.FEATURES_VERSION + 1)
    paths += [cache_path(tmp_path, "a", "b", "c"), cache_path(tmp_path, "a", "bc", "")]
    assert len(set(paths)) == 6


def test_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_EXT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/diffusers_ext/features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg/diffusers_ext/features"
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own/features"
