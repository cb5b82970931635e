"""python -m eval.language --run runs/language/english --config configs/eval/language.yaml

Zero-shot scores through lm-evaluation-harness (pip install 'mhmoe_vl[lm]'). A run of language_modeling is scored by
log-likelihood; a run of pretrain by pseudo-log-likelihood, one forward pass per token. Without access to the hub:
  python -m eval.language --run runs/language/english --config configs/eval/language.yaml --local-data tasks
reads tasks/arc_easy/validation.jsonl and so on, with the fields of the original data sets; --include adds task files.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from eval.command_line import positive
from mhmoe_vl.config import load_config
from mhmoe_vl.distributed.world import launched_world_size, open_world
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.likelihood import CausalScorer, MaskedScorer, Scorer
from mhmoe_vl.evaluation.lm_harness import LanguageEvaluationConfig, LanguageScores, run_harness
from mhmoe_vl.tasks.language_modeling import LanguageModelingTask
from mhmoe_vl.tasks.pretrain import PretrainTask
from mhmoe_vl.train.run_directory import load_run
from mhmoe_vl.train.trained import TrainedRun, cost_of, load_trained

_SCORINGS = {"language_modeling": "log-likelihood", "pretrain": "pseudo-log-likelihood"}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(argv)
    with exit_on_user_error():
        if launched_world_size() > 1:
            raise ConfigError("eval.language runs on one process, without torchrun")
        config = load_config(LanguageEvaluationConfig, args.config, args.overrides)
        kind = load_run(args.run).task.kind
        if kind not in _SCORINGS:
            raise ConfigError(f"--run: {args.run} is a run of '{kind}'; it must be of {' or '.join(_SCORINGS)}")
        with open_world() as world:
            trained = load_trained(args.run, world, task_kind=kind)
            scores, version = run_harness(
                scorer_of(trained, batch_size=args.batch_size),
                config,
                include=args.include,
                local_data=args.local_data,
                limit=args.limit,
            )
        card = LanguageScores(
            scores,
            scoring=_SCORINGS[kind],
            num_fewshot=config.num_fewshot,
            harness_version=version,
            limit=args.limit,
            seed=trained.config.seed,
            cost=cost_of(args.run),
            command=shlex.join(["python", "-m", "eval.language", *argv]),
        )
        card.show()
        card.write(args.out or args.run / f"{args.config.stem}_scores.json")
    return 0


def scorer_of(trained: TrainedRun, *, batch_size: int) -> Scorer:
    """What scores texts with a run of language modeling or pretraining."""
    length = trained.config.data.text_length
    if isinstance(trained.task, LanguageModelingTask):
        return CausalScorer(trained.task, trained.tokenizer, max_length=length, batch_size=batch_size)
    return MaskedScorer(cast(PretrainTask, trained.task), trained.tokenizer, max_length=length, batch_size=batch_size)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.language", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="directory of a run of language modeling or pretraining"
    )
    parser.add_argument("--config", type=Path, required=True, help="tasks and metrics; see configs/eval")
    parser.add_argument(
        "--include",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with task files; may be repeated",
    )
    parser.add_argument("--local-data", type=Path, metavar="DIR", help="read DIR/TASK/validation.jsonl, not the hub")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="scores as JSON (default: RUN/CONFIG_scores.json)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
