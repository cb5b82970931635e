"""Which shards an analysis looks at."""

from __future__ import annotations

from collections.abc import Sequence

from mhmoe_vl.data.shards import find_shards, read_index
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.train.config import SOURCE_KINDS, RunConfig, SourceConfig


def analysed_sources(config: RunConfig, shards: Sequence[str] | None) -> dict[str, SourceConfig]:
    """``shards`` by their kind, which their indexes tell; if none are named, the validation sources of the run.

    Raises:
        ConfigError: no shards are named and the run has no validation.
        DataError: shards that are missing, damaged, or of a kind that the run's task cannot read.
    """
    if shards is None:
        if not config.data.validation:
            raise ConfigError(f"{config.out}: has no validation data; name shards with --data")
        return dict(config.data.validation)
    by_kind: dict[str, list[str]] = {}
    for shard in find_shards(list(shards)):
        by_kind.setdefault(read_index(shard).kind, []).append(str(shard))
    known = SOURCE_KINDS[config.task.kind]
    for kind, paths in by_kind.items():
        if kind not in known:
            raise DataError(
                f"{paths[0]}: is a shard of kind '{kind}', but a run of task '{config.task.kind}' reads "
                f"{', '.join(known)}"
            )
    return {kind: SourceConfig(kind=kind, shards=tuple(paths)) for kind, paths in by_kind.items()}  # type: ignore[arg-type]
