"""What makes a checkpoint directory trustworthy: a sealed list of its files, and the order of writing them.

A directory is filled under the name ``step_0000100.tmp`` and renamed when every byte is hashed and flushed: what
carries the final name is complete, whatever was killed when, and later damage shows as a mismatch with
``MANIFEST.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from mhmoe_vl.distributed.collectives import broadcast_object, fail_together, gather_objects, share_of_rank
from mhmoe_vl.errors import CheckpointError, OutputError

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
_COMMITTED = re.compile(r"step_\d{7,}")


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is once it is committed."""
    return root / f"step_{step:07d}"


def partial_path(path: Path) -> Path:
    """Where a checkpoint is while it is written, and while it is deleted."""
    return path.with_name(f"{path.name}.tmp")


def committed(root: Path) -> list[Path]:
    """Committed checkpoints, damaged ones among them, oldest first."""
    found = [path for path in root.iterdir() if _COMMITTED.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Flush each file to the disk; its size and SHA-256 by name. Collective: ranks share the work.

    Raises:
        OutputError: on every rank, if any could not read what was written.
    """
    names = broadcast_object(sorted(file.name for file in directory.iterdir()))
    described: dict[str, dict[str, Any]] = {}
    with fail_together(OutputError, f"{directory}: cannot save"):
        for name in share_of_rank(names):
            flush(directory / name)
            described[name] = {"size": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
    return {name: entry for part in gather_objects(described) for name, entry in part.items()}


def commit(partial: Path, path: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` (with the ``files`` of :func:`describe_files`) into ``partial`` and rename it to ``path``.

    Each flush comes before the step that relies on it, so that a power loss leaves all or nothing.
    """
    (partial / MANIFEST).write_text(_seal(manifest), encoding="utf-8")
    flush(partial / MANIFEST)
    flush(partial)
    partial.rename(path)
    flush(path.parent)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of ``path`` after every byte was compared with it. Collective: ranks share the work.

    Raises:
        CheckpointError: on every rank; names what is damaged, missing or not listed.
    """
    with fail_together(CheckpointError, str(path)):
        manifest = _read_manifest(path)
        for name in share_of_rank(sorted(manifest["files"])):
            if _sha256(path / name) != manifest["files"][name]["sha256"]:
                raise CheckpointError(f"{name} does not match its SHA-256 in {MANIFEST}")
    return manifest


def delete_old(root: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints that have a sealed manifest and all files in full size.

    Contents are not hashed here. Damaged checkpoints neither count nor go: counting them would push out intact ones.
    """
    complete = []
    for path in committed(root):
        try:
            _read_manifest(path)
        except CheckpointError as error:
            logger.warning("%s does not count as a checkpoint to keep: %s", path, error)
        else:
            complete.append(path)
    for path in complete[:-keep]:
        try:
            # Renamed first: a kill halfway must not leave what looks like a damaged checkpoint.
            shutil.rmtree(path.rename(partial_path(path)))
        except OSError as error:
            logger.warning("%s: cannot delete the old checkpoint: %s", path, error)


def flush(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(manifest: dict[str, Any]) -> str:
    """The only text that stands for ``manifest``, its own hash included: every changed byte shows."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, if it is sealed and exactly its files are there with their sizes; contents are not read."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is unreadable ({error!r})") from None
    if text != _seal(manifest):
        raise CheckpointError(f"{MANIFEST} does not match its own hash")
    found = {file.name: file.stat().st_size for file in path.iterdir() if file.name != MANIFEST}
    for name in sorted(manifest["files"].keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{name} is missing")
        if name not in manifest["files"]:
            raise CheckpointError(f"{name} is not listed in {MANIFEST}")
        if found[name] != manifest["files"][name]["size"]:
            raise CheckpointError(f"{name} has {found[name]} bytes, not {manifest['files'][name]['size']}")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
