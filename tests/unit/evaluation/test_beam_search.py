"""Beam search against exhaustive search, and against plain searches that run the whole model at every step."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.evaluation.beam_search import BeamSettings, beam_search
from tests.unit.evaluation.captioner import Scores, make_captioner, make_tokenizer
from tests.unit.tasks.builders import byte_images

TOKENIZER = make_tokenizer()


def exhaustive(scores: Scores, max_length: int, length_penalty: float) -> list[int]:
    """The best of all captions: each ends with ``</s>``, or has ``max_length`` tokens."""
    eos = TOKENIZER.eos_id
    best: tuple[float, list[int]] = (float("-inf"), [])
    for length in range(1, max_length + 1):
        for sequence in product(scores.choices, repeat=length):
            if eos in sequence[:-1] or (sequence[-1] != eos and length < max_length):
                continue
            total = sum(scores.after(sequence[:n])[sequence[n]] for n in range(length))
            best = max(best, (total / length**length_penalty, [token for token in sequence if token != eos]))
    return best[1]


def plain_beam_search(scores: Scores, num_beams: int, max_length: int, length_penalty: float) -> list[int]:
    """Textbook beam search to the very end, without stopping early."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, max_length + 1):
        candidates = sorted(
            ((total + p, (*prefix, token)) for total, prefix in beams for token, p in scores.after(prefix).items()),
            reverse=True,
        )
        beams = []
        for total, sequence in candidates:
            if len(beams) == num_beams:
                break
            if sequence[-1] == TOKENIZER.eos_id or length == max_length:
                finished.append((total / length**length_penalty, sequence))
            else:
                beams.append((total, sequence))
    return [token for token in max(finished)[1] if token != TOKENIZER.eos_id]


@pytest.mark.parametrize(("ffn", "vl_ffn_layers"), [("dense", 0), ("mhmoe", 0), ("mhmoe", 2)])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_many_beams_find_the_best_of_all_captions(ffn: str, vl_ffn_layers: int, length_penalty: float) -> None:
    task = make_captioner(ffn, vl_ffn_layers=vl_ffn_layers, sharpness=0.5)
    image = byte_images(3)
    # More beams than unfinished captions of two words: nothing is ever discarded.
    found = beam_search(task, image, TOKENIZER, BeamSettings(20, 3, length_penalty))
    assert found == [exhaustive(Scores(task, one, TOKENIZER), 3, length_penalty) for one in image]


def test_four_tokens_exhaustively() -> None:
    task = make_captioner("dense", sharpness=0.5, end_bias=-1.0)
    image = byte_images(1)
    found = beam_search(task, image, TOKENIZER, BeamSettings(70, 4, 0.6))
    assert found == [exhaustive(Scores(task, image[0], TOKENIZER), 4, 0.6)]


@pytest.mark.parametrize("num_beams", [1, 2, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("end_bias", [-4.0, 0.0, 2.0])
def test_equals_a_plain_beam_search(num_beams: int, length_penalty: float, end_bias: float) -> None:
    task = make_captioner(sharpness=0.6, end_bias=end_bias)
    image = byte_images(3, seed=num_beams)
    found = beam_search(task, image, TOKENIZER, BeamSettings(num_beams, 6, length_penalty))
    assert found == [plain_beam_search(Scores(task, one, TOKENIZER), num_beams, 6, length_penalty) for one in image]


@pytest.mark.parametrize("end_bias", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("blind", [False, True])
def test_one_beam_follows_the_most_probable_token(end_bias: float, blind: bool) -> None:
    task = make_captioner(end_bias=end_bias)
    task.task_config = task.task_config.model_copy(update={"blind": blind})
    image = byte_images(4)
    expected = []
    for one in image:
        scores, prefix = Scores(task, one, TOKENIZER), ()
        while len(prefix) < 6:
            log_probs = scores.after(prefix)
            token = max(log_probs, key=log_probs.__getitem__)
            if token == TOKENIZER.eos_id:
                break
            prefix = (*prefix, token)
        expected.append(list(prefix))
    # Without a length penalty no longer caption can overtake the first to end.
    assert beam_search(task, image, TOKENIZER, BeamSettings(1, 6, 0.0)) == expected
    if blind:
        assert len({tuple(ids) for ids in expected}) == 1


def test_the_length_penalty_favours_longer_captions() -> None:
    task = make_captioner(sharpness=0.2, end_bias=0.5)
    image = byte_images(6)
    lengths = [
        sum(map(len, beam_search(task, image, TOKENIZER, BeamSettings(4, 6, penalty)))) for penalty in (0.0, 3.0)
    ]
    assert lengths[0] < lengths[1]


def test_a_batch_is_searched_image_by_image() -> None:
    """Images whose search is decided early wait for the others without changing."""
    task = make_captioner(end_bias=1.0)
    image = byte_images(8, seed=5)
    settings = BeamSettings(3, 8, 0.6)
    together = beam_search(task, image, TOKENIZER, settings)
    assert together == [beam_search(task, one[None], TOKENIZER, settings)[0] for one in image]
    assert len({len(ids) for ids in together}) > 1


def test_only_words_are_written() -> None:
    """Special tokens and the ids behind the tokenizer's are impossible, however probable the model finds them."""
    task = make_captioner(end_bias=-3.0)
    with torch.no_grad():
        task.mlm_head.linear.bias[[0, 1, 3, 4, 9, 10, 11]] += 50
    for num_beams in (1, 3):
        for ids in beam_search(task, byte_images(4), TOKENIZER, BeamSettings(num_beams, 5)):
            assert ids
            assert set(ids) <= set(TOKENIZER.ordinary_ids)


def test_a_vocabulary_smaller_than_the_candidates() -> None:
    tokenizer: TextTokenizer = make_tokenizer(("word",))
    task = make_captioner()
    (ids,) = beam_search(task, byte_images(1), tokenizer, BeamSettings(9, 3))
    assert set(ids) <= {5}


def test_captions_end_at_the_greatest_length() -> None:
    """Together with the start token they fill the table of positions."""
    task = make_captioner(end_bias=-100.0)
    found = beam_search(task, byte_images(2), TOKENIZER, BeamSettings(3, 11))
    assert [len(ids) for ids in found] == [11, 11]
    with pytest.raises(ValueError, match="text of 13 tokens exceeds max_text_length=12"):
        beam_search(task, byte_images(2), TOKENIZER, BeamSettings(3, 12))


def test_no_images() -> None:
    assert beam_search(make_captioner(), byte_images(0), TOKENIZER, BeamSettings()) == []
