"""Pass held-out samples through a trained encoder, unmasked, and gather what its routers decide.

Sums and histograms only: memory does not grow with the number of samples, but for one number per different word.

Shape suffixes: B samples, L tokens of a sample (or of a packed row), T tokens, H sub-tokens, K choices, P patches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mhmoe_vl.analysis.divergence import Divergence, DivergenceFigures, distinct_experts, is_constant
from mhmoe_vl.analysis.fluctuation import Fluctuation
from mhmoe_vl.analysis.patches import PatchSums
from mhmoe_vl.analysis.representation import ExpertScatter
from mhmoe_vl.analysis.result import Affinity, ExpertAnalysis, PoolUse, SubTokenDivergence
from mhmoe_vl.analysis.word_sums import WordSums
from mhmoe_vl.analysis.words import WordSplitter
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.plan import SampleRef, permuted
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.encoder import EncoderOutput, MultiwayEncoder
from mhmoe_vl.models.feed_forward import LayerRouting, pool_of
from mhmoe_vl.moe import MoE, MultiHeadMoE, Routing, RoutingStats, routing_stats, share_active
from mhmoe_vl.moe.stats import ACTIVATION_CURVE
from mhmoe_vl.tasks.captioning import CaptioningConfig
from mhmoe_vl.tasks.language_modeling import LanguageModelingConfig
from mhmoe_vl.tasks.retrieval import RetrievalConfig
from mhmoe_vl.train.build import build_dataset
from mhmoe_vl.train.config import RunConfig, SourceConfig
from mhmoe_vl.train.metrics import ProgressBar
from mhmoe_vl.train.trained import TrainedRun

ValueT = TypeVar("ValueT")


def analyse_experts(
    trained: TrainedRun,
    sources: Mapping[str, SourceConfig],
    *,
    num_samples: int,
    against: MultiwayEncoder | None = None,
    against_name: str | None = None,
    num_pictures: int = 8,
    batch_size: int = 32,
    show_progress: bool = False,
) -> ExpertAnalysis:
    """Measure the experts of ``trained``.

    Args:
        sources: shards to take samples from, as in ``data.validation`` of a run.
        num_samples: of each source, the first in an order that a hash decides.
        against: an encoder of the same shape, for the routing fluctuation.
        against_name: where it came from.
        num_pictures: images to keep with the distinct experts of their patches.
        show_progress: a bar on a terminal, plain lines elsewhere.

    Raises:
        ConfigError: the model is dense.
        DataError: shards that are missing, damaged or of another kind.
    """
    config = trained.config
    require_experts(config)
    dataset = build_dataset(_unmasked(config), dict(sources), training=False)
    gathered = _Gathered(trained, num_pictures)
    orders = {name: _first_items(len(dataset.indexed(name)), num_samples) for name in dataset.sources}
    total, num_done = sum(map(len, orders.values())), 0
    if total == 0:
        raise DataError(f"no samples in {', '.join(path for source in sources.values() for path in source.paths)}")
    with gathered.watching(), ProgressBar("expert analysis", total, enabled=show_progress) as bar:
        for name, items in orders.items():
            for some in _chunks(items, batch_size):
                refs = [SampleRef(name, 0, item) for item in some]
                batch = _with_both_images(dataset.batch(name, refs).to(trained.world.device))
                encoded = _encode(config, trained.task.encoder, batch)
                gathered.add(batch, encoded)
                if against is not None:
                    gathered.compare(encoded, _encode(config, against, batch))
                num_done += len(some)
                bar.update(num_done)
                if num_done * 10 // total > (num_done - len(some)) * 10 // total:
                    bar.show(num_done, "samples")
    return gathered.result({name: len(items) for name, items in orders.items()}, against_name)


def require_experts(config: RunConfig) -> None:
    """Raises:
    ConfigError: there are no experts.
    """
    if config.model.ffn == "dense":
        raise ConfigError(
            f"{config.out}: model.ffn is 'dense', so there are no experts to look at; give a run of another kind, such "
            "as smoe, xmoe or mhmoe"
        )


def _unmasked(config: RunConfig) -> RunConfig:
    """The same run with nothing hidden from the model."""
    nothing = {"image_mask_ratio": 0.0, "text_mask_ratio": 0.0, "pair_text_mask_ratio": 0.0}
    changes: dict[str, Any] = {"data": config.data.model_copy(update=nothing)}
    if isinstance(config.task, CaptioningConfig):
        changes["task"] = config.task.model_copy(update={"mask_ratio": 0.0})
    return config.model_copy(update=changes)


def _first_items(size: int, num: int) -> list[int]:
    """The first ``num`` of ``size`` in an order that a hash decides: nobody has picked them."""
    return [permuted(position, size, "analysis") for position in range(min(size, num))]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    position = iter(items)
    while chunk := list(islice(position, size)):
        yield chunk


def _with_both_images(batch: Batch) -> Batch:
    """Of image pairs, each image with the text on its own, as the NLVR2 task encodes them."""
    if batch.right_image is None:
        return batch
    assert batch.image is not None
    assert batch.text_ids is not None
    assert batch.text_valid is not None
    return Batch(
        sample_ids=batch.sample_ids * 2,
        seed=torch.cat([batch.seed] * 2),
        image=torch.cat([batch.image, batch.right_image]),
        text_ids=torch.cat([batch.text_ids] * 2),
        text_valid=torch.cat([batch.text_valid] * 2),
    )


@torch.no_grad()
def _encode(config: RunConfig, encoder: MultiwayEncoder, batch: Batch) -> EncoderOutput:
    """As the run's own task does it, but with the whole image and text, in float32, without stochastic depth."""
    if isinstance(config.task, RetrievalConfig):
        of_image, of_text = encoder(batch.image), encoder(None, batch.text_ids, text_valid=batch.text_valid)
        return EncoderOutput(of_image.vision, of_text.text, of_image.routings + of_text.routings, [])
    causal = isinstance(config.task, CaptioningConfig | LanguageModelingConfig)
    return encoder(
        batch.image,
        batch.text_ids,
        text_valid=batch.text_valid,
        text_positions=batch.text_positions,
        pattern="captioning" if causal else "full",
        blind=getattr(config.task, "blind", False),
    )


