"""Batches by a plan, decoded in worker processes: from indexed shards by random access, from streams in their order.

For indexed shards the loader adds no state to the plan: a worker is handed the references of a whole micro-batch, so
the number of workers changes nothing but speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mhmoe_vl.data.batch import Batch, Example, collate
from mhmoe_vl.data.mixing import Mixing
from mhmoe_vl.data.plan import MixturePlan, SampleRef, stable_hash
from mhmoe_vl.data.samples import SampleBuilder
from mhmoe_vl.data.shards import IndexedSample, ShardIndex, ShardReader, find_shards, read_index
from mhmoe_vl.data.stream import SampleStream, StreamSource
from mhmoe_vl.errors import DataError

#: Neighbours to try in place of a broken sample before giving up.
_MAX_REPLACEMENTS = 16

MicroBatch = dict[str, Batch]


class Source:
    """All items of a set of indexed shards, by number.

    Args:
        name: of the source in the configuration.
        paths: directories, files, globs or brace patterns.
        builder: makes the examples.
        mixing: mixes every image with another of the source.
    """

    def __init__(
        self, name: str, paths: Sequence[str | Path], builder: SampleBuilder, mixing: Mixing | None = None
    ) -> None:
        self.name, self.builder, self.mixing = name, builder, mixing
        self.shards = [read_index(shard) for shard in find_shards([str(path) for path in paths])]
        wanted = " or ".join(f"'{kind}'" for kind in builder.shard_kinds)
        for shard in self.shards:
            if shard.kind not in builder.shard_kinds:
                raise DataError(f"{shard.path}: is a shard of kind '{shard.kind}', but source '{name}' needs {wanted}")
        self._sample_ends = [
            np.cumsum([builder.num_items(sample) for sample in shard.samples], dtype=np.int64) for shard in self.shards
        ]
        self._shard_ends = np.cumsum([ends[-1] if len(ends) else 0 for ends in self._sample_ends])

    def __len__(self) -> int:
        return int(self._shard_ends[-1])

    def locate(self, item: int) -> tuple[ShardIndex, IndexedSample, int]:
        """Shard, sample, and the number of the item within the sample."""
        shard = int(np.searchsorted(self._shard_ends, item, side="right"))
        within = item - (int(self._shard_ends[shard - 1]) if shard else 0)
        ends = self._sample_ends[shard]
        sample = int(np.searchsorted(ends, within, side="right"))
        return self.shards[shard], self.shards[shard].samples[sample], within - (int(ends[sample - 1]) if sample else 0)


class ShardDataset(Dataset[MicroBatch]):
    """Maps the references of a micro-batch to its batches, one per source.

    Args:
        seed: with the epoch and the sample's own name, seeds all randomness of a sample.
        pad_id: of the text tokenizer.
    """

    def __init__(self, sources: Mapping[str, Source | StreamSource], *, seed: int, pad_id: int) -> None:
        self.sources, self.seed, self.pad_id = dict(sources), seed, pad_id
        self.reader = ShardReader()
        self._templates: dict[str, Example] = {}
        self._streams: dict[str, SampleStream] = {}

    def num_items(self) -> dict[str, int | None]:
        """Size of every source; None for a stream."""
        return {name: len(source) if isinstance(source, Source) else None for name, source in self.sources.items()}

    def __getitem__(self, refs: Mapping[str, Sequence[SampleRef]]) -> MicroBatch:
        return {name: self.batch(name, of_source) for name, of_source in refs.items()}

    def indexed(self, name: str) -> Source:
        """A source whose items have places and an end."""
        source = self.sources[name]
        assert isinstance(source, Source), f"{name} is a stream"
        return source

    def batch(self, source: str, refs: Sequence[SampleRef]) -> Batch:
        problems: list[str] = []
        examples = [self._example_or_neighbour(ref, problems) for ref in refs]
        template = examples[0] if examples else self._template(source)
        return collate(examples, template, pad_id=self.pad_id, problems=problems)

    def _template(self, source: str) -> Example:
        if source not in self._templates:
            self._templates[source] = self._example_or_neighbour(SampleRef(source, 0, 0), [])
        return self._templates[source]

    def _example_or_neighbour(self, ref: SampleRef, problems: list[str]) -> Example:
        """The example, or the next good one: every rank and every run replaces a broken sample by the same one."""
        source = self.sources[ref.source]
        num_attempts = min(_MAX_REPLACEMENTS, len(source)) if isinstance(source, Source) else _MAX_REPLACEMENTS
        for attempt in range(num_attempts):
            try:
                if isinstance(source, StreamSource):
                    return self._next_example(source, ref)
                return self._example(source, ref._replace(item=(ref.item + attempt) % len(source)))
            except DataError as error:
                problems.append(str(error))
        raise DataError(f"{num_attempts} samples in a row are broken; the last: {problems[-1]}")

    def _next_example(self, source: StreamSource, ref: SampleRef) -> Example:
        """The stream's next, whatever the number; the number that a stream starts with makes it differ from others."""
        if ref.source not in self._streams:
            self._streams[ref.source] = source.open(f"{self.seed}/{ref.item}")
        sample = next(self._streams[ref.source])
        seed = stable_hash(f"{self.seed}/{ref.source}/{ref.item}/{sample.key}")
        try:
            return source.builder(sample.members, 0, key=sample.key, seed=seed)
        except DataError as error:
            raise DataError(f"{sample.url}: {sample.key}: {error}") from None

    def _example(self, source: Source, ref: SampleRef) -> Example:
        example = self._single_example(source, ref)
        if source.mixing is None:
            return example
        rng = np.random.default_rng(stable_hash(f"{example.seed}/mixing"))
        partner = ref._replace(item=int(rng.integers(len(source))))
        return source.mixing(example, self._single_example(source, partner, of=f"/{example.seed}"), rng)

    def _single_example(self, source: Source, ref: SampleRef, *, of: str = "") -> Example:
        """The example as it is; ``of`` whom it is the partner, for another view of it."""
        shard, sample, item = source.locate(ref.item)
        seed = stable_hash(f"{self.seed}/{ref.source}/{ref.epoch}/{sample.key}/{item}{of}")
        members = self.reader.read(shard, sample)
        try:
            return source.builder(members, item, key=sample.key, seed=seed, epoch=ref.epoch)
        except DataError as error:
            raise DataError(f"{shard.path}: {sample.key}: {error}") from None


