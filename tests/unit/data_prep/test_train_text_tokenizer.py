"""Tokenizers: special tokens where they belong, nothing lost, and CLIP's vocabulary as open_clip has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_prep import pack_nlvr2, pack_pairs, pack_text, pack_vqa
from data_prep.train_text_tokenizer import main
from mhmoe_vl.data.decode import clean_text
from mhmoe_vl.data.prepare.corpus import iterate_texts, sample_by_temperature
from mhmoe_vl.data.text import SPECIAL_TOKENS, TextTokenizer

TEXTS = ["A man rides a brown horse.", "Two men ride two horses in Zürich.", "東京の馬"]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS * 20))
    return file


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_training(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, lowercase: bool
) -> None:
    out = tmp_path / "tokenizer.json"
    options = ["--vocab-size", "300" if model == "bpe" else "80", "--model", model, *["--lowercase"] * lowercase]
    assert main([str(text_file), "--out", str(out), *options]) == 0
    tokenizer = Tokenizer.from_file(str(out))
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert min(ids) > 4
        assert tokenizer.decode(ids) == (text.lower() if lowercase else text)
        assert TextTokenizer.load(out).decode(ids) == tokenizer.decode(ids)
    assert "0.000% of them unknown" in capsys.readouterr().out


def test_byte_pairs_are_learnt_alike_every_time(shared_data: Path, tmp_path: Path) -> None:
    source = str(shared_data / "text_multi/xquad_contexts/de.txt")
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file in files:
        assert main([source, "--out", str(file), "--vocab-size", "1000"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bytes_know_every_text_and_unigrams_say_what_they_do_not_know(text_file: Path, tmp_path: Path) -> None:
    unseen = "Привет 🐴\t \\ <3"
    for model in ("bpe", "unigram"):
        out = tmp_path / f"{model}.json"
        assert main([str(text_file), "--out", str(out), "--vocab-size", "280", "--model", model]) == 0
        tokenizer = Tokenizer.from_file(str(out))
        ids = tokenizer.encode(unseen).ids
        assert (4 in ids) == (model == "unigram")
        assert (tokenizer.decode(ids) == unseen) == (model == "bpe")


def test_all_kinds_of_shards_are_learnt_from(shared_data: Path, tmp_path: Path) -> None:
    def out(name: str) -> list[str]:
        return ["--out", str(tmp_path / name), "--limit", "5", "--max-skipped", "1"]

    shapes, photos = shared_data / "easy_vqa", shared_data / "coco_cc"
    karpathy = photos / "annotations/dataset_coco_mini_karpathy.json"
    pack_pairs.main(["--karpathy", str(karpathy), "--split", "val", "--images", str(photos / "images"), *out("pairs")])
    vqa = ["--questions", str(shapes / "vqa_format/test_questions.json"), "--image-pattern", "{image_id}.png"]
    pack_vqa.main([*vqa, "--images", str(shapes / "test/images"), *out("vqa")])
    pack_nlvr2.main(["--examples", str(shapes / "nlvr2_format/dev.json"), "--images", str(shapes), *out("nlvr2")])
    pack_text.main([str(shared_data / "text_en/wikitext2_valid.txt"), *out("text")])
    folders = [str(tmp_path / name) for name in ("pairs", "vqa", "nlvr2", "text")]
    texts = list(iterate_texts(folders, []))
    wikitext = [line.strip() for line in (shared_data / "text_en/wikitext2_valid.txt").read_text().split("\n")]
    assert texts[-5:] == [" ".join(line.split()) for line in wikitext if line][:5]
    questions = json.loads((shapes / "vqa_format/test_questions.json").read_bytes())["questions"]
    first_images = list(dict.fromkeys(question["image_id"] for question in questions))[:5]
    assert {q["question"] for q in questions if q["image_id"] in first_images} < set(texts)
    images = json.loads(karpathy.read_bytes())["images"]
    captions = next(image["sentences"] for image in images if image["split"] == "val")
    assert texts[: len(captions)] == [" ".join(caption["raw"].split()) for caption in captions]
    assert json.loads((shapes / "nlvr2_format/dev.json").read_text().split("\n")[0])["sentence"] in texts
    assert main([*folders, "--out", str(tmp_path / "tokenizer.json"), "--vocab-size", "400"]) == 0


def test_lines_that_cannot_be_used_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe bad\nfine\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\nnonsense\n')
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert main([*sources, "--out", str(tmp_path / "tokenizer.json"), "--vocab-size", "261"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 texts of" in out
    assert "skipped 2 lines" in out
    assert "a.txt:2" in out
    assert "b.jsonl:2" in out


def test_clip_tokens_are_those_of_open_clip(shared_data: Path, tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    out = tmp_path / "clip.json"
    assert main(["--clip", "--out", str(out)]) == 0
    ours, theirs = Tokenizer.from_file(str(out)), SimpleTokenizer()
    # All but CLIP's two own special tokens, which come last.
    assert [ours.id_to_token(i + 5) for i in range(49_406)] == [theirs.decoder[i] for i in range(49_406)]
    assert [ours.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert ours.get_vocab_size() == 49_411
    annotations = json.loads((shared_data / "coco_annotations/captions_val2017.json").read_bytes())["annotations"]
    texts = [annotation["caption"] for annotation in annotations[::10]]
    texts += (shared_data / "text_multi/xquad_contexts/ru.txt").read_text().split("\n")[:20]
    texts += ["It's 12:30, we've 3 dogs'", "naïve Café 東京 👩\u200d🍳", "a  b\tc"]
    texts = [clean_text(text) for text in texts]
    for text, encoding in zip(texts, ours.encode_batch(texts), strict=True):
        assert [i - 5 for i in encoding.ids] == theirs.encode(text), text
        assert ours.decode(encoding.ids) == theirs.decode([i - 5 for i in encoding.ids]).strip()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 64, "no texts to learn from"),
        (["absent"], 65, "no shards at absent"),
        (["empty.txt"], 65, "no texts to train a tokenizer on"),
        (["texts.txt", "--vocab-size", "200"], 64, "vocabulary size is 200; 'bpe' needs at least 261"),
        (["--clip", "--out", "texts.txt"], 73, "exists; add --overwrite"),
        # Noticed before anything is read.
        (["absent", "--out", "absent/tokenizer.json"], 73, "absent/tokenizer.json: cannot write"),
    ],
)
def test_what_cannot_be_learnt(
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(text_file.parent)
    Path("empty.txt").touch()
    with pytest.raises(SystemExit, match=str(code)):
        main(["--out", "tokenizer.json", *options])
    assert message in capsys.readouterr().err
    assert not Path("tokenizer.json").exists()


@pytest.mark.parametrize(("alpha", "num_small"), [(1.0, 4), (0.5, 8), (0.0, 16)])
def test_small_sources_count_for_more(tmp_path: Path, alpha: float, num_small: int) -> None:
    """4 of 16 texts at alpha 0.5: 16 to 4 becomes 4 to 2, which is 16 to 8; all texts of a source equally often."""
    for name, number in (("large", 16), ("small", 4)):
        (tmp_path / name).write_text("\n".join(f"{name} {i}" for i in range(number)))
    texts = list(sample_by_temperature([str(tmp_path / "large"), str(tmp_path / "small")], alpha, []))
    assert texts[:16] == [f"large {i}" for i in range(16)]
    assert texts[16:] == [f"small {i}" for i in range(4) for _ in range(num_small // 4)]


def test_temperature_changes_what_is_learnt(tmp_path: Path) -> None:
    """A word of the small source becomes one token, when it is counted as often as those of the large one."""
    (tmp_path / "large.txt").write_text("\n".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrst"))
    (tmp_path / "small.txt").write_text("zyzyzyx\n" * 3)
    sources, lengths = [str(tmp_path / "large.txt"), str(tmp_path / "small.txt")], []
    for alpha in ("1", "0"):
        out = tmp_path / f"{alpha}.json"
        assert main([*sources, "--out", str(out), "--vocab-size", "275", "--sampling-alpha", alpha]) == 0
        lengths.append(len(Tokenizer.from_file(str(out)).encode("zyzyzyx").ids))
    assert lengths[1] == 1 < lengths[0]
