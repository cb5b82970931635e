"""Zero-shot scores through lm-evaluation-harness (extra ``lm``), which brings the tasks, prompts and metrics.

Its tasks read their data from the Hugging Face hub, or from local JSON lines: either task files of one's own
(``include``), or the tasks that it knows with data that lie in a folder (``local_data``); then nothing is fetched.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table

from mhmoe_vl.config import Config
from mhmoe_vl.errors import ConfigError, DataError, suggest
from mhmoe_vl.evaluation.likelihood import CausalScorer, Scorer
from mhmoe_vl.evaluation.results_files import write_text

_SPLITS = ("train", "validation", "test")


class HarnessTaskConfig(Config):
    """One task of the harness.

    Attributes:
        name: as ``lm_eval ls tasks`` has it, or in a task file of one's own.
        metrics: those to report.
    """

    name: str
    metrics: tuple[str, ...] = ("acc",)


class LanguageEvaluationConfig(Config):
    """Which tasks to score, and how.

    Attributes:
        tasks: in the order of the table.
        num_fewshot: examples in front of each question.
    """

    tasks: tuple[HarnessTaskConfig, ...]
    num_fewshot: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task, as a share of 1 where it is an accuracy.

    Attributes:
        stderr: of the mean, as the harness gives it; None if it gives none.
        n: questions.
        chance: what guessing among the choices gives on average; None if there are no choices.
        majority: what always choosing the commonest place of the right choice gives; None likewise.
    """

    task: str
    metric: str
    score: float
    stderr: float | None
    n: int
    chance: float | None
    majority: float | None


@dataclass(frozen=True)
class LanguageScores:
    """A table of scores with what it took to get them.

    Attributes:
        scoring: ``log-likelihood``, or ``pseudo-log-likelihood`` of masked encoders, which other models' scores are no
            equals of.
        cost: of the run.
    """

    scores: tuple[HarnessScore, ...]
    scoring: str
    num_fewshot: int
    harness_version: str
    limit: int | None = None
    seed: int | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def show(self) -> None:
        """Print as a table, in percent."""
        table = Table("task", "metric", "score", "chance", "majority", "n", title=f"zero-shot, {self.scoring}")
        if self.num_fewshot:
            table.title = f"{self.num_fewshot}-shot, {self.scoring}"
        for s in self.scores:
            score = f"{100 * s.score:.1f}" + (f" ± {100 * s.stderr:.1f}" if s.stderr is not None else "")
            table.add_row(s.task, s.metric, score, _percent(s.chance), _percent(s.majority), f"{s.n:,}")
        console = Console()
        console.print(table)
        for name, value in self.cost.items():
            console.print(
                f"{name.replace('_', ' ')}: {value:,}" if isinstance(value, int | float) else f"{name}: {value}"
            )
        if self.limit is not None:
            console.print(f"note: --limit {self.limit}: the first questions of each task, not the task")


