"""What can be said and asked about scenes: captions, balanced questions, statements about two images, plain text.

Nothing here can be guessed from the text. Each question is asked equally often with each of its answers (the aim of
VQAv2: Goyal et al., 2017, arXiv:1612.00837), and each statement comes with four image pairs, true of two and false of
two (as in NLVR2: Suhr et al., 2019, arXiv:1811.00491).
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, permutations, product
from typing import NamedTuple

from mhmoe_vl.data.prepare.scenes import COLORS, GRID_SIZE, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject
from mhmoe_vl.errors import DataError

NUM_CAPTIONS = 5
NUM_ANNOTATORS = 10
PAIRS_PER_STATEMENT = 4

_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_DISSENT_RATE = 0.15
_MAX_ATTEMPTS = 200


class Noun(NamedTuple):
    """A noun phrase: ``small red circle``, ``red object``, ``circle`` ..., an empty field fits every object."""

    size: str = ""
    color: str = ""
    shape: str = ""

    def __str__(self) -> str:
        return _in_words(self)

    @property
    def plural(self) -> str:
        return f"{self}{'es' if self.shape == 'cross' else 's'}"

    def counted(self, number: int) -> str:
        return f"a {self}" if number == 1 else f"{_NUMBER_WORDS[number]} {self.plural}"


@cache  # there are few, and each is said a million times
def _in_words(noun: Noun) -> str:
    return " ".join(word for word in (noun.size, noun.color, noun.shape or "object") if word)


_OBJECT_NOUN = Noun()
_SIZE_NOUNS = [Noun(size=size) for size in SIZES]
_SHAPE_NOUNS = [Noun(shape=shape) for shape in SHAPES]
_COLOR_NOUNS = [Noun(color=color) for color in COLORS]
_FULL_NOUNS = [Noun(color=color, shape=shape) for color, shape in product(COLORS, SHAPES)]


def noun_counts(scene: Scene) -> Counter[Noun]:
    """How many objects of ``scene`` each noun phrase fits; phrases that fit none are absent."""
    return Counter(noun for item in scene.objects for noun in _nouns_of(item))


# Captions and plain text


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions of ``scene``: two lists of its objects, its shapes counted, a relation, and positions."""
    first, last = scene.objects[0], scene.objects[-1]
    num_objects = len(scene.objects)
    listing = _join(Counter(Noun(o.size, o.color, o.shape) for o in scene.objects))
    shapes = _join(Counter(Noun(shape=o.shape) for o in scene.objects))
    shown = rng.choice(("a picture of", "an image of", "this picture shows"))
    opening = "there is one object" if num_objects == 1 else f"there are {_NUMBER_WORDS[num_objects]} objects"
    placed = f"a {_name(first)} at the {_quadrant(first)}"
    if num_objects == 1:
        relation = f"a {_name(first)} stands alone at the {_quadrant(first)}."
        placed += " and nothing else."
    else:
        relation = f"a {_name(first)} is {_main_relation(first, last)} a {_name(last)}."
        placed += f" and a {_name(last)} at the {_quadrant(last)}."
    return [f"{listing}.", f"{opening}: {listing}.", f"{shown} {shapes} on a dark background.", relation, placed]


def text_document(scene: Scene, rng: random.Random) -> str:
    """A few sentences about ``scene`` on one line: captions, then questions of different kinds with their answers."""
    by_kind = defaultdict(list)
    for question in questions_about(scene):
        by_kind[question.kind].append(question)
    asked = [rng.choice(by_kind[kind]) for kind in rng.sample(sorted(by_kind), 3)]
    return " ".join([*rng.sample(captions(scene, rng), 2), *(f"{q.text} {q.answer}." for q in asked)])


def _join(counts: Counter[Noun]) -> str:
    *head, tail = [noun.counted(number) for noun, number in counts.items()]
    return f"{', '.join(head)} and {tail}" if head else tail


def _name(item: SceneObject) -> str:
    return f"{item.size} {item.color} {item.shape}"


def _quadrant(item: SceneObject) -> str:
    vertical = "top" if item.row < GRID_SIZE // 2 else "bottom"
    return f"{vertical} {'left' if item.column < GRID_SIZE // 2 else 'right'}"


