"""A study: arms x tasks x seeds, and how learning rates are chosen."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, StringConstraints, model_validator

from mhmoe_vl.config import Config
from mhmoe_vl.errors import suggest

Positive = Annotated[int, Field(gt=0)]
#: Names are parts of paths.
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
Overrides: TypeAlias = tuple[str, ...]
Kind = Literal["dense", "smoe", "xmoe", "fine_grained", "mhmoe", "mhmoe_head_parallel"]
Parity = Literal["flops", "params"]


class ArmConfig(Config):
    """One of the things that are compared.

    Attributes:
        ffn: kind of the sparse blocks' feed-forward layer.
        num_experts: of the reference SMoE. Several numbers make several arms, ``NAME-8`` and ``NAME-32``, each compared
            with its own; None leaves what the task's file says.
        seed_offset: added to every seed. A kind under other seeds is a control: it must not differ from itself.
        overrides: ``a.b=c`` settings of this arm's runs, above all others.
        task_overrides: the same for the runs of tasks alone: what fine-tunings know nothing of, such as targets.
    """

    ffn: Kind
    num_experts: tuple[Positive, ...] | Positive | None = None
    seed_offset: int = 0
    overrides: Overrides = ()
    task_overrides: Overrides = ()


class EvaluationConfig(Config):
    """``python -m eval.PROGRAM --run RUN --data DATA``, after a fine-tuning.

    Attributes:
        options: further arguments.
    """

    program: Name
    data: tuple[str, ...] | str
    options: tuple[str, ...] = ()

    @property
    def shards(self) -> tuple[str, ...]:
        return (self.data,) if isinstance(self.data, str) else self.data


class PublishedConfig(Config):
    """Somebody else's figures, which are printed beside the study's.

    Attributes:
        source: where they are printed, such as ``arXiv 2404.15045, table 1``.
        is_perplexity: they are perplexities, and the study's figure is in nats.
        values: by arm, such as ``mhmoe-8``.
    """

    source: str
    is_perplexity: bool = False
    values: dict[Name, float]


class FineTuningConfig(Config):
    """A run that starts from the weights of another one of the same arm and seed.

    Attributes:
        config: file of the run; its ``out``, ``init_from``, ``seed`` and model kind are the study's.
        after: the fine-tuning whose weights it starts from; None: the task's own run.
        arms: those that are fine-tuned, such as ``mhmoe-8``, or ``mhmoe`` for all its numbers of experts; None: all.
        metrics: figures of the last validation, besides the score of the evaluation.
        published: beside the score of the evaluation.
    """

    config: str
    overrides: Overrides = ()
    after: str | None = None
    arms: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    metrics: tuple[str, ...] = ()
    evaluation: EvaluationConfig | None = None
    published: PublishedConfig | None = None


class TaskConfig(Config):
    """What every arm is trained on.

    Attributes:
        config: file of a run, as for ``python -m mhmoe_vl.train``; its ``out`` and ``seed`` are the study's.
        overrides: ``a.b=c`` settings of the runs of this task.
        metrics: figures of the validation, such as ``mlm`` or ``lm``; learning rates are chosen by the first, whose
            smallest value is best.
        other_metrics: figures that are shown with their intervals and are not tested. All tests of a study are
            corrected together: the fewer there are, the more each can find.
        published: beside the first metric.
        fine_tunings: by name.
    """

    config: str
    overrides: Overrides = ()
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    other_metrics: tuple[str, ...] = ()
    published: PublishedConfig | None = None
    fine_tunings: dict[Name, FineTuningConfig] = Field(default_factory=dict)


class LearningRateConfig(Config):
    """The same small sweep for every arm.

    Attributes:
        factors: multiples of the learning rate in the task's file that are tried; one factor is taken untried.
        seed: of the runs that are tried. One of the study's seeds saves its runs, one of its own keeps the choice apart
            from what is compared.
    """

    factors: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    seed: int = 1000


class StudyConfig(Config):
    """A whole study.

    Attributes:
        out: directory of all runs and results.
        match: what is held equal to the reference SMoE in every arm (``model.moe.match``).
        parity: what must agree to 2 % between arms that are compared: ``flops`` (per token, and active parameters) and
            ``params`` (all of them). None is what ``match`` means. A dense arm has no parameters to agree in.
        overrides: ``a.b=c`` settings of all runs.
        seeds: of the runs that are compared; arms are paired by them.
        comparisons: pairs of arms, the second being the reference. Empty: every arm with ``baseline``.
        confidence: of intervals, and of all verdicts together.
        variance: where the error of a difference comes from: the differences of those two arms alone (``own``), or the
            scatter of all arms about the means of arms and seeds (``pooled``), which few seeds need, and which takes
            it to be the same in all arms.
        keep_checkpoints: of finished runs, whose weights stay anyhow.
        num_timed_steps: of every arm and task, in turns with as many of the baseline, once all runs are finished.
    """

    title: str
    out: str
    match: Literal["flops", "params", "none"] = "flops"
    parity: tuple[Parity, ...] | None = None
    arms: Annotated[dict[Name, ArmConfig], Field(min_length=1)]
    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    overrides: Overrides = ()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    learning_rates: LearningRateConfig = LearningRateConfig()
    baseline: str
    comparisons: tuple[tuple[str, str], ...] = ()
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    variance: Literal["own", "pooled"] = "own"
    keep_checkpoints: bool = False
    num_timed_steps: Annotated[int, Field(ge=2)] = 15

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, values in (("seeds", self.seeds), ("learning_rates.factors", self.learning_rates.factors)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key}: {list(values)} names one of them twice")
        for name in (self.baseline, *(name for pair in self.comparisons for name in pair)):
            if name not in self.arms:
                known = list(self.arms)
                raise ValueError(f"'{name}' is not an arm{suggest(name, known)}; arms: {', '.join(known)}")
        for arm, reference in self.comparisons:
            if arm == reference:
                raise ValueError(f"comparisons: '{arm}' is compared with itself; give it a second arm with seed_offset")
        for task, config in self.tasks.items():
            _require_order(task, config)
            twice = sorted({name for name in config.other_metrics if name in config.metrics})
            if twice:
                raise ValueError(f"tasks.{task}.other_metrics: '{twice[0]}' is among its metrics already")
        return self

    @property
    def demanded_parity(self) -> tuple[Parity, ...]:
        if self.parity is not None:
            return self.parity
        return {"flops": ("flops", "params"), "params": ("params",), "none": ()}[self.match]  # type: ignore[return-value]


def _require_order(task: str, config: TaskConfig) -> None:
    """Fine-tunings stand behind those that they start from, so that there is no circle."""
    before: list[str] = []
    for name, fine_tuning in config.fine_tunings.items():
        if fine_tuning.after is not None and fine_tuning.after not in before:
            raise ValueError(
                f"tasks.{task}.fine_tunings.{name}.after: '{fine_tuning.after}' is not a fine-tuning before it"
                f"{suggest(fine_tuning.after, before)}; before it: {', '.join(before) or 'none'}"
            )
        before.append(name)
