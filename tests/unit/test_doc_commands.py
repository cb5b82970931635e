"""Commands in the documentation: all parse, and those of docs/real_data.md read only what is there by then."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed.run import get_args_parser

from mhmoe_vl.config import load_config
from mhmoe_vl.study.cells import Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.train.config import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "data_prep/*.md", "benchmarks/*.md", "mhmoe_vl/moe/*.md")
    for path in ROOT.glob(pattern)
)
SCRIPTS = [
    Path("eval") / f"{task}.py" for task in ("vqa", "nlvr2", "captioning", "retrieval", "classification", "language")
]
WITH_COMMANDS = [
    Path("README.md"),
    Path("docs/real_data.md"),
    Path("docs/language.md"),
    Path("docs/visual_tokenizer.md"),
    Path("data_prep/README.md"),
    *SCRIPTS,
]

# Bash expands loops, braces and variables; the programs write down how they were called.
PRELUDE = """
set -eu
DATA=official
python() { printf '%s\\0' python "$@" $'\\x1e' >> calls; }
torchrun() { printf '%s\\0' torchrun "$@" $'\\x1e' >> calls; }
"""


@dataclass(frozen=True)
class Call:
    """A program of the project and what its parser made of the arguments."""

    module: str
    parsed: argparse.Namespace


class Parsed(Exception):  # noqa: N818
    """Raised in place of doing anything."""


def shell_of(page: Path) -> str:
    """What a reader would type: fenced blocks of bash, and indented lines that start a program."""
    lines: list[str] = []
    fenced = is_continued = False
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("```"):
            fenced = line == "```bash"
            continue
        command = line.strip().removeprefix("$ ").partition("     ")[0]
        is_indented = line.startswith("  ") and command.startswith(("python -m", "torchrun"))
        if fenced:
            lines.append(line)
        elif is_indented or is_continued:
            lines.append(command)
            is_continued = command.endswith("\\")
    return "\n".join(lines)


def calls_of(page: Path, folder: Path) -> list[Call]:
    return calls_in(shell_of(page), folder)


def calls_in(shell: str, folder: Path) -> list[Call]:
    """Lines of Python on the command line or behind it, ``-c`` and ``-``, are no programs of the project."""
    subprocess.run(["bash", "-c", PRELUDE + shell], cwd=folder, check=True)
    if not (folder / "calls").exists():
        return []
    calls = (folder / "calls").read_text().split("\x1e\0")[:-1]
    return [parse(call.removesuffix("\0").split("\0")) for call in calls if call.split("\0")[1] not in ("-c", "-")]


def parse(call: list[str]) -> Call:
    program, *arguments = call
    if program == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        assert launch.module
        module, arguments = launch.training_script, launch.training_script_args
    else:
        assert arguments[0] == "-m"
        module, *arguments = arguments[1:]
    whole_parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        raise Parsed(whole_parse(self, *args, **options))

    is_package = (ROOT / module.replace(".", "/")).is_dir()
    imported = importlib.import_module(f"{module}.__main__" if is_package else module)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop), pytest.raises(Parsed) as stopped:
        imported.main(arguments)
    return Call(module, stopped.value.args[0])


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=str)
def test_every_command_parses(page: Path, tmp_path: Path) -> None:
    assert calls_of(page, tmp_path) or page not in WITH_COMMANDS


def read_and_written(call: Call) -> tuple[list[str], list[str]]:
    """Paths that a command reads and writes."""
    fields = vars(call.parsed)
    if call.module == "mhmoe_vl.train":
        config = run_of(call)
        sources = [*config.data.train.values(), *config.data.validation.values()]
        files = [getattr(config.task, name, None) for name in ("answers", "classes", "visual_codebook")]
        read = [*(path for source in sources for path in source.paths), config.data.text_tokenizer, config.init_from]
        return [path for path in (*read, *files) if path is not None], [] if call.parsed.dry_run else [config.out]
    written = [fields["out"]] if fields.get("out") else []
    if fields.get("holdout"):
        written.append(f"{fields['out']}-val")
    if fields.get("step") == "predict":
        written.append(fields["predictions"])
    read = []
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            is_path = isinstance(item, Path) or (
                name in ("sources", "shards", "data", "train_data") and item is not None
            )
            if is_path and item not in written:
                read.append(str(item))
    return read, [str(path) for path in written]


def run_of(call: Call) -> RunConfig:
    return load_config(RunConfig, ROOT / call.parsed.config, call.parsed.overrides)


def is_at(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


@pytest.fixture
def walk(tmp_path: Path) -> list[Call]:
    return calls_of(Path("docs/real_data.md"), tmp_path)


def test_the_walk_reads_what_it_has_written_before(walk: list[Call], tmp_path: Path) -> None:
    page = (ROOT / "docs/real_data.md").read_text()
    official = subprocess.run(
        ["bash", "-c", "printf '%s\\n' " + " ".join(names_of_official_files(page))],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    made: list[str] = []
    used: set[str] = set()
    for call in walk:
        read, written = read_and_written(call)
        for path in read:
            if path.startswith(("data/", "runs/")) or path in made:
                is_made = any(is_at(path, place) for place in made) or (tmp_path / path).exists()
                assert is_made, f"{call.module} reads {path}, which no command before it writes"
            elif not is_at(path, "official"):
                names = {name for name in official if is_at(path, name) or is_at(name, path)}
                assert names, f"{call.module} reads {path}, which is not among the files to get"
                used |= names
        made += written
    assert used == set(official)


def names_of_official_files(page: str) -> list[str]:
    """Of the indented block at the top; behind several blanks stands a description."""
    block = page[: page.index("## 1.")].splitlines()
    return [name for line in block if line.startswith("    ") for name in line.strip().partition("  ")[0].split()]


def test_the_walk_s_tokenizers_fit_its_models(walk: list[Call]) -> None:
    made = {
        str(call.parsed.out): call.parsed
        for call in walk
        if call.module.startswith("data_prep") and hasattr(call.parsed, "out")
    }
    runs = [run_of(call) for call in walk if call.module == "mhmoe_vl.train"]
    kinds = {"pretrain", "vqa", "nlvr2", "captioning", "retrieval", "classification"}
    assert kinds == {config.task.kind for config in runs}
    for config in runs:
        assert made[config.data.text_tokenizer].vocab_size <= config.model.vocab_size
        if config.task.kind == "pretrain":
            codebook = made[config.task.visual_codebook]
            assert (codebook.num_codes, codebook.patch_size) == (config.model.num_visual_codes, config.model.patch_size)


def test_study_data_makes_what_the_main_study_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the scenes, quickstart.sh; of the rest, a command of study_data.sh."""
    monkeypatch.setenv("PUBLIC", "official")
    monkeypatch.setenv("PYTHON", "python")
    scenes = tmp_path / "data/quickstart"
    scenes.mkdir(parents=True)
    (scenes / "complete").write_text("full\n")
    made: dict[str, argparse.Namespace] = {}
    for call in calls_in((ROOT / "study_data.sh").read_text(), tmp_path):
        made |= dict.fromkeys(read_and_written(call)[1], call.parsed)
    monkeypatch.chdir(ROOT)
    plan = Plan(load_config(StudyConfig, Path("configs/study/main.yaml")))
    seen = set()
    for run in (plan.base_run(cell) for cell in plan.cells):
        paths = {path for source in (*run.data.train.values(), *run.data.validation.values()) for path in source.paths}
        codebooks = {run.task.visual_codebook} if run.task.kind == "pretrain" else set()
        for path in {*paths, *codebooks, run.data.text_tokenizer}:
            place = next((place for place in made if is_at(path, place)), None)
            assert place or is_at(path, "data/quickstart"), path
            seen.add(place)
        assert made[run.data.text_tokenizer].vocab_size <= run.model.vocab_size
        assert all(made[path].num_codes <= run.model.num_visual_codes for path in codebooks)
    assert {place for place in made if not place.endswith("-val")} <= seen


def test_torchrun_would_take_run_for_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Why the evaluations have a second spelling; once this fails, it is not needed any more."""
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["-m", "eval.vqa", "--run", "runs/vqa"])
    assert "ambiguous option: --run" in capsys.readouterr().err
