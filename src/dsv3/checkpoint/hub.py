"""From what a person calls a model to a folder on this machine.

A name is one of three things: `nano`, the model that ships inside the package; a local folder or GGUF file; or the id of a
model on the Hugging Face hub, `org/name` or `org/name@revision`, which huggingface_hub downloads into its
cache: resumed where it broke off, with its progress bar, and found again without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsv3.errors import CheckpointError

NANO = "nano"
_CHOICES = f"a checkpoint's folder, a GGUF file, a hub id such as deepseek-ai/DeepSeek-V3, or {NANO}"
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
# What a model needs, from the top folder of its repository; never code and never a pickle.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tiktoken.model", "LICENSE*"]
_REFUSED = ["*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]


def resolve(model: str | Path, weights: bool = True) -> Path:
    """The folder of a model. Raises CheckpointError if there is none, or it cannot be downloaded.

    A `Path` is always a local folder. A local folder that happens to be named `nano` is `./nano`. With
    `weights=False` what has to be downloaded comes without its weights.
    """
    if model == NANO:
        return Path(__file__).parents[1] / "assets" / NANO
    if model == "":
        raise CheckpointError(f"the model's name is empty: give {_CHOICES}")
    path = expand(model)
    if path.exists() or isinstance(model, Path):
        return path
    hub_id = _HUB_ID.fullmatch(model)
    if hub_id is None:
        raise CheckpointError(f"{model} does not exist: give {_CHOICES}")
    return _download(hub_id[1], hub_id[2], _REFUSED if weights else [*_REFUSED, "*.safetensors"])


def is_on_hub(model: str | Path) -> bool:
    """Whether `resolve` would ask the hub: a hub id, and nothing here has that name."""
    return isinstance(model, str) and bool(_HUB_ID.fullmatch(model)) and not Path(model).exists()


def expand(path: str | Path) -> Path:
    """The path with a folder in the place of `~`; raises CheckpointError if the user has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{path}: there is no such home folder: write the path out") from None


def _download(repo: str, revision: str | None, refused: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # not needed, and so not loaded, for local models
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=refused)
    except GatedRepoError:
        problem = f"is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login`"
    except RepositoryNotFoundError:
        problem = "is neither a folder here nor a model on the hub (for a private one, run `hf auth login`)"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the hub"
    except LocalEntryNotFoundError:
        problem = "is not a folder here, not (wholly) in the download cache, and the hub cannot be reached"
    except Exception as error:  # the client's many ways to say that a transfer broke
        reason = str(error).strip().split("\n")[0]
        problem = f"could not be downloaded ({type(error).__name__}: {reason}): run it again to resume"
    else:
        return Path(folder)
    raise CheckpointError(f"{repo} {problem}")
