"""A name -> a local checkpoint folder: a path, a model that the package ships, or a name on the hub."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from encore import tokenizer
from encore.checkpoint import CheckpointError
from encore.tokenizer import Tokenizer

CARRIED = (
    "generation_config.json",
    "encore.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files without weights that belong to a checkpoint: what goes along when it is saved anew or adapted."""

LICENCES = (
    *(f"{word}*" for word in ("LICENSE", "LICENCE", "NOTICE", "USAGE", "COPYING")),
    *(f"{word}*" for word in ("license", "licence", "notice", "usage", "copying")),
    *("*terms*", "*Terms*", "*TERMS*"),
)
"""Licence and terms files, which go along with the weights."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def carried_files(folder: Path) -> list[Path]:
    """The files of a folder that go along with its weights: tokenizer, generation settings, licences."""
    paths = [folder / name for name in CARRIED if (folder / name).is_file()]
    for pattern in LICENCES:
        paths += [path for path in sorted(folder.glob(pattern)) if path.is_file() and path not in paths]
    return paths


def resolve(name: str | os.PathLike[str]) -> Path:
    """A folder, the name of a shipped model, or a hub name (`google/…`, fetched into the hub's cache) -> a folder.

    Raises CheckpointError if it is none of them, if there is no network, or if the hub wants a licence accepted.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected a checkpoint folder (the one that holds config.json)")
    text = os.fspath(name)
    if _HUB_NAME.fullmatch(text):
        return _fetch(text)
    shipped = shipped_models()
    if text in shipped:
        return shipped[text]
    offer = f"; shipped models: {', '.join(sorted(shipped))}" if shipped else ""
    raise CheckpointError(f"there is no folder {text}, and it is no hub name (owner/name) either{offer}")


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder, a shipped model or a hub name; raises as `resolve` and `encore.tokenizer` do."""
    return tokenizer.load_tokenizer(resolve(name_or_folder))


def shipped_models() -> dict[str, Path]:
    """The models inside the package, by the name of their folder."""
    assets = Path(str(resources.files("encore"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(assets.glob("**/config.json"))}


def _fetch(name: str) -> Path:
    """The newest snapshot of a hub name, or the cached one where there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *CARRIED, *LICENCES]
    try:
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name} while logged in, then log in here "
            "(`hf auth login`, or the variable HF_TOKEN) and try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub knows no model {name}, or it is private; check the name, or give a local folder"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:  # OSError: every failed connection
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(f"the hub refused {name}: {error}") from error
        raise CheckpointError(
            f"{name} is no local folder, is not in the hub's cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set); give a local folder, or fetch it once where there is a network"
        ) from error
    return Path(folder)