def train_loader(
    dataset: ShardDataset,
    plan: MixturePlan,
    *,
    steps: range,
    num_micro_batches: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[MicroBatch]:
    """Micro-batches of ``steps``, in order; ``num_micro_batches`` of them make one step."""
    requests: Iterable[Any] = [] if not steps else _Requests(plan, steps, num_micro_batches, rank, world_size)
    return _loader(dataset, requests, num_workers=num_workers, pin_memory=pin_memory)


def evaluation_loader(
    dataset: ShardDataset, source: str, *, batch_size: int, rank: int, world_size: int, num_workers: int
) -> Iterator[MicroBatch]:
    """Every item of ``source`` exactly once over all ranks; every rank gets the same number of batches.

    Args:
        batch_size: samples per rank; the last batches may be smaller or empty.
    """
    size = len(dataset.indexed(source))
    requests = []
    for start in range(0, size, batch_size * world_size):
        items = range(size)[
            start + rank * batch_size : min(start + (rank + 1) * batch_size, start + batch_size * world_size)
        ]
        requests.append({source: [SampleRef(source, 0, item) for item in items]})
    return _loader(dataset, requests, num_workers=num_workers, pin_memory=False)


class _Requests:
    """Sampler that yields the references of each micro-batch."""

    def __init__(self, plan: MixturePlan, steps: range, num_micro_batches: int, rank: int, world_size: int) -> None:
        self.plan, self.steps, self.num_micro_batches = plan, steps, num_micro_batches
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps) * self.num_micro_batches

    def __iter__(self) -> Iterator[dict[str, list[SampleRef]]]:
        for step in self.steps:
            for index in range(self.num_micro_batches):
                yield self.plan.micro_batch(
                    step,
                    index=index,
                    num_micro_batches=self.num_micro_batches,
                    rank=self.rank,
                    world_size=self.world_size,
                )


class _ErrorsAsItems(Dataset[MicroBatch | DataError]):
    """Hands over a user error as an item: raised in a worker, it would arrive as a traceback of many lines."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, refs: Mapping[str, Sequence[SampleRef]]) -> MicroBatch | DataError:
        try:
            return self.dataset[refs]
        except DataError as error:
            return error


def _loader(
    dataset: ShardDataset, requests: Iterable[Any], *, num_workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    loader: DataLoader[MicroBatch | DataError] = DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def _identity(batch: Any) -> Any:
    return batch
