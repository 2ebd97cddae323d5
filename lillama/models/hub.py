"""Models and datasets of the Hugging Face Hub: names in, local folders and commits out.

A model is ORG/NAME or ORG/NAME@REVISION (branch, tag or commit); a folder of that name always wins.
Its files go into huggingface_hub's own cache, `.../models--ORG--NAME/snapshots/COMMIT`, so the path
of such a folder says which model it is and at which commit. Tokens, the place of the cache and
offline mode are huggingface_hub's (`hf auth login`, HF_HOME, HF_HUB_OFFLINE).
"""

import contextlib
import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lillama.config import CompressConfig, FinetuneConfig, SampleConfig
from lillama.errors import InputError, LillamaError, RunError

__all__ = [
    "HubModel",
    "at_revision",
    "download",
    "hub_errors",
    "hub_model",
    "is_hub_id",
    "literal",
    "model_name",
    "recorded",
    "recorded_model",
]

SIGN_IN = "`hf auth login`, or `export HF_TOKEN=...`"


@dataclass(frozen=True, slots=True)
class HubModel:
    """Which model of the Hub a folder of the cache holds."""

    hub_id: str
    commit: str


def hub_model(path: Path) -> HubModel | None:
    """None for a folder that is not of huggingface_hub's cache."""
    folder = path.parent.parent.name if path.parent.name == "snapshots" else ""
    if not folder.startswith("models--"):
        return None
    return HubModel(folder.removeprefix("models--").replace("--", "/"), path.name)


def model_name(path: Path) -> str:
    """ORG/NAME, or the name of the folder."""
    found = hub_model(path)
    return path.resolve().name if found is None else found.hub_id


def recorded_model(path: Path, name: str = "model") -> dict[str, str]:
    """How a recipe names a model: with its commit where it has one, else by its path.

    name: of the entry; the commit's is `revision`, or `<name>_revision` of another model.
    """
    found = hub_model(path)
    if found is None:
        return {name: str(path)}
    revision = "revision" if name == "model" else f"{name}_revision"
    return {name: found.hub_id, revision: found.commit}


def recorded(options: CompressConfig | FinetuneConfig | SampleConfig) -> dict[str, Any]:
    """Return what a recipe says of a command's options, its models by their commits."""
    values = options.recorded() | recorded_model(options.model)
    if isinstance(options, FinetuneConfig):
        values |= recorded_model(options.base, "base")
    return values


def at_revision(model: str, revision: str | None) -> str:
    """`--revision` of the command line in a model's name.

    Raises:
        InputError: MODEL is no name of the Hub, or has a revision already.
    """
    if revision is None:
        return model
    if Path(model).exists() or not is_hub_id(model):
        raise InputError(
            f"--revision {revision} is for a model of the Hub (ORG/NAME), got MODEL {model}; leave "
            "it out"
        )
    return f"{model}@{revision}"


def is_hub_id(name: str) -> bool:
    """ORG/NAME as the Hub allows it; `./a`, `a/b/c` and `a` are paths."""
    org, slash, rest = name.partition("/")
    if not slash or not org.strip(".~") or not rest.strip("."):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        # hf_xet, which is not Python, tells it in words
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def hub_errors(
    name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model"
) -> Iterator[None]:
    """Whatever goes wrong with the Hub as one line.

    Raises:
        InputError: no such repository or revision, no access. RunError: no network, a full disk,
        an answer that is an error.
    """
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    local = "a folder here" if kind == "model" else "a file here"
    try:
        yield
    except (LillamaError, AttributeError, NameError):  # the last two are a mistake of ours
        raise
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated and this account has no access; ask for it at {page}, then sign in: "
            f"{SIGN_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no branch, tag or commit {revision!r}; {page}/commits/main lists its "
            "commits"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither {local} nor a {kind} of the Hub that is open to you; check the "
            f"name, or, if it is private, sign in: {SIGN_IN}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"{name} is not {local}, not (or not whole) in the cache {constants.HF_HUB_CACHE}, and "
            "the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set); connect, or give a "
            f"local path: {_first_line(error)}"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        what = f"sign in: {SIGN_IN}" if status in (401, 403) else "try again later"
        raise RunError(
            f"the Hub answered {status} about {name}: {_first_line(error)}; {what}"
        ) from error
    except Exception as error:  # of the HTTP library, which is another one by version
        if _is_full_disk(error):
            raise RunError(
                f"the disk is full while downloading {name} into {constants.HF_HUB_CACHE}; free "
                "space, or put the cache elsewhere: `export HF_HOME=FOLDER`"
            ) from error
        raise RunError(
            f"cannot read {name} from the Hub: {type(error).__name__}: {_first_line(error)}; check "
            "the network and run again (what was downloaded is kept)"
        ) from error


def download(hub_id: str, revision: str | None, names: Sequence[str]) -> Path:
    """The files of these names that the model has, into the cache; the folder of the commit.

    Raises:
        InputError, RunError: see `hub_errors`.
    """
    wanted = [literal(name) for name in names]
    with hub_errors(hub_id, revision):
        try:
            found = huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=wanted
            )
        except (HfHubHTTPError, LocalEntryNotFoundError):
            raise
        except Exception as error:
            # huggingface_hub 1 does not look for a commit in the cache when there is no network
            if not re.fullmatch(r"[0-9a-f]{40}", revision or "") or _is_full_disk(error):
                raise
            found = huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=wanted, local_files_only=True
            )
    return Path(found)


def literal(name: str) -> str:
    """As a pattern of fnmatch that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
