"""Push exports to the Hugging Face Hub."""

import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from ..pipelines.call_arguments import checked_arguments
from .export import export_model, export_pipeline


@checked_arguments
def push_to_hub(
    exported: DiffusionPipeline | ModelMixin,
    repo_id: str,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Export a pipeline or a network and push it to a repository on the Hub; returns the address of the commit.

    What `DiffusionPipeline.push_to_hub` leaves out is there: code, a card that names the repository, no paths of this
    machine.

    Args:
        exported: the pipeline or network.
        repo_id: of the repository.
        license: as `export_pipeline`.
        private: as `push_folder`.
        token: as `push_folder`.

    Raises:
        ValueError: as `push_folder` and the export.
        OSError: as `push_folder`.
        RuntimeError: as `push_folder`.
    """
    validate_repo_id(repo_id)  # before anything is written
    export = export_pipeline if isinstance(exported, DiffusionPipeline) else export_model
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(exported, Path(temporary) / "export", license, repo_id)
        return push_folder(folder, repo_id, private, token)


def check_push(repo_id: str) -> None:
    """Before the work of an export: raises ValueError for a repo_id that the Hub does not take and where nobody is
    logged in, OSError where the Hub is not reached."""
    validate_repo_id(repo_id)
    try:
        HfApi().repo_exists(repo_id)
    except (HTTPError, OSError) as error:
        raise OSError(f"the Hub is not reached, so nothing can be pushed to {repo_id!r}: {error}") from error
    if get_token() is None:
        raise ValueError(f"nobody is logged in to push to {repo_id!r}; run `hf auth login`, or set HF_TOKEN")


@checked_arguments
def push_folder(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Push an exported folder to a repository on the Hub, made if there is none; returns the address of the commit.

    One commit holds all of it, so that readers find the old state or the new one. In the subfolders that the export
    has (unet/, scheduler/, ...) files of earlier pushes are deleted, such as shards of weights, which would be loaded
    instead; other files of the repository stay.

    Args:
        folder: as `export_pipeline` or another export wrote it.
        repo_id: of the repository.
        private: whether a repository that is made here is seen by its owners alone; by default the account's setting.
        token: of an account that may write; by default the one that is logged in.

    Raises:
        ValueError: for a repo_id that the Hub does not take and, with private, for a repository that is public
            already.
        OSError: huggingface_hub's HfHubHTTPError, if the Hub refuses.
        RuntimeError: if an upload fails. The repository is then as it was.
    """
    folder, api = Path(folder), HfApi(token=token)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"repository {repo_id!r} exists and is public; make it private or push without private")
    stale = [path for path in api.list_repo_files(repo_id) if _belongs(path, files) and path not in files]
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, folder / path) for path in files),
            *(CommitOperationDelete(path) for path in stale),
        ],
        commit_message="Export with diffusers_ext",
    )
    return commit.commit_url


def _belongs(path: str, files: list[str]) -> bool:
    """Whether a file of the repository lies in a subfolder that the export has."""
    return "/" in path and path.split("/")[0] in {file.split("/")[0] for file in files if "/" in file}
