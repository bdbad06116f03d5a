"""Checkpoints on the Hugging Face hub: their files are downloaded into the hub's cache, if the disk has room."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.write import require_space
from sdopt.errors import CheckpointError
from sdopt.export import families, wrong
from sdopt.logs import logger

log = logger(__name__)
SECONDS = 10.0  # for the question how large the files are


def download(repo_id: str, revision: str | None, variant: str | None, offline: bool, *, weights: bool = True) -> Path:
    """Download the configurations and, with `weights`, those of one variant from the hub. Returns the folder.

    Raises: as `download_files` does.
    """
    infix = f".{variant}" if variant else ""
    patterns = ["model_index.json", "generation_config.json", "*/*.json", "*/merges.txt"]
    for component in families.models() if weights else []:
        patterns += [f"{component}/*model{infix}.safetensors", f"{component}/*model{infix}-*-of-*.safetensors"]
    return download_files(repo_id, revision, patterns, offline)


def download_files(repo_id: str, revision: str | None, patterns: Sequence[str], offline: bool) -> Path:
    """Download the files whose names match one of the patterns. Returns the folder.

    Raises: CheckpointError for what the hub, or the cache, does not have; BundleError where the disk has no room.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not offline:
        _require_room(repo_id, revision, patterns)
    try:
        snapshot = cast(Any, huggingface_hub).snapshot_download
        return Path(snapshot(repo_id, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not in the local cache, and the hub cannot be asked (offline, or no connection). "
            f"Download it first, where there is a network: hf download {repo_id}{wrong.near_id(repo_id)}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo_id}: the hub says: {error}") from error


def _require_room(repo_id: str, revision: str | None, patterns: Sequence[str]) -> None:
    """Raises: BundleError if the disk of the hub's cache has less room than the files that are not there yet."""
    from huggingface_hub import constants

    try:
        missing = _missing_bytes(repo_id, revision, patterns)
        cache = Path(constants.HF_HUB_CACHE).absolute()
        folder = next(one for one in (cache, *cache.parents) if one.is_dir())
    except Exception as error:  # an answer that does not come is no reason to stop: the download has its own errors
        log.debug("%s: how large it is could not be asked: %s", repo_id, error)
        return
    require_space(folder, missing)


def _missing_bytes(repo_id: str, revision: str | None, patterns: Sequence[str]) -> int:
    """How many bytes of the files that match are not in the cache. Raises: whatever the hub's library raises."""
    import huggingface_hub

    hub = cast(Any, huggingface_hub)
    if hub.constants.HF_HUB_OFFLINE:
        return 0
    info = hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=SECONDS)
    wanted = [file for file in info.siblings if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    absent = [
        file
        for file in wanted
        if not isinstance(hub.try_to_load_from_cache(repo_id, file.rfilename, revision=info.sha), str)
    ]
    return sum(file.size or 0 for file in absent)