def _main_relation(first: SceneObject, second: SceneObject) -> str:
    """Along the axis on which the two are further apart."""
    if abs(first.column - second.column) > abs(first.row - second.row):
        return "left of" if first.column < second.column else "right of"
    return "above" if first.row < second.row else "below"


def _nouns_of(item: SceneObject) -> Iterator[Noun]:
    return (Noun(*words) for words in product(("", item.size), ("", item.color), ("", item.shape)))


# Questions


class Question(NamedTuple):
    """A question of one ``kind`` (a key of :data:`QUESTION_KINDS`) and its true answer for one scene."""

    kind: str
    text: str
    answer: str


class QuestionKind(NamedTuple):
    """``share`` of all questions; ``question_type`` and ``answer_type`` as VQAv2 annotations have them."""

    share: float
    question_type: str
    answer_type: str
    answers: tuple[str, ...]


_YES_NO = ("yes", "no")
# The rarest kinds come first: those that any scene can serve then even out the number of questions an image.
QUESTION_KINDS = {
    "relation": QuestionKind(0.03, "is the", "yes/no", _YES_NO),
    "count": QuestionKind(0.10, "how many", "number", tuple(map(str, range(MAX_OBJECTS + 1)))),
    "color": QuestionKind(0.22, "what color is the", "other", tuple(COLORS)),
    "shape": QuestionKind(0.18, "what shape is the", "other", SHAPES),
    "size": QuestionKind(0.08, "what size is the", "other", SIZES),
    "compare": QuestionKind(0.03, "are there", "yes/no", _YES_NO),
    "exist": QuestionKind(0.26, "is there a", "yes/no", _YES_NO),
    "exist-shape": QuestionKind(0.06, "is there a", "yes/no", _YES_NO),
    "exist-both": QuestionKind(0.04, "is there a", "yes/no", _YES_NO),
}


def questions_about(scene: Scene) -> Iterator[Question]:
    """Every question that has a clear answer in ``scene``: ``the circle`` is asked about only if there is just one."""
    counts = noun_counts(scene)
    for noun in (_OBJECT_NOUN, *_SIZE_NOUNS, *_SHAPE_NOUNS, *_COLOR_NOUNS):
        yield Question("count", f"how many {noun.plural} are there?", str(counts[noun]))
    for kind, nouns in (("exist", _COLOR_NOUNS), ("exist-shape", _SHAPE_NOUNS), ("exist-both", _FULL_NOUNS)):
        for noun in nouns:
            yield Question(kind, f"is there a {noun}?", _yes_no(counts[noun] > 0))
    for one, other in permutations(_SHAPE_NOUNS, 2):
        if counts[one] or counts[other]:
            more = _yes_no(counts[one] > counts[other])
            yield Question("compare", f"are there more {one.plural} than {other.plural}?", more)
    unique = {noun: item for item in scene.objects for noun in _nouns_of(item) if counts[noun] == 1}
    yield from _attribute_questions(unique)
    yield from _relation_questions(unique)


def balanced_questions(scenes: Sequence[Scene], num_questions: int, rng: random.Random) -> list[list[Question]]:
    """About ``num_questions`` questions, listed by scene, spread evenly over the scenes.

    Each text is asked equally often with each answer that it can have in ``scenes``; no scene gets a text twice.
    """
    pool: dict[str, dict[str, dict[str, list[int]]]] = {kind: {} for kind in QUESTION_KINDS}
    for index, scene in enumerate(scenes):
        for kind, text, answer in questions_about(scene):
            pool[kind].setdefault(text, defaultdict(list))[answer].append(index)
    chosen: list[list[Question]] = [[] for _ in scenes]
    for kind, (share, _, _, answers) in QUESTION_KINDS.items():
        texts = sorted(text for text, by_answer in pool[kind].items() if len(by_answer) > 1)
        rng.shuffle(texts)
        budget = num_questions * share
        for position, text in enumerate(texts):
            by_answer = pool[kind][text]
            # Whatever scarce texts leave of the budget goes to the later ones.
            wanted = math.ceil(budget / (len(texts) - position) / len(by_answer)) if budget > 0 else 0
            per_answer = min(wanted, *map(len, by_answer.values()))
            for answer in sorted(by_answer, key=answers.index):
                candidates = rng.sample(by_answer[answer], len(by_answer[answer]))
                for index in heapq.nsmallest(per_answer, candidates, key=lambda i: len(chosen[i])):
                    chosen[index].append(Question(kind, text, answer))
            budget -= per_answer * len(by_answer)
    return chosen