def run_harness(
    scorer: Scorer,
    config: LanguageEvaluationConfig,
    *,
    include: Sequence[Path] = (),
    local_data: Path | None = None,
    limit: int | None = None,
) -> tuple[tuple[HarnessScore, ...], str]:
    """Scores of all tasks, and the version of the harness.

    Args:
        include: folders with task files.
        local_data: folder with ``TASK/validation.jsonl`` and so on, instead of what the task files name; those of
            ``include`` may have data of their own.
        limit: only so many questions of each task.

    Raises:
        ConfigError: the harness is not installed, or there is no such task or metric.
        DataError: the data of a task cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'mhmoe_vl[lm]'") from None
    names = [task.name for task in config.tasks]
    own = TaskManager(include_path=[str(path) for path in include], include_defaults=False)
    are_own = all(name in own.task_index for name in names)
    known = own.task_index if are_own else tasks_of_the_harness().task_index | own.task_index
    for name in names:
        if name not in known:
            raise ConfigError(f"tasks: no task '{name}'{suggest(name, sorted(known))}; see lm_eval ls tasks, --include")
        if known[name].kind.name in ("GROUP", "TAG"):
            raise ConfigError(f"tasks: '{name}' is several tasks, each with its own scores; name those that it holds")
    with tempfile.TemporaryDirectory() as folder:
        if local_data is not None:
            for name in names:
                task_file = Path(known[name].yaml_path)
                is_own = any(task_file.resolve().is_relative_to(path.resolve()) for path in include)
                if not is_own or (local_data / name).is_dir():
                    _write_local_task(Path(folder), name, task_file, local_data)
            manager = TaskManager(include_path=[*(str(path) for path in include), folder], include_defaults=False)
        elif are_own:
            manager = own
        else:
            manager = TaskManager(include_path=[str(path) for path in include]) if include else tasks_of_the_harness()
        try:
            found = lm_eval.simple_evaluate(
                model=harness_model(scorer),
                tasks=names,
                task_manager=manager,
                num_fewshot=config.num_fewshot,
                limit=limit,
                bootstrap_iters=100,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"tasks: {', '.join(names)}: the harness cannot run them: {type(error).__name__}: {reason}; for tasks "
                "whose data are not here, see --local-data"
            ) from None
    assert found is not None
    scores = [score for task in config.tasks for score in _scores_of(task, found)]
    return tuple(scores), str(lm_eval.__version__)


@cache
def tasks_of_the_harness() -> Any:
    """All tasks that it has; reading their files takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def harness_model(scorer: Scorer) -> Any:
    """``scorer`` as the harness's interface of a model (:class:`lm_eval.api.model.LM`)."""
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [tuple(score) for score in scorer.continuations([request.args for request in requests])]  # type: ignore[misc]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return [score.log_probability for score in scorer.texts([request.args[0] for request in requests])]

        def generate_until(self, requests: Any) -> list[str]:
            if not isinstance(scorer, CausalScorer):
                raise ConfigError("a masked encoder does not generate text; leave out tasks that ask for it")
            return [_generate(scorer, *request.args) for request in requests]

    return HarnessModel()


def _generate(scorer: CausalScorer, context: str, options: Mapping[str, Any]) -> str:
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise ConfigError("this task asks for sampled text, and only the most likely text is generated")
    until = options.get("until", [])
    return scorer.generate(
        context,
        until=[until] if isinstance(until, str) else until,
        max_tokens=int(options.get("max_gen_toks", 256)),
    )


def _write_local_task(folder: Path, name: str, task_file: Path, local_data: Path) -> None:
    """A task file that is the harness's own in everything but where its data are."""
    files = {split: local_data / name / f"{split}.jsonl" for split in _SPLITS}
    there = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    if not there:
        raise DataError(f"{local_data / name}: has none of {', '.join(f'{split}.jsonl' for split in _SPLITS)}")
    local = {
        "include": str(task_file),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": there},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(local))


def _scores_of(task: HarnessTaskConfig, found: Mapping[str, Any]) -> list[HarnessScore]:
    results, samples = found["results"][task.name], found["samples"][task.name]
    chance, majority = baselines(samples)
    # The harness names a metric with the filter that answers went through.
    values = {name.partition(",")[0]: value for name, value in results.items()}
    scores = []
    for metric in task.metrics:
        if metric not in values:
            known = sorted(name for name, value in values.items() if isinstance(value, float) and "_stderr" not in name)
            raise ConfigError(
                f"tasks: {task.name}: has no metric '{metric}'{suggest(metric, known)}; it has {', '.join(known)}"
            )
        stderr = values.get(f"{metric}_stderr")
        is_accuracy = metric.startswith("acc")
        scores.append(
            HarnessScore(
                task.name,
                metric,
                float(values[metric]),
                float(stderr) if isinstance(stderr, float) else None,
                len(samples),
                chance if is_accuracy else None,
                majority if is_accuracy else None,
            )
        )
    return scores


def baselines(samples: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Mean of 1 / number of choices, and the share of questions whose right choice is in the commonest place.

    None for questions without choices, and for those with several right ones.
    """
    places, chances = [], []
    for sample in samples:
        num_choices, target = len(sample["arguments"]), sample["target"]
        if num_choices < 2 or not isinstance(target, int | str) or not str(target).isdigit():
            return None, None
        places.append(int(target))
        chances.append(1 / num_choices)
    if not places:
        return None, None
    return sum(chances) / len(chances), Counter(places).most_common(1)[0][1] / len(places)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
