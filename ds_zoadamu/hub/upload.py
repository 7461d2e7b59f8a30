"""What is sent to the hub. The token is the environment's: of `hf auth login`, or HF_TOKEN."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..files.hub_access import one_line


def create_repo(name: str, private: bool | None = None) -> str:
    """The whole name of a repository of models, which is made where it is not there. Raises HubError: no token, no network."""
    with one_line(f"repository {name!r} cannot be made on the hub"):
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id


def upload_folder(folder: Path, repo: str, message: str) -> None:
    """Send all files of a folder as one commit. Raises HubError."""
    again = f"everything is in {folder}: `hf upload {repo} {folder}` tries again"
    with one_line(f"{str(folder)!r} cannot be sent to {repo!r}", again):
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)


def upload_files(files: Mapping[str, bytes], repo: str, message: str) -> None:
    """Send the bytes of files by their names in the repository, as one commit. Raises HubError."""
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with one_line(f"{', '.join(files)} cannot be sent to {repo!r}"):
        HfApi().create_commit(repo, operations, commit_message=message)
