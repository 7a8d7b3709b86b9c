"""Downloads from the Hugging Face hub: cached, resumed where they broke off, one sentence when they fail."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from triptych.errors import CapacityError, CheckpointError

TOLD_MARK = "triptych-stable-cascade-notice"


def cache_folder() -> Path:
    """Where the hub's files are kept (`HF_HOME` and `HF_HUB_CACHE` move it)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached(repository: str, file: str) -> Path | None:
    """The path of a file that was downloaded before, None when it was not."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, cache_dir=cache_folder())
    return Path(path) if isinstance(path, str) else None


def fetch(repository: str, file: str) -> Path:
    """The path of one file of a repository, downloaded if it is not in the cache.

    Raises `CheckpointError` when it cannot be had, `CapacityError` when the disk is full.
    """
    path = cached(repository, file)
    if path is not None:
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, cache_dir=cache_folder()))
    except Exception as error:
        raise _failure(f"{repository}/{file}", error) from error


def fetch_repository(repository: str) -> Path:
    """The folder of a whole repository: configurations and safetensors, of 16 bit where there are any."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        try:
            files = HfApi().list_repo_files(repository)
        except Exception:
            return Path(snapshot_download(repository, cache_dir=cache_folder(), local_files_only=True))
        wanted = [file for file in files if _is_wanted(file, files)]
        return Path(snapshot_download(repository, cache_dir=cache_folder(), allow_patterns=wanted))
    except Exception as error:
        raise _failure(repository, error) from error


def _is_wanted(file: str, files: list[str]) -> bool:
    """Leave out what a cascade does not need, and 32-bit files that exist in 16 bit as well."""
    if file.startswith(("controlnet/", "comfyui_checkpoints/")):
        return False
    if file.endswith(".safetensors"):
        stem = file.removesuffix(".safetensors")
        narrower = (f"{stem}_bf16.safetensors", f"{stem}.bf16.safetensors")
        return not any(name in files for name in narrower)
    return file.endswith((".json", "merges.txt"))


def tell_once(text: str, say: Callable[[str], None]) -> None:
    """Say a notice unless it was said before on this machine; a mark in the cache folder remembers."""
    mark = cache_folder() / TOLD_MARK
    if mark.exists():
        return
    say(text)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(text + "\n", encoding="utf-8")
    except OSError:
        return  # it will be said again, which does no harm; the download itself reports the folder


def _failure(what: str, error: Exception) -> CheckpointError | CapacityError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"The disk is full: {what} was not downloaded. Run again to continue it.")
    kind = type(error).__name__
    if kind in (
        "RepositoryNotFoundError",
        "GatedRepoError",
        "EntryNotFoundError",
        "RemoteEntryNotFoundError",
    ):
        return CheckpointError(f"The hub has no {what}, or asks to accept its licence or to log in first.")
    return CheckpointError(
        f"{what} is not on this machine and cannot be downloaded ({kind}): check the network connection, "
        "or give a local folder as the model."
    )
