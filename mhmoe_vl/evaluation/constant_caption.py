"""The best single caption for all images: the score that a captioner has without looking."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.caption_scores import (
    CaptionScores,
    TokenizedCaptions,
    TokenizerChoice,
    score_tokenized,
    tokenize_captions,
)
from mhmoe_vl.evaluation.java_metrics import TokensById
from mhmoe_vl.evaluation.ptb_tokenizer import ptb_tokenize

# As in pycocoevalcap.
_MAX_NGRAM = 4
_LENGTH_SIGMA = 6.0

_Ngram = tuple[str, ...]


def best_constant_caption(
    train_captions: Sequence[str],
    references: Mapping[int, Sequence[str]],
    *,
    max_candidates: int = 1000,
    tokenizer: TokenizerChoice = "auto",
) -> tuple[str, CaptionScores]:
    """The training caption with the highest CIDEr when predicted for every image, and its scores.

    At most ``max_candidates`` captions are tried: half of them the most frequent ones (case and final full stop
    aside), the rest evenly spaced over the others. The winner is chosen on ``references``, so this is the strongest
    such baseline, not one that could be submitted.

    Raises:
        DataError: no training caption has a word, no references, or an image without any.
    """
    if not references or not all(references.values()):
        raise DataError("references: every image needs at least one caption, and there must be one image")
    candidates = _candidates(train_captions, max_candidates)
    candidate_tokens = ptb_tokenize(candidates)
    if not any(candidate_tokens):
        raise DataError(f"train_captions: none of {len(train_captions)} captions has a word")
    captions = tokenize_captions(dict.fromkeys(references, ""), references, tokenizer=tokenizer)
    cider = ConstantCider(captions.references)
    best = max(range(len(candidates)), key=lambda index: cider.score(candidate_tokens[index]))
    constant = TokenizedCaptions(
        hypotheses={image_id: [candidate_tokens[best]] for image_id in references},
        references=captions.references,
        tokenizer=captions.tokenizer,
    )
    return candidates[best], score_tokenized(constant, metrics=(), num_images=len(references))


class ConstantCider:
    """CIDEr-D as pycocoevalcap computes it, of one caption for all images.

    The n-gram vectors of the references are made once and stored by n-gram, so that a caption only visits the
    references that share an n-gram with it.
    """

    def __init__(self, references: TokensById) -> None:
        counts = [[_ngram_counts(caption) for caption in group] for group in references.values()]
        document_frequency = Counter(ngram for group in counts for ngram in set().union(*group))
        self._log_num_images = math.log(len(counts))
        self._idf = {n: self._log_num_images - math.log(df) for n, df in document_frequency.items()}
        self._num_images = len(counts)
        flat = [caption for group in counts for caption in group]
        postings: dict[_Ngram, list[tuple[int, float]]] = defaultdict(list)
        norms = np.zeros((len(flat), _MAX_NGRAM))
        for row, caption in enumerate(flat):
            for ngram, count in caption.items():
                weight = count * self._idf[ngram]
                postings[ngram].append((row, weight))
                norms[row, len(ngram) - 1] += weight**2
        self._norms_RN = np.sqrt(norms)
        self._postings = {ngram: _columns(entries) for ngram, entries in postings.items()}
        self._lengths_R = np.array([_length(caption) for caption in flat])
        self._share_R = np.array([1 / len(group) for group in counts for _ in group])

    def score(self, tokens: str) -> float:
        """Mean CIDEr over the images, a fraction."""
        counts = _ngram_counts(tokens)
        overlap_RN = np.zeros_like(self._norms_RN)
        norms_N = np.zeros(_MAX_NGRAM)
        for ngram, count in counts.items():
            order = len(ngram) - 1
            weight = count * self._idf.get(ngram, self._log_num_images)
            norms_N[order] += weight**2
            if ngram in self._postings:
                rows, reference_weights = self._postings[ngram]
                overlap_RN[rows, order] += np.minimum(weight, reference_weights) * reference_weights
        scale_RN = np.sqrt(norms_N) * self._norms_RN
        cosine_R = np.divide(overlap_RN, scale_RN, out=overlap_RN, where=scale_RN != 0).mean(axis=1)
        gap_R = _length(counts) - self._lengths_R
        similarity_R = cosine_R * np.exp(-(gap_R**2) / (2 * _LENGTH_SIGMA**2))
        return float(10 * (similarity_R * self._share_R).sum() / self._num_images)


def _ngram_counts(tokens: str) -> Counter[_Ngram]:
    words = tokens.split()
    return Counter(ngram for order in range(1, _MAX_NGRAM + 1) for ngram in _ngrams(words, order))


def _ngrams(words: Sequence[str], order: int) -> Iterator[_Ngram]:
    return (tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def _length(counts: Counter[_Ngram]) -> int:
    # pycocoevalcap takes the number of bigrams for the length of a caption.
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _columns(entries: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    rows, weights = zip(*entries, strict=True)
    return np.array(rows), np.array(weights)


def _candidates(train_captions: Sequence[str], max_candidates: int) -> list[str]:
    wording: dict[str, str] = {}
    frequency: Counter[str] = Counter()
    for caption in train_captions:
        key = " ".join(caption.lower().split()).rstrip(" .")
        wording.setdefault(key, caption)
        frequency[key] += 1
    ranked = [key for key, _ in frequency.most_common()]
    num_frequent = min(len(ranked), -(-max_candidates // 2))
    others = ranked[num_frequent:]
    step = max(1, -(-len(others) // max(1, max_candidates - num_frequent)))
    return [wording[key] for key in ranked[:num_frequent] + others[::step]]