def crowd_answers(question: Question, rng: random.Random) -> list[str]:
    """Ten annotators' answers: mostly unanimous, sometimes with one or two who counted or looked wrongly."""
    choices = QUESTION_KINDS[question.kind].answers
    right = choices.index(question.answer)
    mistakes = [c for i, c in enumerate(choices) if i != right and (question.kind != "count" or abs(i - right) == 1)]
    num_dissenters = rng.choice((1, 1, 2)) if rng.random() < _DISSENT_RATE else 0
    answers = [question.answer] * (NUM_ANNOTATORS - num_dissenters)
    answers += [rng.choice(mistakes) for _ in range(num_dissenters)]
    return rng.sample(answers, NUM_ANNOTATORS)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _attribute_questions(unique: dict[Noun, SceneObject]) -> Iterator[Question]:
    for noun, item in unique.items():
        if noun.shape and not noun.color:
            yield Question("color", f"what color is the {noun}?", item.color)
        if noun.color and not noun.shape:
            yield Question("shape", f"what shape is the {noun}?", item.shape)
        if not noun.size and (noun.color or noun.shape):
            yield Question("size", f"what size is the {noun}?", item.size)


def _relation_questions(unique: dict[Noun, SceneObject]) -> Iterator[Question]:
    """``the circle`` or ``the red circle`` against another; not asked of two in one column (left, right) or row."""
    sizeless = [noun for noun in unique if noun.shape and not noun.size]
    for one, other in permutations(sizeless, 2):
        a, b = unique[one], unique[other]
        if a is b or bool(one.color) != bool(other.color):
            continue
        if a.column != b.column:
            yield Question("relation", f"is the {one} left of the {other}?", _yes_no(a.column < b.column))
            yield Question("relation", f"is the {one} right of the {other}?", _yes_no(a.column > b.column))
        if a.row != b.row:
            yield Question("relation", f"is the {one} above the {other}?", _yes_no(a.row < b.row))
            yield Question("relation", f"is the {one} below the {other}?", _yes_no(a.row > b.row))


# Statements about two images


class Statement(NamedTuple):
    """A sentence and its four pairs: (index of the left scene, index of the right scene, truth)."""

    kind: str
    text: str
    pairs: tuple[tuple[int, int, bool], ...]


# A pattern: what the left and right counts shall be, and whether the sentence is then true. Wherever logic allows it,
# each side alone is seen as often with "true" as with "false", so that a model has to look at what is asked for.
_Pattern = tuple[tuple[int, int, bool], ...]

_PRESENCE_KINDS: dict[str, tuple[str, _Pattern]] = {
    "left": ("there is a {} in the left image.", ((1, 0, True), (1, 1, True), (0, 1, False), (0, 0, False))),
    "right": ("there is a {} in the right image.", ((0, 1, True), (1, 1, True), (1, 0, False), (0, 0, False))),
    "both": ("there is a {} in both images.", ((1, 1, True), (1, 1, True), (1, 0, False), (0, 1, False))),
    "exactly-one": (
        "there is a {} in exactly one of the images.",
        ((1, 0, True), (0, 1, True), (1, 1, False), (0, 0, False)),
    ),
}
STATEMENT_SHARES = {"left": 30, "right": 30, "both": 20, "exactly-one": 5, "total": 5, "more": 5, "same-number": 5}


