"""From a study to its runs: arms, cells and their order. Everything here is a pure function of the configuration, and
of which learning rates the sweep has chosen.

A cell is one run directory below ``out``:

sweep/TASK/ARM/x0.5           a learning rate that is tried
train/TASK/ARM/seed1          a run that is compared
fine/TASK/ARM/seed1/NAME      a fine-tuning of it, with its evaluation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from mhmoe_vl.config import ConfigFile
from mhmoe_vl.errors import ConfigError, suggest
from mhmoe_vl.study.config import ArmConfig, EvaluationConfig, StudyConfig
from mhmoe_vl.train.config import RunConfig


@dataclass(frozen=True)
class Arm:
    """An arm at one number of experts.

    Attributes:
        name: ``mhmoe`` or, where the configuration has several numbers, ``mhmoe-8``.
        family: name in the configuration.
    """

    name: str
    family: str
    config: ArmConfig
    num_experts: int | None


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        seed: of the study; the run's own is larger by the arm's ``seed_offset``.
        factor: of the learning rate, in a sweep.
        fine_tuning: name of the fine-tuning.
    """

    kind: Literal["sweep", "train", "fine"]
    task: str
    arm: Arm
    seed: int
    factor: float | None = None
    fine_tuning: str | None = None

    @property
    def name(self) -> str:
        if self.kind == "sweep":
            return f"sweep/{self.task}/{self.arm.name}/x{self.factor:g}"
        seed = f"{self.kind}/{self.task}/{self.arm.name}/seed{self.seed}"
        return seed if self.fine_tuning is None else f"{seed}/{self.fine_tuning}"