class _Gathered:
    """Everything that is summed over batches."""

    def __init__(self, trained: TrainedRun, num_pictures: int) -> None:
        self.config, self.encoder = trained.config, trained.task.encoder
        self.stats: dict[str, RoutingStats] = {}
        self.scatters: dict[str, ExpertScatter] = {}
        self.fluctuations: dict[str, Fluctuation] = defaultdict(Fluctuation)
        self.divergences: dict[str, Divergence] = {}
        self.num_tokens: dict[str, int] = defaultdict(int)
        self.words = WordSums(WordSplitter(trained.tokenizer))
        self.patches = PatchSums(self.config.model.patch_size, num_pictures)
        self._shape: Routing | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, the input of every router is added to the scatter of its pool."""
        handles = []
        for layer, block in enumerate(self.encoder.blocks):
            for pool, ffn in block.ffn.pools.items():
                moe = ffn.moe if isinstance(ffn, MultiHeadMoE) else ffn
                if isinstance(moe, MoE):
                    handles.append(moe.register_forward_hook(self._scatter_of(f"block{layer}/{pool}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _scatter_of(self, pool: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def add(module: nn.Module, given: tuple[Any, ...], result: tuple[Tensor, Routing]) -> None:
            x_ND, routing = given[0].flatten(0, -2), result[1]
            experts_N = routing.experts_NK[:, 0]
            if routing.valid_N is not None:
                x_ND, experts_N = x_ND[routing.valid_N], experts_N[routing.valid_N]
            if pool not in self.scatters:
                self.scatters[pool] = ExpertScatter(routing.num_experts, x_ND.shape[1], routing.num_pools)
            self.scatters[pool].add(x_ND, experts_N)

        return add

    def add(self, batch: Batch, encoded: EncoderOutput) -> None:
        """One batch and its routing."""
        distinct: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}}
        for item, modality, routing in _parts(encoded.routings):
            name = item.name_of(modality)
            stats = routing_stats(routing)
            self.stats[name] = self.stats[name] + stats if name in self.stats else stats
            self._shape = routing
            if is_constant(num_heads=routing.num_heads, num_pools=routing.num_pools):
                continue
            experts_THK = routing.experts_NK.unflatten(0, (-1, routing.num_heads))
            distinct_T = distinct_experts(experts_THK)
            if name not in self.divergences:
                self.divergences[name] = Divergence(
                    num_experts=routing.num_experts, num_heads=routing.num_heads, top_k=routing.top_k
                )
            valid_N = routing.valid_N
            self.divergences[name].add(
                distinct_T if valid_N is None else distinct_T[valid_N.view(-1, routing.num_heads)[:, 0]]
            )
            num_rows = (batch.text_ids if modality == "text" else batch.image).shape[0]  # type: ignore[union-attr]
            distinct[modality][name] = distinct_T.view(num_rows, -1).cpu()
        self.num_tokens["vision"] += encoded.vision.shape[:2].numel()
        if batch.text_ids is not None:
            valid_BL = batch.text_valid
            self.num_tokens["text"] += batch.text_ids.numel() if valid_BL is None else int(valid_BL.sum())
        if distinct["text"]:
            self.words.add(batch, distinct["text"])
        if distinct["vision"]:
            self.patches.add(batch, distinct["vision"])

    def compare(self, encoded: EncoderOutput, other: EncoderOutput) -> None:
        """The same batch, encoded by the model and by another one."""
        for (item, modality, routing), (_, _, of_other) in zip(
            _parts(encoded.routings), _parts(other.routings), strict=True
        ):
            self.fluctuations[item.name_of(modality)].add(routing, of_other)

    def result(self, num_samples: dict[str, int], against: str | None) -> ExpertAnalysis:
        """The figures of all batches."""
        shape = self._shape
        assert shape is not None, "no tokens were routed"
        pools = _pool_uses(self.stats)
        collapse = {pool: found for pool, scatter in self.scatters.items() if (found := scatter.collapse()) is not None}
        fluctuation = {
            name: figures for name, sums in _by_block(self.fluctuations) if (figures := sums.figures()) is not None
        }
        constant = is_constant(num_heads=shape.num_heads, num_pools=shape.num_pools)
        return ExpertAnalysis(
            run=self.config.out,
            against=against,
            ffn=self.config.model.ffn,
            num_experts=shape.num_experts,
            num_heads=shape.num_heads,
            top_k=shape.top_k,
            num_samples=num_samples,
            num_tokens={modality: count for modality, count in self.num_tokens.items() if count},
            thresholds=list(ACTIVATION_CURVE),
            pools=pools,
            affinity=_affinities(self.stats),
            collapse=collapse,
            fluctuation=fluctuation if against is not None else None,
            divergence=None if constant else self._divergence(shape),
            no_divergence=_why_constant(shape) if constant else None,
        )

    def _divergence(self, shape: Routing) -> SubTokenDivergence:
        by_pool: dict[str, DivergenceFigures] = {}
        for name, sums in _by_block(self.divergences):
            figures = sums.figures(self.stats[name].load_share_E.cpu())
            if figures is not None:
                by_pool[name] = figures
        most, least = self.words.extremes()
        return SubTokenDivergence(
            smallest=shape.top_k,
            largest=min(shape.num_experts, shape.num_heads * shape.top_k),
            by_pool=by_pool,
            classes=self.words.classes(),
            min_word_count=self.words.min_count,
            most=most,
            least=least,
            patches=self.patches.figures(),
            pictures=self.patches.pictures,
        )


def _parts(routings: list[LayerRouting]) -> Iterator[tuple[LayerRouting, str, Routing]]:
    """Routings by modality, without those of no rows."""
    for item in routings:
        for modality, routing in item.by_modality().items():
            if routing.experts_NK.shape[0]:
                yield item, modality, routing


def _pool_uses(stats: Mapping[str, RoutingStats]) -> list[PoolUse]:
    uses = []
    for pool, parts in _by_pool(stats).items():
        whole, *more = parts.values()
        for part in more:
            whole = whole + part
        uses.append(_pool_use(pool, whole))
        if len(parts) > 1:
            uses += [_pool_use(name, part, is_part=True) for name, part in parts.items()]
    return uses


def _pool_use(name: str, stats: RoutingStats, *, is_part: bool = False) -> PoolUse:
    return PoolUse(
        pool=name,
        is_part=is_part,
        num_rows=int(stats.num_rows),
        load=(stats.load_E.double() / stats.load_E.sum().clamp_min(1)).tolist(),
        entropy=stats.load_entropy,
        max_violation=stats.max_violation,
        overload=stats.overload,
        num_dead=stats.num_dead,
        gate_entropy=stats.gate_entropy,
        alarms=[] if is_part else list(stats.alarms),
        activation=share_active(stats.load_E, ACTIVATION_CURVE),
    )


def _affinities(stats: Mapping[str, RoutingStats]) -> list[Affinity]:
    affinities = []
    for pool, parts in _by_pool(stats).items():
        vision, text = parts.get(f"{pool}/vision"), parts.get(f"{pool}/text")
        if vision is None or text is None:
            continue
        total_E = (vision.load_E + text.load_E).double()
        shares = (vision.load_E / total_E.clamp_min(1)).tolist()
        affinities.append(
            Affinity(
                pool=pool,
                vision_share=[share if total else None for share, total in zip(shares, total_E.tolist(), strict=True)],
                mean=float(vision.load_E.sum() / total_E.sum()),
            )
        )
    return affinities


def _by_pool(stats: Mapping[str, RoutingStats]) -> dict[str, dict[str, RoutingStats]]:
    """Layer after layer; a pool of one modality is its own only part."""
    pools: dict[str, dict[str, RoutingStats]] = {}
    for name, of_name in _by_block(stats):
        pools.setdefault(pool_of(name), {})[name] = of_name
    return pools


def _by_block(values: Mapping[str, ValueT]) -> list[tuple[str, ValueT]]:
    """In the order of the blocks: the first source may lack a modality."""
    return sorted(values.items(), key=lambda item: int(item[0].split("/")[0].removeprefix("block")))


def _why_constant(shape: Routing) -> str:
    if shape.num_pools > 1:
        return (
            f"Each head has experts of its own, so every token has {shape.num_heads * shape.top_k} distinct experts in "
            "every layer: there is nothing to measure."
        )
    experts = "1 distinct expert" if shape.top_k == 1 else f"{shape.top_k} distinct experts"
    return (
        f"A token is routed as a whole and makes {shape.top_k} choice{'s' if shape.top_k > 1 else ''}, so every token "
        f"has {experts} in every layer: there is nothing to measure."
    )
