"""All texts of shards and text files, one after the other, for training a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mhmoe_vl.data.decode import captions_of, clean_document, clean_text, decode_json, decode_text
from mhmoe_vl.data.prepare.documents import read_documents
from mhmoe_vl.data.shards import ShardReader, Skip, find_shards, read_index
from mhmoe_vl.errors import DataError


def iterate_texts(paths: Sequence[str], skipped: list[Skip]) -> Iterator[str]:
    """Texts, captions, questions and sentences of shards (folders, ``.tar``), and the lines of other files.

    Args:
        skipped: lines that cannot be used, such as those that are not UTF-8, are added to it.

    Raises:
        DataError: a path is absent, a shard has no index or is damaged, or a folder holds images only.
    """
    for path in paths:
        file = Path(path)
        if file.is_file() and file.suffix != ".tar":
            for record in read_documents([file]):
                if isinstance(record, Skip):
                    skipped.append(record)
                elif record.text:
                    yield record.text
        else:
            yield from _texts_of_shards(find_shards(path))


def sample_by_temperature(paths: Sequence[str], alpha: float, skipped: list[Skip]) -> Iterator[str]:
    """The texts of all ``paths``, repeated so that path i, of n_i texts, has a share in proportion to ``n_i ** alpha``
    (XLM, arXiv 1901.07291, section 3.1): those of the largest come once, those of the others evenly more often.

    Counting words of repeated texts is the same as weighting them, and nothing of a large source is thrown away.

    Args:
        alpha: 1 repeats nothing, 0 gives all paths the same share.

    Raises:
        DataError: as :func:`iterate_texts`, or a path without texts.
    """
    if alpha == 1:
        yield from iterate_texts(paths, skipped)
        return
    sizes = [sum(1 for _ in iterate_texts([path], [])) for path in paths]
    if 0 in sizes:
        raise DataError(f"{paths[sizes.index(0)]}: has no texts")
    for path, size in zip(paths, sizes, strict=True):
        num_copies = (max(sizes) / size) ** (1 - alpha)
        for number, text in enumerate(iterate_texts([path], skipped)):
            for _ in range(int((number + 1) * num_copies) - int(number * num_copies)):
                yield text


def _texts_of_shards(shards: Sequence[Path]) -> Iterator[str]:
    reader = ShardReader()
    for shard in shards:
        index = read_index(shard)
        if index.kind in ("image", "class"):
            raise DataError(f"{shard}: holds images without text")
        for sample in index.samples:
            yield from _texts_of(index.kind, reader.read(index, sample))


def _texts_of(kind: str, members: Mapping[str, bytes]) -> list[str]:
    if kind == "pair":
        return captions_of(members)
    if kind == "text":
        # With its line breaks, which language modeling predicts.
        return [clean_document(decode_text(members["txt"]))]
    fields = decode_json(members["json"])
    if kind == "vqa":
        return [clean_text(question["question"]) for question in fields["questions"]]
    return [clean_text(example["sentence"]) for example in fields["examples"]]
