"""Merging, overriding and checking configurations, and the YAML files that the project ships."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mhmoe_vl.config import Config, ConfigFile, dump_config, load_config, validate_config
from mhmoe_vl.errors import ConfigError, UserError, exit_on_user_error, suggest
from mhmoe_vl.evaluation.lm_harness import LanguageEvaluationConfig
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.train.__main__ import main
from mhmoe_vl.train.config import RunConfig

ROOT = Path(__file__).parents[2]
#: Parts of other files, which are nothing by themselves.
PARTS = ("study/base.yaml", "study/main/model.yaml")
#: But for whole studies, which tests/unit/study/test_cells.py makes plans of.
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.relative_to(ROOT / "configs").as_posix() not in PARTS and "\narms:" not in path.read_text()
)


class Inner(Config):
    rate: float = 0.5
    names: tuple[str, ...] = ()


class Outer(Config):
    """A small schema, so that what is expected can be worked out by hand."""

    inner: Inner = Inner()
    num_steps: int
    by_name: dict[str, Inner] = Field(default_factory=dict)


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def run_tree(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "out": "runs/x",
        "task": {"kind": "pretrain", "visual_codebook": "codebook.safetensors"},
        "model": {"dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 32, "ffn": "dense"},
        "data": {
            "train": {"image": {"kind": "image", "shards": "images"}},
            "text_tokenizer": "tokenizer.json",
            "batch_size": 4,
        },
        "max_steps": 10,
    }
    return {**tree, **changes}


def test_bases_merge_in_order_and_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    write(tmp_path / "common/first.yaml", {"num_steps": 1, "inner": {"rate": 1.0, "names": ["a", "b"]}})
    write(tmp_path / "common/second.yaml", {"base": "first.yaml", "num_steps": 2, "inner": {"names": ["c"]}})
    write(tmp_path / "third.yaml", {"num_steps": 3, "by_name": {"x": {"rate": 3.0}}})
    path = write(tmp_path / "run/top.yaml", {"base": ["../third.yaml", "../common/second.yaml"], "by_name": {"y": {}}})
    # second.yaml comes after third.yaml; mappings merge and lists replace.
    assert load_config(Outer, path) == Outer(
        num_steps=2, inner=Inner(rate=1.0, names=("c",)), by_name={"x": Inner(rate=3.0), "y": Inner()}
    )
    assert load_config(Outer, path, ["num_steps=9", "inner.names=[d, e]", "by_name.z.rate=7"]) == Outer(
        num_steps=9,
        inner=Inner(rate=1.0, names=("d", "e")),
        by_name={"x": Inner(rate=3.0), "y": Inner(), "z": Inner(rate=7.0)},
    )


def test_null_takes_an_entry_of_a_base_away(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"num_steps": 1, "by_name": {"x": {"rate": 1.0}, "y": {"rate": 2.0}}})
    child = write(tmp_path / "child.yaml", {"base": "base.yaml", "by_name": {"x": None}})
    assert load_config(Outer, child).by_name == {"y": Inner(rate=2.0)}
    assert load_config(Outer, tmp_path / "base.yaml", ["by_name.y=null"]).by_name == {"x": Inner(rate=1.0)}
    # What was taken away may come again, with nothing of the old entry.
    grandchild = write(tmp_path / "grandchild.yaml", {"base": "child.yaml", "by_name": {"x": {"names": ["a"]}}})
    assert load_config(Outer, grandchild).by_name["x"] == Inner(names=("a",))
    # A file may take away what another base has.
    write(tmp_path / "without.yaml", {"by_name": {"y": None}})
    both = write(tmp_path / "both.yaml", {"base": ["base.yaml", "without.yaml"]})
    assert load_config(Outer, both).by_name == {"x": Inner(rate=1.0)}


def test_a_file_that_is_read_once_is_the_same_for_all_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", {"num_steps": 1, "by_name": {"x": {"rate": 1.0}, "y": {}}})
    file = ConfigFile(Outer, path)
    whole = file.load()
    assert file.load(["by_name.y=null", "inner.rate=2"]).by_name == {"x": Inner(rate=1.0)}
    assert file.load() == whole == load_config(Outer, path)


def test_null_takes_a_source_of_a_shipped_file_away() -> None:
    path = ROOT / "configs/pretrain/base.yaml"
    config = load_config(RunConfig, path, ["data.train.text=null", "data.validation.pair=null"])
    assert (list(config.data.train), config.data.validation) == (["image", "pair"], {})


@pytest.mark.parametrize("override", ["by_name.z=null", "by_name.xx=null"])
def test_null_that_takes_nothing_away_is_an_error(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "x.yaml", {"num_steps": 1, "by_name": {"x": {"rate": 1.0}}})
    with pytest.raises(ConfigError, match=r"by_name\.(z|xx): null takes an entry away, .*; entries: x$"):
        load_config(Outer, path, [override])


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("by_name.x", "take an entry away with by_name.x=null"),
        ("by_name", "take an entry away with by_name.NAME=null"),
        ("inner", "set its keys one by one"),
    ],
)
def test_an_empty_mapping_without_effect_is_an_error(tmp_path: Path, key: str, remedy: str) -> None:
    path = write(tmp_path / "x.yaml", {"num_steps": 1, "inner": {"rate": 1.0}, "by_name": {"x": {"rate": 1.0}}})
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path, [f"{key}={{}}"])
    assert f"{key}: an empty mapping changes nothing" in str(caught.value)
    assert str(caught.value).endswith(remedy)
    name, *inside = key.split(".")
    child = write(tmp_path / "child.yaml", {"base": "x.yaml", name: {inside[0]: {}} if inside else {}})
    with pytest.raises(ConfigError, match=r"child\.yaml: .*changes nothing"):
        load_config(Outer, child)
    # A new entry of defaults is an effect.
    assert load_config(Outer, path, ["by_name.z={}"]).by_name["z"] == Inner()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "x.yaml", f"num_steps: 1\ninner: {{rate: {text}}}\n")
    assert load_config(Outer, path).inner.rate == 1e-4
    path = write(tmp_path / "y.yaml", "num_steps: 1\n")
    assert load_config(Outer, path, [f"inner.rate={text}"]).inner.rate == 1e-4


def test_a_circle_of_bases_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"base": ["b.yaml"]})
    write(tmp_path / "b.yaml", {"base": ["a.yaml"]})
    with pytest.raises(ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(Outer, tmp_path / "a.yaml")


def test_the_same_base_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "common.yaml", {"num_steps": 1})
    write(tmp_path / "a.yaml", {"base": "common.yaml", "inner": {"rate": 2.0}})
    path = write(tmp_path / "b.yaml", {"base": ["a.yaml", "common.yaml"]})
    assert load_config(Outer, path) == Outer(num_steps=1, inner=Inner(rate=2.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_steps: [1\n", "not readable as YAML"),
        ("- 1\n- 2\n", "the top level must be a mapping"),
        ("base: 3\n", "'base' must be a file name or a list of file names"),
        ("base: {a: b}\n", "'base' must be a file name or a list of file names"),
        ("base: absent.yaml\n", "absent.yaml: no such config file"),
        ("num_steps: ${nowhere}\n", "nowhere"),
        ("\x00\xff", "not readable as YAML"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "x.yaml", content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Outer, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "pretrain.yaml", {})
    with pytest.raises(ConfigError, match=r"pretrian\.yaml: no such config file \(did you mean 'pretrain\.yaml'\?\)"):
        load_config(Outer, tmp_path / "pretrian.yaml")


@pytest.mark.parametrize("override", ["num_steps", "=3", " =3", "--num_steps"])
def test_an_override_must_be_an_assignment(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "x.yaml", {"num_steps": 1})
    with pytest.raises(ConfigError, match=r"must look like key\.sub=value"):
        load_config(Outer, path, [override])


def test_an_override_into_a_number_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", {"num_steps": 1})
    with pytest.raises(ConfigError, match="num_steps"):
        load_config(Outer, path, ["num_steps.more=1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_stpes": 3}, "max_stpes: unknown key (did you mean 'max_steps'?); known keys: out, seed, task"),
        (
            {"task": {"kind": "pretrain", "visual_codebok": "x"}},
            "task.visual_codebok: unknown key (did you mean 'visual_codebook'?); known keys: kind, visual_codebook",
        ),
        ({"task": {"kind": "vqa"}}, "task.answers: is required"),
        ({"task": {"kind": "vqq"}}, "'vqa'"),
        ({"max_steps": "many"}, "max_steps: 'many': Input should be a valid integer"),
        ({"max_steps": 0}, "max_steps: 0: Input should be greater than 0"),
        ({"precision": "float16"}, "precision: 'float16': Input should be 'auto', 'float32' or 'bfloat16'"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: -1: Input should be greater than 0"),
        ({"optimizer": {"warmup_steps": 10}}, "optimizer.warmup_steps: 10 must be below max_steps 10"),
    ],
)
def test_a_problem_names_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(RunConfig, run_tree(**change), where="x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "image", "shards": 3}, "data.train.photos.shards: 3: Input should be a valid"),
        ({"kind": "image"}, "data.train.photos.shards: is required"),
        (
            {"kind": "image", "shards": "x", "wieght": 2},
            "data.train.photos.wieght: unknown key (did you mean 'weight'?)",
        ),
        ({"kind": "image", "shards": "x", "weight": 0}, "data.train.photos.weight: 0: Input should be greater than 0"),
        (
            {"kind": "vqa", "shards": "x"},
            "data.train.photos.kind: 'vqa' cannot feed task 'pretrain', which reads image",
        ),
    ],
)
def test_a_problem_inside_a_named_source(change: dict[str, Any], message: str) -> None:
    data = {"train": {"photos": change}, "text_tokenizer": "t", "batch_size": 4}
    with pytest.raises(ConfigError) as caught:
        validate_config(RunConfig, run_tree(data=data))
    assert message in str(caught.value)
    assert "tuple[" not in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(RunConfig, run_tree(max_steps=-1, seeed=3, device="tpu"))
    for key in ("max_steps: -1", "seeed: unknown key (did you mean 'seed'?)", "device: 'tpu'"):
        assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_impossible_combinations_are_refused() -> None:
    data = run_tree()["data"]
    for changes, message in (
        ({"data": {**data, "train": {}}}, "data.train: needs at least one source"),
        ({"data": {**data, "text_length": 2000}}, "data.text_length: 2000 exceeds model.max_text_length 1024"),
        ({"model": {**run_tree()["model"], "num_heads": 3}}, "model: num_heads=3 must divide dim=16"),
        (
            {"model": {**run_tree()["model"], "ffn": "mhmoe", "moe": {"num_heads": 3}}},
            r"model: moe\.num_heads=3 must divide dim=16, which ffn=mhmoe splits",
        ),
        (
            {"model": {**run_tree()["model"], "ffn": "smoe", "moe": {"num_experts": 2, "top_k": 3}}},
            r"model: moe: reference_top_k=3 must lie between 1 and reference_num_experts=2",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            validate_config(RunConfig, run_tree(**changes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_shipped_file_is_valid(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    if set(tree) <= {"base", "model"}:

        class ModelFile(Config):
            model: ModelConfig

        assert load_config(ModelFile, path).model.dim > 0
        return
    if path.parent.name == "eval":
        assert load_config(LanguageEvaluationConfig, path).tasks
        return
    config = load_config(RunConfig, path)
    assert validate_config(RunConfig, yaml.safe_load(dump_config(config))) == config
    if config.task.kind == "nlvr2":
        # Statements may speak of left and right; BEiT-3's recipe mirrors nevertheless.
        assert config.data.augment.flip == (path.parent.name in ("finetune", "beit3"))


def test_the_quickstart_files_share_one_model() -> None:
    configs = [
        load_config(RunConfig, path) for path in CONFIGS if path.parent.name == "quickstart" and path.stem != "model"
    ]
    assert {config.task.kind for config in configs} == {"pretrain", "vqa", "nlvr2", "captioning", "retrieval"}
    assert len({dump_config(config.model) for config in configs}) == 1


def test_the_printed_configuration_loads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(ROOT / "configs/quickstart/pretrain.yaml"),
        "optimizer.learning_rate=3e-5",
        "data.train.text.weight=.5",
    ]
    assert main(["--config", arguments[0], "--print-config", *arguments[1:]]) == 0
    printed = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    config = load_config(RunConfig, printed)
    assert config == load_config(RunConfig, arguments[0], arguments[1:])
    assert config.optimizer.learning_rate == 3e-5
    assert config.data.train["text"].weight == 0.5


@given(
    rate=st.floats(allow_nan=False, allow_infinity=False),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
    num_steps=st.integers(),
)
def test_any_configuration_survives_printing(rate: float, names: list[str], num_steps: int) -> None:
    config = Outer(num_steps=num_steps, inner=Inner(rate=rate, names=tuple(names)))
    assert validate_config(Outer, yaml.safe_load(dump_config(config))) == config


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(num_steps=1).num_steps = 2


def test_a_user_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    codes = {}
    for error in UserError.__subclasses__():
        if error.__module__ == "mhmoe_vl.errors":
            with pytest.raises(SystemExit) as caught, exit_on_user_error():
                raise error("what went wrong")
            codes[error.__name__] = caught.value.code
            assert capsys.readouterr().err == "error: what went wrong\n"
    assert codes == {"ConfigError": 64, "DataError": 65, "OutputError": 73, "CheckpointError": 74, "NonFiniteError": 76}
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        os.path.join(1 / 0)  # type: ignore[call-overload]


@pytest.mark.parametrize(("rank", "is_shared", "printed"), [(0, True, True), (1, True, False), (1, False, True)])
def test_rank_0_prints_what_all_ranks_raise(
    capsys: pytest.CaptureFixture[str], rank: int, is_shared: bool, printed: bool
) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error(rank=rank, is_shared=is_shared):
        raise ConfigError("what went wrong")
    assert caught.value.code == 64
    assert capsys.readouterr().err == ("error: what went wrong\n" if printed else "")


def test_ctrl_c_leaves_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_only_a_near_word_is_suggested() -> None:
    assert suggest("lerning_rate", ["learning_rate", "seed"]) == " (did you mean 'learning_rate'?)"
    assert suggest("zzz", ["learning_rate", "seed"]) == ""
