"""Uploading a run's results to the Hugging Face Hub."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import create_repo, upload_folder, whoami
from huggingface_hub.utils import validate_repo_id

from .options import HubOptions
from .output import OutputDir


class HubUpload:
    """Where the results of a run go, or nowhere without `--push_to_hub`.

    Args:
        output: the run's, whose name the repository has if it was given none.
        logging_dir: under it; logs stay here, and so do checkpoints and files of others.
    """

    def __init__(self, options: HubOptions, output: OutputDir, logging_dir: str):
        self.options, self.output, self.logging_dir = options, output, logging_dir
        self.name = options.hub_model_id or Path(output.folder).resolve().name
        self.repository = None  # its id, once it is there

    def check(self) -> None:
        """Find out before any work whether there is a valid token and name. Raises ValueError."""
        if self.options.push_to_hub:
            with self._named_errors():
                validate_repo_id(self.name)
                whoami(token=self.options.hub_token)

    def create(self) -> None:
        """Create the repository. Raises ValueError."""
        if self.options.push_to_hub:
            with self._named_errors():
                private, token = self.options.hub_private_repo, self.options.hub_token
                self.repository = create_repo(self.name, private=private, token=token, exist_ok=True).repo_id

    def upload(self) -> None:
        """Upload what the run has written. Raises ValueError."""
        if self.options.push_to_hub:
            with self._named_errors():
                upload_folder(
                    repo_id=self.repository,
                    folder_path=self.output.folder,
                    token=self.options.hub_token,
                    commit_message="End of training",
                    allow_patterns=sorted(glob.escape(name) for name in self.output.written),
                    ignore_patterns=["checkpoint-*", ".checkpoint-*", f"{self.logging_dir}/*", ".*"],
                )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Whatever the Hub's library raises (of the network, HTTP, tokens) becomes a ValueError that names the flag."""
        try:
            yield
        except Exception as error:
            raise ValueError(f"--push_to_hub as {self.name}: {type(error).__name__}: {error}") from error
