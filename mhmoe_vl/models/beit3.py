"""The released BEiT-3 checkpoints (unilm/beit3, an encoder of torchscale): their names and shapes, to and from ours.

Branch A of every module there is our ``vision``, branch B our ``text``. What differs is the cut: queries, keys and
values are three matrices there and one here; position tables there begin with two rows that nothing reads, because
fairseq counts from 2. These rows are all that our models have no place for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mhmoe_vl.errors import CheckpointError, suggest
from mhmoe_vl.models.config import MODALITIES, ModelConfig
from mhmoe_vl.models.encoder import MultiwayEncoder

#: Positions there count from here on.
NUM_UNREAD_ROWS = 2
#: Of attention, in every released size; tensors do not tell.
_HEAD_WIDTH = 64

_SIZES = {(768, 12, 16): "base", (1024, 24, 16): "large", (1408, 40, 14): "giant"}
_BRANCHES = {"vision": "A", "text": "B"}
_POSITIONS = "beit3.encoder.embed_positions.{}.weight"
_PATCHES = "beit3.vision_embed.proj.weight"

#: Part of our tensor that a released tensor is.
Part = Literal["whole", "query", "key", "value", "positions", "scalar"]


class Place(NamedTuple):
    """Where a released tensor is among our tensors, and its released shape."""

    name: str
    part: Part
    shape: tuple[int, ...]


class _Head(NamedTuple):
    """A layer of a head; ``shape`` of its weight from dim, vocabulary, visual codes, and number of outputs."""

    released: str
    ours: str
    shape: Callable[[int, int, int, int], tuple[int, ...]]
    has_bias: bool = True


_MLM_HEAD = _Head("mlm_head", "mlm_head.linear", lambda d, v, c, n: (v, d))
#: Heads by task, named as our tasks are. Of two that fit a file, the first is meant.
_HEADS = {
    "pretrain": (_MLM_HEAD, _Head("mim_head", "mim_head.linear", lambda d, v, c, n: (c, d))),
    "captioning": (_MLM_HEAD,),
    "vqa": (
        _Head("pooler.norm", "vqa_head.pooler.0", lambda d, v, c, n: (d,)),
        _Head("pooler.dense", "vqa_head.pooler.1", lambda d, v, c, n: (d, d)),
        _Head("head.0", "vqa_head.classifier.0", lambda d, v, c, n: (2 * d, d)),
        _Head("head.1", "vqa_head.classifier.1", lambda d, v, c, n: (2 * d,)),
        _Head("head.3", "vqa_head.classifier.3", lambda d, v, c, n: (n, 2 * d)),
    ),
    "nlvr2": (
        _Head("head.norm1", "nlvr2_head.norm", lambda d, v, c, n: (4 * d,)),
        _Head("head.dense1", "nlvr2_head.classifier.0", lambda d, v, c, n: (2 * d, 4 * d)),
        _Head("head.norm2", "nlvr2_head.classifier.1", lambda d, v, c, n: (2 * d,)),
        _Head("head.dense2", "nlvr2_head.classifier.3", lambda d, v, c, n: (2, 2 * d)),
    ),
    "retrieval": (
        _Head("vision_head", "vision_head.linear", lambda d, v, c, n: (d, d), has_bias=False),
        _Head("language_head", "text_head.linear", lambda d, v, c, n: (d, d), has_bias=False),
    ),
    "classification": (
        _Head("fc_norm", "classification_head.norm", lambda d, v, c, n: (d,)),
        _Head("head", "classification_head.linear", lambda d, v, c, n: (n, d)),
    ),
    "encoder": (),
}
#: Whose last layer has as many outputs as there are answers or classes.
_OUTPUT_LAYERS = {"vqa": "head.3.weight", "classification": "head.weight"}


@dataclass(frozen=True)
class ReleasedModel:
    """What a released checkpoint is of.

    Attributes:
        kind: the task, named as ours are; ``encoder`` if there are no heads.
        model: the same architecture in our words.
        num_outputs: answers of VQA, or classes; 0 for other tasks.
    """

    kind: str
    model: ModelConfig
    num_outputs: int = 0

    @property
    def size(self) -> str:
        """``base``, ``large``, or the numbers."""
        model = self.model
        numbers = f"{model.depth} layers, {model.dim} wide, patches of {model.patch_size} px"
        return _SIZES.get((model.dim, model.depth, model.patch_size), numbers)


def recognize(shapes: Mapping[str, tuple[int, ...]], where: str, *, num_heads: int | None = None) -> ReleasedModel:
    """Architecture and task from the names and shapes of a released checkpoint.

    Args:
        where: names the checkpoint in errors.
        num_heads: of attention; None is one for every 64 values, as in all released sizes.

    Raises:
        CheckpointError: not a BEiT-3 checkpoint.
    """
    dim, _, _, patch_size = _shape(shapes, _PATCHES, 4, where)
    rows, _ = _shape(shapes, _POSITIONS.format("A"), 2, where)
    ffn_dim, _ = _shape(shapes, "beit3.encoder.layers.0.ffn.A.fc1.weight", 2, where)
    side = math.isqrt(max(0, rows - NUM_UNREAD_ROWS - 1))
    if not side or rows != side**2 + 1 + NUM_UNREAD_ROWS:
        raise CheckpointError(
            f"{where}: {_POSITIONS.format('A')} has {rows} rows, which is not 3 and a square number of patches"
        )
    layers = [int(match[1]) for name in shapes if (match := re.match(r"beit3\.encoder\.layers\.(\d+)\.", name))]
    if num_heads is None:
        num_heads, rest = divmod(dim, _HEAD_WIDTH)
        if rest:
            raise CheckpointError(
                f"{where}: {dim} wide, which attention heads of {_HEAD_WIDTH} do not divide as in the released sizes; "
                "say how many there are with --num-heads"
            )
    elif dim % num_heads:
        raise CheckpointError(f"{where}: {dim} wide, which {num_heads} attention heads (--num-heads) do not divide")
    sizes: dict[str, Any] = {
        "dim": dim,
        "depth": max(layers) + 1,
        "num_heads": num_heads,
        "ffn_dim": ffn_dim,
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "modalities": ("vision",),
    }
    if "beit3.text_embed.weight" in shapes:
        text_rows, _ = _shape(shapes, _POSITIONS.format("B"), 2, where)
        sizes |= {"modalities": MODALITIES, "max_text_length": text_rows - NUM_UNREAD_ROWS}
        sizes["vocab_size"], _ = _shape(shapes, "beit3.text_embed.weight", 2, where)
    if "mim_head.weight" in shapes:
        sizes["num_visual_codes"], _ = _shape(shapes, "mim_head.weight", 2, where)
    kind = _kind_of(shapes, lambda head: head.released)
    output_layer = _OUTPUT_LAYERS.get(kind)
    return ReleasedModel(
        kind,
        ModelConfig(
            ffn="dense",
            final_norm="beit3.encoder.layer_norm.A.weight" in shapes,
            # Tensors do not tell; the recipe does.
            image_normalization="imagenet" if kind == "classification" else "half",
            **sizes,
        ),
        num_outputs=_shape(shapes, output_layer, 2, where)[0] if output_layer else 0,
    )


def kind_of_ours(names: Iterable[str]) -> str:
    """The released kind that has the heads of our weights; ``encoder`` if none has."""
    return _kind_of(names, lambda head: head.ours)


def places(released: ReleasedModel) -> dict[str, Place]:
    """Every tensor of such a checkpoint, and where it is among ours.

    Raises:
        ValueError: the released code cannot express the architecture, naming the setting.
    """
    require_expressible(released.model)
    model = released.model
    with torch.device("meta"):
        own = {f"encoder.{name}": tensor for name, tensor in MultiwayEncoder(model).state_dict().items()}
    found = {name: _place(ours, part, own[ours]) for name, ours, part in _encoder_names(model)}
    for head in _HEADS[released.kind]:
        shape = head.shape(model.dim, model.vocab_size, model.num_visual_codes, released.num_outputs)
        found[f"{head.released}.weight"] = Place(f"{head.ours}.weight", "whole", shape)
        if head.has_bias:
            found[f"{head.released}.bias"] = Place(f"{head.ours}.bias", "whole", shape[:1])
    if released.kind == "retrieval":
        found["logit_scale"] = Place("logit_scale", "scalar", ())
    return found


def require_expressible(model: ModelConfig) -> None:
    """Refuse what the released code has no word for.

    Raises:
        ValueError: naming the setting.
    """
    for name, needed in (
        ("ffn", "dense"),
        ("glu", False),
        ("sub_ln", True),
        ("shared_attention", False),
        ("vl_ffn_layers", 0),
        ("positions", "learned"),
    ):
        if getattr(model, name) != needed:
            raise ValueError(f"model.{name}: {getattr(model, name)}, and released BEiT-3 has {needed}")
    if "vision" not in model.modalities:
        raise ValueError("model.modalities: ['text'], and released BEiT-3 has a vision branch")


def from_released(
    tensors: Mapping[str, Tensor], released: ReleasedModel, where: str, *, keep_unknown: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our weights, and what they have no place for, under its released name.

    Args:
        tensors: a released state dict.
        released: from :func:`recognize`.
        keep_unknown: tensors of unknown names are returned too instead of refused.

    Raises:
        CheckpointError: unknown or missing names, or wrong shapes, naming the first.
    """
    known = places(released)
    unknown = [name for name in tensors if name not in known]
    if unknown and not keep_unknown:
        raise CheckpointError(
            f"{where}: {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} not known of a BEiT-3 checkpoint of "
            f"task '{released.kind}'{suggest(unknown[0], list(known))}; --keep-unknown puts aside what is not known"
        )
    missing = [name for name in known if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{where}: lacks {_some(missing)} of a BEiT-3 checkpoint of task '{released.kind}', {released.size}"
        )
    _require_shapes(tensors, known, released, where)
    parts: dict[str, list[Tensor]] = {}
    unread = {name: tensors[name].clone() for name in unknown}
    for name, place in known.items():
        tensor = tensors[name]
        if place.part == "positions":
            unread[name] = tensor[:NUM_UNREAD_ROWS].clone()
            tensor = tensor[NUM_UNREAD_ROWS:][None]
        elif place.part == "scalar":
            tensor = tensor[None]
        parts.setdefault(place.name, []).append(tensor)
    weights = {}
    for ours, (first, *others) in parts.items():
        if not first.is_floating_point() or any(other.dtype != first.dtype for other in others):
            dtypes = " and ".join(dict.fromkeys(str(tensor.dtype) for tensor in (first, *others)))
            raise CheckpointError(f"{where}: what becomes {ours} is {dtypes}; one floating-point type is expected")
        # A copy in any case: tensors that share memory cannot be written.
        weights[ours] = torch.cat([first, *others])
    return weights, unread


