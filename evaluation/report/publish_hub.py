"""An exported drafter as a model repository of the Hugging Face hub, its model card included."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from certdraft.drafters import lint_export
from certdraft.support import hub_answers, hub_endpoint

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = "run.yaml"  # names this machine and its paths
_CARD, _PLACE = "README.md", "PATH_OF_THIS_FOLDER"  # stands in a card until its place is known


def publish_to_hub(export: Path, repo: str, private: bool = True) -> str:
    """Upload an export in one commit, with a card that names the repository in its commands.

    Args:
        export: folder that `certdraft export` wrote; hidden files and run.yaml, which names this machine,
            stay here.
        repo: "USER/NAME" or "ORGANISATION/NAME"; made when it does not exist.
        private: for a repository that is made now.

    Returns:
        The commit's address.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    for file in ("drafter.json", _CARD):
        if not (export / file).is_file():
            raise FileNotFoundError(
                f"{export / file}: no such file; give a folder that `certdraft export` wrote"
            )
    if not _REPO.fullmatch(repo):
        raise ValueError(f"--hub {repo!r} is no repository of the hub; give USER/NAME")
    if found := [finding for finding in lint_export(export) if finding.severity == "error"]:
        raise ValueError(f"{export} is not published: {found[0]} (`certdraft lint {export}` lists all)")
    if not hub_answers():
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "no answer within five seconds"
        raise ValueError(f"the hub {hub_endpoint()} cannot be reached ({why}); nothing was uploaded")
    card = (export / _CARD).read_text(encoding="utf-8").replace(_PLACE, repo).encode()
    files = sorted(path for path in export.rglob("*") if path.is_file())
    names = {path: path.relative_to(export) for path in files}
    operations = [
        CommitOperationAdd(name.as_posix(), card if name.as_posix() == _CARD else str(path))
        for path, name in names.items()
        if name.as_posix() != _KEPT and not any(part.startswith(".") for part in name.parts)
    ]
    api = HfApi(endpoint=hub_endpoint(), library_name="certdraft")
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        done = api.create_commit(repo, operations, commit_message="Drafter exported by certdraft")
    except LocalTokenNotFoundError:
        raise ValueError(f"no token for {hub_endpoint()}: `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"the hub refuses to write to {repo} ({status}): `hf auth login` with a token that has write "
                "access there, or set HF_TOKEN"
            ) from None
        raise ValueError(f"the hub answers {status} for {repo}: {str(error).splitlines()[0]}") from None
    print(f"published {export} as {done.repo_url}", file=sys.stderr)
    return done.commit_url
