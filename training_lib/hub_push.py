"""Checkpoints to the model hub: one private repository a run, a revision for each step, in the background."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from common_lib.cli import UserError

logger = logging.getLogger(__name__)

# The value model goes to the hub; what only this machine's resume needs does not.
LOCAL_ONLY = ["optimizer.pt", "rng.pt"]


class HubPusher:
    """Pushes one checkpoint after the other; training does not wait. A push that fails is reported, no more."""

    def __init__(self, name: str):
        """`name`: repository, OWNER/NAME or a name of the logged-in user. Raises UserError where nobody is logged in."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        self._api = HfApi()
        try:
            self.repo = self._api.create_repo(name.replace(" ", "-"), private=True, exist_ok=True).repo_id
        except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--push_to_hub: cannot make the repository {name} ({reason}); log in with `hf auth login` or set "
                "HF_TOKEN, or give --no-push_to_hub"
            ) from error
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: dict[str, Future] = {}

    @property
    def in_use(self) -> set[str]:
        """Names of checkpoints that are still to be pushed, so not to be removed."""
        return {name for name, push in self._waiting.items() if not push.done()}

    def push(self, checkpoint: Path, step: int) -> None:
        """Push a checkpoint as revision `step-N`, and as `main`, in the background."""
        self._waiting[checkpoint.name] = self._thread.submit(self._push, checkpoint, step)

    def _push(self, checkpoint: Path, step: int) -> None:
        revision = f"step-{step}"
        try:
            self._api.create_branch(self.repo, branch=revision, exist_ok=True)
            for target in (revision, "main"):  # the second finds the files there and sends only their names
                self._api.upload_folder(
                    repo_id=self.repo, folder_path=checkpoint, revision=target, ignore_patterns=LOCAL_ONLY,
                    commit_message=f"step {step}",
                )  # fmt: skip
        except Exception as error:  # whatever the network does, the checkpoint is on disk and training goes on
            logger.warning(
                "step %d was not pushed (%s); push it by hand: hf upload %s %s --revision %s",
                step, str(error).splitlines()[0], self.repo, checkpoint, revision,
            )  # fmt: skip

    def close(self) -> None:
        """Wait for what is on its way."""
        if self.in_use:
            logger.info("pushing to the hub: %d left", len(self.in_use))
        self._thread.shutdown()