class Plan:
    """All cells of a study, and what each needs.

    Raises:
        ConfigError: the file of a task is not that of a run, or the settings of an arm make no model.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.arms = _arms_of(config)
        self._require_fine_tuned_arms()
        self._files: dict[str, ConfigFile[RunConfig]] = {}
        self._loaded: dict[tuple[str, str | None, str], RunConfig] = {}
        # Problems of any cell are found before the first one runs.
        for cell in self.cells:
            self.base_run(cell)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """In an order in which they can run: sweeps first, then seed after seed, each with all arms."""
        config = self.config
        tasks = config.tasks.items()
        cells: list[Cell] = []
        if self.is_swept:
            cells += [
                Cell("sweep", task, arm, config.learning_rates.seed, factor)
                for task, _ in tasks
                for arm in self.arms
                for factor in config.learning_rates.factors
            ]
        for seed in config.seeds:
            for task, of_task in tasks:
                cells += [Cell("train", task, arm, seed) for arm in self.arms]
                cells += [
                    Cell("fine", task, arm, seed, None, name)
                    for name in of_task.fine_tunings
                    for arm in self.fine_tuned_arms(task, name)
                ]
        return tuple(cells)

    def fine_tuned_arms(self, task: str, fine_tuning: str) -> list[Arm]:
        names = self.config.tasks[task].fine_tunings[fine_tuning].arms
        return [arm for arm in self.arms if names is None or not {arm.name, arm.family}.isdisjoint(names)]

    @property
    def is_swept(self) -> bool:
        return len(self.config.learning_rates.factors) > 1

    def _require_fine_tuned_arms(self) -> None:
        known = [*dict.fromkeys(name for arm in self.arms for name in (arm.name, arm.family))]
        for task, of_task in self.config.tasks.items():
            for name, fine_tuning in of_task.fine_tunings.items():
                key = f"tasks.{task}.fine_tunings.{name}.arms"
                for arm in fine_tuning.arms or ():
                    if arm not in known:
                        raise ConfigError(
                            f"{key}: '{arm}' is not an arm{suggest(arm, known)}; arms: {', '.join(known)}"
                        )
                if fine_tuning.after is not None:
                    before = self.fine_tuned_arms(task, fine_tuning.after)
                    missing = [arm.name for arm in self.fine_tuned_arms(task, name) if arm not in before]
                    if missing:
                        raise ConfigError(f"{key}: {', '.join(missing)} is not among those of '{fine_tuning.after}'")

    def cell(self, name: str) -> Cell:
        """Raises:
        ConfigError: there is none of this name.
        """
        names = [cell.name for cell in self.cells]
        if name not in names:
            raise ConfigError(f"--cell: '{name}' is not in this study{suggest(name, names)}; --list shows all")
        return self.cells[names.index(name)]

    def needs(self, cell: Cell) -> list[Cell]:
        """Cells that must be finished before this one can start."""
        if cell.kind == "sweep":
            return []
        if cell.kind == "train":
            return self.sweep_of(cell.task, cell.arm)
        assert cell.fine_tuning is not None
        after = self.config.tasks[cell.task].fine_tunings[cell.fine_tuning].after
        kind: Literal["train", "fine"] = "train" if after is None else "fine"
        return [Cell(kind, cell.task, cell.arm, cell.seed, None, after)]

    def sweep_of(self, task: str, arm: Arm) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "sweep" and cell.task == task and cell.arm == arm]

    def base_run(self, cell: Cell) -> RunConfig:
        """The run of a cell but for its directory, the learning rate of the sweep, and the weights to start from."""
        key = (cell.task, cell.fine_tuning, cell.arm.name)
        if key not in self._loaded:
            self._loaded[key] = self._load(cell)
        seed = cell.seed + cell.arm.config.seed_offset
        return self._loaded[key].model_copy(update={"seed": seed, "init_from": None, "out": cell.name})

    def _load(self, cell: Cell) -> RunConfig:
        study = self.config
        task = study.tasks[cell.task]
        source = task if cell.fine_tuning is None else task.fine_tunings[cell.fine_tuning]
        arm = cell.arm
        model = [f"model.moe.match={study.match}", f"model.ffn={arm.config.ffn}"]
        if arm.num_experts is not None:
            model.append(f"model.moe.num_experts={arm.num_experts}")
        settings = [*study.overrides, *source.overrides, *model, *arm.config.overrides]
        if cell.fine_tuning is None:
            settings += arm.config.task_overrides
        try:
            if source.config not in self._files:
                self._files[source.config] = ConfigFile(RunConfig, source.config)
            return self._files[source.config].load(settings)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name} of task {cell.task}: {error}") from None

    def evaluation(self, cell: Cell) -> EvaluationConfig | None:
        if cell.fine_tuning is None:
            return None
        return self.config.tasks[cell.task].fine_tunings[cell.fine_tuning].evaluation

    @cached_property
    def comparisons(self) -> list[tuple[Arm, Arm]]:
        """Arms with their references; of families with several numbers of experts, those of the same number, and a
        family without a number with each."""
        config = self.config
        pairs = config.comparisons or [(name, config.baseline) for name in config.arms if name != config.baseline]
        found = [
            (arm, reference)
            for name, of_reference in pairs
            for arm in self._family(name)
            for reference in self._family(of_reference)
            if arm.num_experts == reference.num_experts or None in (arm.num_experts, reference.num_experts)
        ]
        for name, of_reference in pairs:
            if not any((a.family, r.family) == (name, of_reference) for a, r in found):
                raise ConfigError(f"comparisons: {name} and {of_reference} have no number of experts in common")
        return found

    def _family(self, name: str) -> Sequence[Arm]:
        return [arm for arm in self.arms if arm.family == name]


def _arms_of(config: StudyConfig) -> list[Arm]:
    arms = []
    for name, arm in config.arms.items():
        numbers = arm.num_experts
        if isinstance(numbers, tuple):
            arms += [Arm(f"{name}-{number}", name, arm, number) for number in numbers]
        else:
            arms.append(Arm(name, name, arm, numbers))
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"arms: two of them are called '{name}'; rename one")
    return arms
