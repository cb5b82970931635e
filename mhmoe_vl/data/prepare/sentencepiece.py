"""A unigram model of SentencePiece as a ``tokenizer.json``, with the ids that XLM-RoBERTa gives it: those of BEiT-3.

SentencePiece begins with ``<unk> <s> </s>``; fairseq, and after it XLM-RoBERTa and BEiT-3, begin with
``<s> <pad> </s> <unk>`` and have ``<mask>`` behind the last piece.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mhmoe_vl.data.text import BOS, EOS, MASK, PAD, UNKNOWN
from mhmoe_vl.errors import DataError

_UNIGRAM = 1
_FIRST = [UNKNOWN, BOS, EOS]


def sentencepiece_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a ``.spm`` or ``.model`` file.

    Raises:
        DataError: absent, not of SentencePiece, or not a unigram model that begins with ``<unk> <s> </s>``.
    """
    try:
        model = model_proto().FromString(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if [piece for piece, _ in pieces[: len(_FIRST)]] != _FIRST or model.trainer_spec.model_type != _UNIGRAM:
        raise DataError(f"{path}: not a unigram model of SentencePiece that begins with {' '.join(_FIRST)}")
    first = [(token, 0.0) for token in (BOS, PAD, EOS, UNKNOWN)]
    vocabulary = [*first, *pieces[len(_FIRST) :], (MASK, 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    steps: list[normalizers.Normalizer] = []
    if model.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap))
    if model.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Whole texts are segmented, as SentencePiece does, so that pieces may hold spaces.
            pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
            # A text that spells out <s> must not match the piece of this name.
            pre_tokenizers.Split(Regex("<(?=(s|pad|/s|unk|mask)>)"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens([BOS, PAD, EOS, UNKNOWN, MASK])
    return tokenizer


@cache
def model_proto() -> Any:
    """The message class of such a file, with the fields that matter here (sentencepiece_model.proto)."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mhmoe_vl/sentencepiece.proto", package="mhmoe_vl", syntax="proto2")

    def add(message: str, *fields: tuple[str, int, int, str]) -> None:
        described = file.message_type.add(name=message)
        for name, number, kind, default in fields:
            described.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL, default_value=default)

    add("Piece", ("piece", 1, field.TYPE_STRING, ""), ("score", 2, field.TYPE_FLOAT, "0"))
    add("Trainer", ("model_type", 3, field.TYPE_INT32, str(_UNIGRAM)))
    add(
        "Normalizer",
        ("precompiled_charsmap", 2, field.TYPE_BYTES, ""),
        ("add_dummy_prefix", 3, field.TYPE_BOOL, "true"),
        ("remove_extra_whitespaces", 4, field.TYPE_BOOL, "true"),
    )
    whole = file.message_type.add(name="Model")
    for name, number, label, of in (
        ("pieces", 1, field.LABEL_REPEATED, "Piece"),
        ("trainer_spec", 2, field.LABEL_OPTIONAL, "Trainer"),
        ("normalizer_spec", 3, field.LABEL_OPTIONAL, "Normalizer"),
    ):
        whole.field.add(name=name, number=number, type=field.TYPE_MESSAGE, label=label, type_name=f".mhmoe_vl.{of}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mhmoe_vl.Model"))
