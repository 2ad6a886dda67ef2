"""Pipelines of the Hub as folders of the local cache, checked against the hashes that the Hub gave."""

import os
import re
from hashlib import new
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError

PIECE = 1 << 22


def download_pipeline(repo_id: str, cls: type[DiffusionPipeline] = DiffusionPipeline, **options) -> Path:
    """The folder of a pipeline in the cache, checked; what is missing or outdated is downloaded first.

    Args:
        repo_id: of the Hub.
        cls: class of the pipeline, whose `download` is called.
        **options: of `from_pretrained`, such as revision, variant, cache_dir, token and trust_remote_code. With
            HF_HUB_OFFLINE=1 or local_files_only=True it is what the cache has, also where diffusers would ask the Hub
            for the commit of a repository's code.

    Raises:
        ValueError: for a file that is not what the Hub sent, and offline for a pipeline that was never downloaded.
        OSError: for a repository or revision that cannot be had, with the reason.
    """
    if constants.is_offline_mode() or options.get("local_files_only"):
        folder = _cached(repo_id, options)
    else:
        folder = _fetched(repo_id, cls, options)
    check_download(folder)
    return folder


def _cached(repo_id: str, options: dict) -> Path:
    revision = options.get("revision")
    index = try_to_load_from_cache(repo_id, "model_index.json", options.get("cache_dir"), revision)
    if not isinstance(index, str):
        raise _not_cached(repo_id, revision)
    return Path(index).parent


def _not_cached(repo_id: str, revision: str | None) -> ValueError:
    at = f" at revision {revision!r}" if revision else ""
    return ValueError(
        f"model {repo_id!r}{at} is no folder and not in the cache, and downloads are off; load it once without"
        " HF_HUB_OFFLINE and local_files_only"
    )


def _fetched(repo_id: str, cls: type[DiffusionPipeline], options: dict) -> Path:
    names = {name: options.get(name) for name in ("revision", "token", "cache_dir")}
    check_source(repo_id, **names, file="model_index.json")
    try:
        return Path(cls.download(repo_id, **options))
    except (OSError, HTTPError) as error:
        # diffusers looks into the cache when the Hub says no, and tells of the cache alone.
        reason = error.__cause__ if isinstance(error, OSError) else error
        if not isinstance(reason, HTTPError):
            raise
        raise _refused(repo_id, reason) from error


def check_source(
    model: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    file: str = "config.json",
) -> None:
    """Refuse a model at once that is no folder, not in the cache, by one of its files, and not to be had from the Hub.

    Libraries would ask again and again, for 23 seconds, where the Hub is not reached.

    Raises:
        ValueError: for what is no Hub id either and for downloads that are off.
        OSError: with the Hub's reason.
    """
    model = str(model)
    if Path(model).is_dir():
        return
    if Path(model).is_file() or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", model):
        raise ValueError(f"model {model!r} is {'a file' if Path(model).is_file() else 'no folder'}, and no Hub id")
    if isinstance(try_to_load_from_cache(model, file, cache_dir, revision), str):
        return
    if constants.is_offline_mode():
        raise _not_cached(model, revision)
    try:
        HfApi(token=token).model_info(model, revision=revision, timeout=10)
    except (OSError, HTTPError) as error:
        raise _refused(model, error) from error


def _refused(repo_id: str, error: Exception) -> OSError:
    why = "not to be had from the Hub" if isinstance(error, HfHubHTTPError) else "the Hub is not reached"
    return OSError(f"model {repo_id!r} is no folder, and {why}: {error}")


def check_download(folder: str | Path) -> None:
    """Compare the files of a snapshot in the Hub's cache with the hashes by which they are stored there.

    huggingface_hub compares sizes alone, so bits that changed on the way or on the disk would be loaded. Files of
    other folders, and of caches without links, have no known hash and are not looked at. Some 1 to 2 GB a second.

    Args:
        folder: of the snapshot.

    Raises:
        ValueError: with the names of the files that differ.
    """
    links = [path for path in sorted(Path(folder).rglob("*")) if path.is_symlink() and path.is_file()]
    broken = [path for path in links if not _is_intact(path, Path(os.readlink(path)).name)]
    if broken:
        names = ", ".join(path.relative_to(folder).as_posix() for path in broken)
        stored = " ".join(str(path.resolve()) for path in broken)
        raise ValueError(f"{names} in {folder} differ from what the Hub holds; delete {stored} and load again")


def _is_intact(path: Path, tag: str) -> bool:
    """tag: the sha256 of a large file; of others git's hash, which is over a header and the content."""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", tag):
        return True
    digest = new("sha256" if len(tag) == 64 else "sha1", usedforsecurity=False)
    if len(tag) == 40:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest() == tag
