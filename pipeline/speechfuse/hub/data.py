"""The Hub, and the one door to it: data at a commit in, finished artifacts out.

In: owner/name@revision. Out: its commit, its files on this disk, or a filesystem that reads ranges
of them. And: a finished artifact with its card becomes one commit; until that commit is there
nothing of it can be seen, and what an interrupted push has sent is not sent again.

The token is read from the environment (HF_TOKEN) and from nowhere else.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    HfFileSystem,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from speechfuse import artifact

PATH = re.compile(r"([\w.-]+/[\w.-]+)@([^@]+)")


def resolve(repo: str, revision: str, repo_type: str = "dataset") -> str:
    """The commit, 40 hex digits, that a branch, tag or commit of a repository is now. Without a
    connection, what it was when last seen. ValueError where there is none."""
    with hub_errors(f"{repo}@{revision}"):
        found = _api().resolve_revision(repo, repo_type=repo_type, revision=revision)
    return found.resolved


def filesystem(repo: str, commit: str) -> HfFileSystem:
    """An fsspec filesystem in which the files of a dataset lie under datasets/{repo}@{commit}. Only
    the ranges that are read are fetched. What it cannot find is a FileNotFoundError."""
    return HfFileSystem(token=_token())


def pinned(path: str, out: Path | None = None) -> str | None:
    """owner/name@commit for owner/name@revision; None for the path of a folder. `out`: as `kept`,
    where the input has the name `path`."""
    if not (match := _on_hub(path)):
        return None
    return pinned_commit(f"{match[1]}@{resolve(match[1], match[2])}", path, out)


def pinned_commit(now: str, name: str, out: Path | None) -> str:
    """The owner/name@commit that an artifact stays with: once `out` is begun, the one that stands
    as input `name` in its plan.json, else `now`. Where the branch has moved since, that is said and
    makes no difference. What is not on the Hub is given back as it is."""
    record = artifact.record_of(out) if out else {}
    before = str(record.get("inputs", {}).get(name, now))
    if before == now or not before.startswith(f"{now.partition('@')[0]}@"):
        return now
    print(f"{name} has moved: {out} was begun with {before} and stays with it; now it is {now}")
    return before


def local(path: str) -> Path:
    """The folder that `path` names; of owner/name@revision the files of that commit, fetched once
    into the cache of huggingface_hub (HF_HOME). ValueError where they cannot be had."""
    if not (match := _on_hub(path)):
        return Path(path)
    commit = resolve(match[1], match[2])
    with hub_errors(path):
        place = snapshot_download(match[1], repo_type="dataset", revision=commit, token=_token())
    return Path(place)


def _on_hub(path: str) -> re.Match[str] | None:
    return None if Path(path).exists() else PATH.fullmatch(path)


def _token() -> str | bool:
    # False: not the one that huggingface_hub keeps in a file either
    return os.environ.get("HF_TOKEN", "").strip() or False


def _api() -> HfApi:
    return HfApi(token=_token())


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """What the Hub or the network refuses, as a ValueError of one sentence."""
    token = "HF_TOKEN has no right to it" if _token() else "HF_TOKEN is not set"
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ValueError(f"{what}: the Hub has no such repository, or {token}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what}: no such branch, tag or commit in the repository") from error
    except HfHubHTTPError as error:
        why = {
            401: "HF_TOKEN is not a valid token" if _token() else token,
            403: token,
            412: "somebody else has committed to it in the meantime; run it again",
        }.get(error.response.status_code, f"the Hub said: {error}")
        raise ValueError(f"{what}: {why}") from error
    except (HTTPError, OfflineModeIsEnabled, RevisionResolutionError, LocalEntryNotFoundError) as e:
        raise ValueError(
            f"{what}: no connection to {constants.ENDPOINT}, and it is not in the cache: {e}"
        ) from e
    except (ConnectionError, RuntimeError) as error:  # of a file on its way: by Xet, by LFS
        raise ValueError(
            f"{what}: the transfer stopped ({error.__cause__ or error}); run it again, what has "
            "arrived is not sent twice"
        ) from error
