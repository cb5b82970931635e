"""A run that was stopped goes on as if nothing had happened, on one process or several."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.train.metrics import read_metrics
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import ALONE, Consumed, figures, final_weights, pretraining, tensors_of_checkpoint, train


def merged(of_ranks: list[Consumed]) -> Consumed:
    """Samples of all ranks per step, in no particular order."""
    return [
        {source: sorted(i for ids in of_step for i in ids[source]) for source in of_step[0]}
        for of_step in zip(*of_ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Consumed]:
    """Four steps on one process."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, train(pretraining(shards, out))


def test_two_and_two_steps_are_four_bit_for_bit(shards: Path, tmp_path: Path, unbroken: tuple[Path, Consumed]) -> None:
    out = tmp_path / "run"
    first = train(pretraining(shards, out), stop_after=2)
    assert not (out / "model.safetensors").exists()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_0000002"]
    second = train(pretraining(shards, out))
    assert first + second == unbroken[1]
    assert tensors_of_checkpoint(out, 4) == tensors_of_checkpoint(unbroken[0], 4)
    assert final_weights(out) == final_weights(unbroken[0])
    assert figures(out) == figures(unbroken[0])
    assert list(figures(out)) == [1, 2, 3, 4]
    assert [r["load"] for r in read_metrics(out, "experts")] == [
        r["load"] for r in read_metrics(unbroken[0], "experts")
    ]


def test_training_moves_every_weight(unbroken: tuple[Path, Consumed], shards: Path, tmp_path: Path) -> None:
    """Otherwise equal weights would prove little: what resumes must have changed."""
    out = tmp_path / "run"
    train(pretraining(shards, out), stop_after=1)
    before, after = (tensors_of_checkpoint(folder, step) for folder, step in ((out, 1), (unbroken[0], 4)))
    unchanged = {name for name, value in after.items() if value == before[name]}
    assert {name for name in unchanged if "codebook" not in name} == set()


def test_a_finished_run_is_left_as_it_is(shards: Path, tmp_path: Path, unbroken: tuple[Path, Consumed]) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    before = (tensors_of_checkpoint(out, 4), figures(out), final_weights(out))
    assert train(pretraining(shards, out)) == []
    assert (tensors_of_checkpoint(out, 4), figures(out), final_weights(out)) == before


def test_a_finished_run_may_be_made_longer(shards: Path, tmp_path: Path, unbroken: tuple[Path, Consumed]) -> None:
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    assert len(train(pretraining(shards, out, max_steps=6))) == 2
    assert list(figures(out)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_two_processes(shards: Path, tmp_path: Path, unbroken: tuple[Path, Consumed], strategy: str) -> None:
    """Bit for bit among themselves; against one process the same samples, and losses up to rounding.

    Then the run that two processes began is finished by one.
    """
    whole, broken, on_one = (tmp_path / name for name in ("whole", "broken", "on_one"))
    settings: dict[str, Any] = {"strategy": strategy}

    def both(world: Any) -> tuple[Consumed, Consumed]:
        of_whole = train(pretraining(shards, whole, **settings), world)
        return of_whole, train(pretraining(shards, broken, **settings), world, stop_after=2)

    results = run_ranks(both, 2)
    shutil.copytree(broken, on_one)
    of_second = run_ranks(partial(train, pretraining(shards, broken, **settings)), 2)
    assert merged([of_whole for of_whole, _ in results]) == merged([unbroken[1]])
    assert merged([first for _, first in results]) + merged(of_second) == merged([unbroken[1]])
    assert tensors_of_checkpoint(broken, 4) == tensors_of_checkpoint(whole, 4)
    assert figures(broken) == figures(whole)
    assert figures(whole).keys() == figures(unbroken[0]).keys()
    assert_close(figures(whole), figures(unbroken[0]))

    assert train(pretraining(shards, on_one), ALONE) == unbroken[1][2:]
    assert_close(figures(on_one), figures(unbroken[0]))


def assert_close(found: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]]) -> None:
    for step, record in expected.items():
        assert found[step].keys() == record.keys()
        for name, value in record.items():
            if isinstance(value, float):
                assert found[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    shards: Path, tmp_path: Path, unbroken: tuple[Path, Consumed], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(pretraining(shards, out, checkpoint_every=1), stop_after=3)
    (file,) = (out / "checkpoints" / "step_0000003").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert train(pretraining(shards, out)) == unbroken[1][2:]
    assert "skipping a damaged checkpoint" in caplog.text
    assert figures(out) == figures(unbroken[0])
    assert tensors_of_checkpoint(out, 4) == tensors_of_checkpoint(unbroken[0], 4)


def test_other_shards_would_change_the_order_and_are_refused(shards: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(shards / "images-train", images)
    tree = pretraining(shards, out)
    tree["data"]["train"]["image"]["shards"] = str(images)
    train(tree, stop_after=1)
    (images / "manifest.json").unlink()
    for file in images.glob("*-00002.*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"the data order would change: .*restore these settings and shards"):
        train(tree)


def test_streams_train_and_resume_with_other_samples(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = pretraining(shards, tmp_path / "run")
    for source in tree["data"]["train"].values():
        source["shards"] = [shard.as_uri() for shard in sorted(Path(source["shards"]).glob("*.tar"))]
    first = train(tree, stop_after=2)
    caplog.clear()
    second = train(tree)
    assert [set(step) for step in first + second] == [{"image", "text", "pair"}] * 4
    assert all(len(ids) == 2 for step in first + second for ids in step.values())
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split()[1] for message in warned if "is streamed" in message] == ["image", "text", "pair"]
