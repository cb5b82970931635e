"""The folder of a data set: what is in it stays whole until its replacement is complete.

A data set is packed in the subfolder ``unfinished`` and moved out of it at the end, ``manifest.json`` last. Whatever
goes wrong before, an earlier data set in the folder can still be used, and an interrupted run can go on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mhmoe_vl.data.files import TEMPORARY_SUFFIX, write_atomically
from mhmoe_vl.data.prepare.shard_writer import ShardPlace
from mhmoe_vl.data.shards import MANIFEST, UNFINISHED, Manifest, encode_json, index_path, is_file_name, read_manifest
from mhmoe_vl.errors import DataError, OutputError

_STATE = "state.json"


class OutputFolder:
    """A folder that a data set is to be packed into.

    Attributes:
        directory: the folder.
        staging: the subfolder that shards are written to.
        replaces: shards and files of an earlier data set may be replaced by others.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Look at the folder, and change nothing.

        Args:
            settings: what decides the data set; JSON.
            overwrite: another data set may be replaced.

        Raises:
            OutputError: it holds a data set with other settings, or shards of unknown origin.
        """
        self.directory, self.staging = directory, directory / UNFINISHED
        self._settings = json.loads(encode_json(settings))
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory}: is not a folder; choose another --out")
        manifest = self._read_manifest(directory)
        # There if a run was interrupted while it moved its shards out of the staging folder.
        moving = self._read_manifest(self.staging)
        begun = self._read_state()
        self._earlier = {*_file_names(manifest), *_file_names(moving), *begun.get("replaces", ())}
        in_folder = {path.name for path in directory.glob("*.tar")}
        foreign = in_folder - self._earlier
        if foreign:
            raise OutputError(f"{directory / min(foreign)}: was not packed here; choose another --out")
        # A run that failed before its first shard does not bind the next one.
        has_begun = bool(begun) and (any(self.staging.glob("*.tar")) or (bool(in_folder) and not manifest))
        began_to_replace = has_begun and begun["overwrite"]
        # --overwrite starts anew, unless it is what the interrupted run was started with.
        self._goes_on = has_begun and begun["settings"] == self._settings and (began_to_replace or not overwrite)
        self.replaces = overwrite or (self._goes_on and began_to_replace)
        if not self.replaces and (has_begun or manifest):
            self._check_settings(begun["settings"] if has_begun else manifest.settings)  # type: ignore[union-attr]

    def place(self, name: str) -> ShardPlace:
        """Where the shard ``name`` is written."""
        return ShardPlace(self.staging / name, self.directory / name, self.replaces)

    def begin(self) -> None:
        """Make the staging folder; what an interrupted run of the same settings left in it is kept.

        Raises:
            OutputError: the folder cannot be written.
        """
        state = {"settings": self._settings, "overwrite": self.replaces, "replaces": sorted(self._earlier)}
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            write_atomically(self.staging / _STATE, encode_json(state))
            for path in list(self.staging.iterdir()):
                if path.suffix == TEMPORARY_SUFFIX or (path.name != _STATE and not self._goes_on):
                    path.unlink()
        except OSError as error:
            raise OutputError(f"{self.directory}: cannot write: {error.strerror}") from None

    def publish(self, shards: Collection[str], files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        """Put the complete data set in the place of the earlier one.

        Args:
            shards: names of all its shards; those that are not in the staging folder are in the folder already.

        Raises:
            OutputError: the earlier data set has more shards and must not be replaced, or the folder cannot be written.
        """
        surplus = {name for name in self._earlier if name.endswith(".tar")} - set(shards)
        if surplus and not self.replaces:
            shard = self.directory / min(surplus)
            raise OutputError(f"{shard}: is left from an earlier packing of more records; add --overwrite")
        write_atomically(self.staging / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
        try:
            # From here on the folder is unfinished; `replaces` of the state tells the next run what is whose.
            (self.directory / MANIFEST).unlink(missing_ok=True)
            for name in self._earlier - {*shards, *files}:
                (self.directory / name).unlink(missing_ok=True)
                if name in surplus:
                    index_path(self.directory / name).unlink(missing_ok=True)
            for name in shards:
                self._move_shard(name)
            for name, content in files.items():
                write_atomically(self.directory / name, content)
            (self.staging / MANIFEST).replace(self.directory / MANIFEST)
            shutil.rmtree(self.staging)
        except OSError as error:
            raise OutputError(f"{self.directory}: cannot write: {error.strerror}") from None

    def discard_if_empty(self) -> None:
        """Remove the staging folder if there is no shard in it to go on with."""
        if (
            self.staging.is_dir()
            and not any(self.staging.glob("*.tar"))
            and ((self.directory / MANIFEST).exists() or not any(self.directory.glob("*.tar")))
        ):
            shutil.rmtree(self.staging, ignore_errors=True)

    def _move_shard(self, name: str) -> None:
        shard, target = self.staging / name, self.directory / name
        if shard.exists():
            # Never an index beside a shard that it was not made for, whenever this is interrupted.
            index_path(target).unlink(missing_ok=True)
            shard.replace(target)
            index_path(shard).replace(index_path(target))

    def _check_settings(self, earlier: Mapping[str, Any]) -> None:
        different = sorted(key for key in {*earlier, *self._settings} if earlier.get(key) != self._settings.get(key))
        if different:
            raise OutputError(
                f"{self.directory}: holds a data set with other {', '.join(different)}; add --overwrite, or choose "
                "another --out"
            )

    def _read_manifest(self, directory: Path) -> Manifest | None:
        try:
            return read_manifest(directory)
        except DataError as error:
            raise OutputError(f"{error}, or choose another --out") from None

    def _read_state(self) -> dict[str, Any]:
        """What an interrupted run says of itself; empty if there is none."""
        path = self.staging / _STATE
        try:
            state = json.loads(path.read_bytes())
            types = {"settings": dict, "overwrite": bool, "replaces": list}
            if any(not isinstance(state[name], expected) for name, expected in types.items()):
                raise TypeError
            # Files of these names are going to be deleted.
            if not all(map(is_file_name, state["replaces"])):
                raise ValueError
            return state
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, LookupError, TypeError):
            raise OutputError(f"{path}: not readable; delete {self.staging}, or choose another --out") from None


def _file_names(manifest: Manifest | None) -> list[str]:
    return [] if manifest is None else [*manifest.shards, *manifest.files]
