"""Push a finished dataset, model or quantizer to the Hub, with its card.

    python -m stages.push_to_hub path=speech_train repo=me/speech

In: the folder of a finished artifact, or its name under out/data or out/models. Out: one commit
that has all of its files, and pushed-NAME.json beside the folder, which says where it went. The
token is in the environment, HF_TOKEN. Run it again after a stop; a repository that has it all is
left alone.
"""

from dataclasses import dataclass
from pathlib import Path

from speechfuse import config
from speechfuse.config import key
from speechfuse.hub import cards, push

TEMPLATES = Path(__file__).parent.parent / "data_cards"
PARENTS = (Path(), Path("out/data"), Path("out/models"))


@dataclass
class PushToHub:
    path: str = key("folder, or its name under out/data or out/models")
    repo: str | None = key("owner/name; null: your account and the folder's name", None)
    private: bool = key("false: everybody may read it", True)
    licence: str | None = key("e.g. cc-by-4.0; null: what the corpus states", None)
    message: str | None = key("of the commit", None)
    dry_run: bool = key("say what would be sent, and stop", False)


def folder_of(path: str) -> Path:
    """Return `path` itself, or the folder of that name below out/data or out/models. Raises
    ValueError when there is none."""
    for parent in PARENTS:
        if (parent / path).is_dir():
            return parent / path
    raise ValueError(f"path={path}: there is no such folder, neither in out/data nor in out/models")


def main(job: PushToHub) -> None:
    folder = folder_of(job.path)
    if not job.private and "unknown" in cards.licence_of(folder, job.licence).split():
        raise ValueError(
            f"{folder}: its licence, or that of a part of it, is not stated, so it cannot be made "
            "public: say licence=... if you know it, or leave private=true"
        )
    repo = job.repo or f"{'YOU' if job.dry_run else push.own_name()}/{folder.absolute().name}"
    card = cards.card(folder, TEMPLATES, repo, job.licence)
    if job.dry_run:
        print(card)
    repo_type = "dataset" if cards.kind_of(folder) == "dataset" else "model"
    push.push(folder, repo, card, repo_type, job.private, job.message, job.dry_run)


if __name__ == "__main__":
    config.main(main, PushToHub, __doc__, ("path",))