def balanced_statements(scenes: Sequence[Scene], num_statements: int, rng: random.Random) -> list[Statement]:
    """``num_statements`` sentences, each with two pairs of scenes that make it true and two that make it false.

    Raises:
        DataError: too few scenes for the pairs that the sentences need.
    """
    groups = _group_by_count(scenes)
    kinds = [kind for kind, share in STATEMENT_SHARES.items() for _ in range(math.ceil(num_statements * share / 100))]
    statements = []
    for kind in rng.sample(kinds, num_statements):
        for _ in range(_MAX_ATTEMPTS):
            text, noun, pattern = _draw_statement(kind, rng)
            pairs = _draw_pairs(pattern, groups[noun, 1 if kind in _PRESENCE_KINDS else MAX_OBJECTS], rng)
            if pairs:
                statements.append(Statement(kind, text, pairs))
                break
        else:
            raise DataError(f"{len(scenes)} scenes are too few for statements of kind '{kind}'; make more images")
    return statements


def _draw_statement(kind: str, rng: random.Random) -> tuple[str, Noun, _Pattern]:
    if kind in _PRESENCE_KINDS:
        template, pattern = _PRESENCE_KINDS[kind]
        # Mostly colours: they are learnt first, and the rest of the task through them.
        (nouns,) = rng.choices((_COLOR_NOUNS, _SHAPE_NOUNS, _FULL_NOUNS), weights=(8, 1, 1))
        noun = rng.choice(nouns)
        return template.format(noun), noun, pattern
    noun = rng.choice((_OBJECT_NOUN, *_SHAPE_NOUNS, *_COLOR_NOUNS))
    levels = range(MAX_OBJECTS + 1)
    if kind == "same-number":
        a, b = rng.sample(levels, 2)
        pattern = ((a, a, True), (b, b, True), (a, b, False), (b, a, False))
        return f"the two images show the same number of {noun.plural}.", noun, pattern
    if kind == "total":
        # Two different ways to the same total; crossing them gives two wrong totals, and one side tells nothing.
        total = rng.randint(1, 6)
        ways = [(left, total - left) for left in levels if total - left in levels]
        (a, b), (c, d) = rng.choice(list(combinations(ways, 2)))
        verb = f"is one {noun}" if total == 1 else f"are {_NUMBER_WORDS[total]} {noun.plural}"
        return f"there {verb} in total.", noun, ((a, b, True), (c, d, True), (a, d, False), (c, b, False))
    # Differences of one, and ties among the false pairs: one image alone says as little as it can for a comparison.
    a, b = rng.randrange(MAX_OBJECTS), rng.randrange(MAX_OBJECTS)
    tie = a + rng.randrange(2)
    pattern = ((a + 1, a, True), (b + 1, b, True), (tie, tie, False), (b, b + 1, False))
    if rng.random() < 0.5:
        return f"the left image has more {noun.plural} than the right image.", noun, pattern
    mirrored = tuple((right, left, truth) for left, right, truth in pattern)
    return f"the right image has more {noun.plural} than the left image.", noun, mirrored


def _group_by_count(scenes: Sequence[Scene]) -> dict[tuple[Noun, int], dict[int, list[int]]]:
    """For each (noun, cap): scene indices by ``min(number of objects that the noun fits, cap)``; cap 1 is presence."""
    counts = [noun_counts(scene) for scene in scenes]
    groups: dict[tuple[Noun, int], dict[int, list[int]]] = {}
    for noun, cap in product((_OBJECT_NOUN, *_SHAPE_NOUNS, *_COLOR_NOUNS, *_FULL_NOUNS), (1, MAX_OBJECTS)):
        group = groups[noun, cap] = defaultdict(list)
        for index, count in enumerate(counts):
            group[min(count[noun], cap)].append(index)
    return groups


def _draw_pairs(
    pattern: _Pattern, groups: dict[int, list[int]], rng: random.Random
) -> tuple[tuple[int, int, bool], ...] | None:
    """Four different pairs of different scenes in random order, or None if ``groups`` lack them."""
    pairs = set()
    for left_level, right_level, truth in pattern:
        for _ in range(10):
            if not groups.get(left_level) or not groups.get(right_level):
                return None
            left, right = rng.choice(groups[left_level]), rng.choice(groups[right_level])
            if left != right and (left, right, truth) not in pairs:
                pairs.add((left, right, truth))
                break
    return tuple(rng.sample(sorted(pairs), len(pairs))) if len(pairs) == PAIRS_PER_STATEMENT else None