def to_released(
    weights: Mapping[str, Tensor], released: ReleasedModel, unread: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """A released state dict; rows that nothing reads are zero unless ``unread`` has them.

    Args:
        weights: of one of our runs.
        unread: from :func:`from_released`.

    Raises:
        CheckpointError: weights are missing, left over, or of another shape.
    """
    known = places(released)
    wanted = {place.name for place in known.values()}
    for names, what in ((wanted - weights.keys(), "lacks"), (weights.keys() - wanted, "has")):
        if names:
            raise CheckpointError(
                f"{where}: {what} {_some(sorted(names))}, unlike a BEiT-3 checkpoint of task '{released.kind}'"
            )
    tensors: dict[str, Tensor] = {}
    for name, place in known.items():
        tensor = weights[place.name]
        if place.part == "positions":
            rows = unread.get(name, tensor.new_zeros(NUM_UNREAD_ROWS, tensor.shape[-1]))
            tensor = torch.cat([rows.to(tensor.dtype), tensor[0]])
        elif place.part == "scalar":
            tensor = tensor[0]
        elif place.part != "whole":
            tensor = tensor.chunk(3)[("query", "key", "value").index(place.part)]
        # A copy: of a slice torch.save would write the whole.
        tensors[name] = tensor.clone()
    _require_shapes(tensors, known, released, where)
    return tensors | {name: tensor for name, tensor in unread.items() if name not in known}


def _encoder_names(model: ModelConfig) -> Iterator[tuple[str, str, Part]]:
    """Released name, our name, and which part of ours it is."""
    if "text" in model.modalities:
        yield "beit3.text_embed.weight", "encoder.text_embedding.tokens.weight", "whole"
    for released, ours in (
        ("mask_token", "mask_token"),
        ("cls_token", "class_token"),
        ("proj.weight", "patches.weight"),
        ("proj.bias", "patches.bias"),
    ):
        yield f"beit3.vision_embed.{released}", f"encoder.vision_embedding.{ours}", "whole"
    for modality in model.modalities:
        yield _POSITIONS.format(_BRANCHES[modality]), f"encoder.{modality}_embedding.positions", "positions"
    attention: tuple[tuple[str, str, Part], ...] = (
        # In the order in which our matrix has them.
        ("q_proj", "qkv", "query"),
        ("k_proj", "qkv", "key"),
        ("v_proj", "qkv", "value"),
        ("out_proj", "out", "whole"),
        ("inner_attn_ln", "norm", "whole"),
    )
    for layer in range(model.depth):
        there, here = f"beit3.encoder.layers.{layer}", f"encoder.blocks.{layer}"
        for modality in model.modalities:
            branch = _BRANCHES[modality]
            for kind in ("weight", "bias"):
                for released, ours, part in attention:
                    name = f"{there}.self_attn.{released}.{branch}.{kind}"
                    yield name, f"{here}.attention.{ours}.{modality}.{kind}", part
                for released, ours in (("self_attn_layer_norm", "attention_norm"), ("final_layer_norm", "ffn_norm")):
                    yield f"{there}.{released}.{branch}.{kind}", f"{here}.{ours}.{modality}.{kind}", "whole"
                for released, ours in (("fc1", "w1"), ("fc2", "w2"), ("ffn_layernorm", "norm")):
                    yield (
                        f"{there}.ffn.{branch}.{released}.{kind}",
                        f"{here}.ffn.pools.{modality}.{ours}.{kind}",
                        "whole",
                    )
    if model.final_norm:
        for modality in model.modalities:
            for kind in ("weight", "bias"):
                yield (
                    f"beit3.encoder.layer_norm.{_BRANCHES[modality]}.{kind}",
                    f"encoder.norm.{modality}.{kind}",
                    "whole",
                )


def _place(name: str, part: Part, tensor: Tensor) -> Place:
    shape = tuple(tensor.shape)
    if part in ("query", "key", "value"):
        shape = (shape[0] // 3, *shape[1:])
    elif part == "positions":
        shape = (shape[1] + NUM_UNREAD_ROWS, shape[2])
    return Place(name, part, shape)


def _kind_of(names: Iterable[str], name_of: Callable[[_Head], str]) -> str:
    """The first task whose last layer is there."""
    present = set(names)
    return next(kind for kind, heads in _HEADS.items() if not heads or f"{name_of(heads[-1])}.weight" in present)


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, num_dims: int, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(
            f"{where}: not a released BEiT-3 checkpoint: it lacks {name}{suggest(name, list(shapes))}"
        )
    if len(shapes[name]) != num_dims:
        raise CheckpointError(f"{where}: {name} has shape {list(shapes[name])}, and {num_dims} dimensions are expected")
    return tuple(shapes[name])


def _require_shapes(
    tensors: Mapping[str, Tensor], known: Mapping[str, Place], released: ReleasedModel, where: str
) -> None:
    wrong = [name for name, place in known.items() if tuple(tensors[name].shape) != place.shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} has shape {list(tensors[name].shape)}, and {list(known[name].shape)} is expected of "
            f"BEiT-3 {released.size}" + (f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else "")
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
