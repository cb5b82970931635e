"""The parts of pycocoevalcap that need Java: its tokenizer jar, METEOR and SPICE. Nothing is downloaded."""

from __future__ import annotations

import atexit
import math
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from pycocoevalcap.meteor.meteor import Meteor

from mhmoe_vl.evaluation.ptb_tokenizer import clean_caption_for_scoring, remove_punctuation

#: Image id to its tokenized captions: one hypothesis, or all references.
TokensById = Mapping[int, list[str]]

_INSTALL_JAVA = "install a Java runtime (version 8 or newer) and put it on PATH"
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_TOKENIZER_DEADLINE_S = 600
# Loading METEOR's paraphrase table takes half a minute on a busy machine.
_METEOR_START_S = 180
_METEOR_PER_CAPTION_S = 0.1


class MetricUnavailableError(Exception):
    """A Java tool cannot run here; the message is the reason and the remedy."""


@lru_cache(maxsize=1)
def java_runtime() -> str | None:
    """Path of a ``java`` that starts, or None. (macOS has a ``java`` that only asks for an installation.)"""
    java = shutil.which("java")
    if java is None:
        return None
    try:
        subprocess.run([java, "-version"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return java


def jar_tokenize(captions: Sequence[str]) -> list[str]:
    """Tokens of pycocoevalcap's jar, in the form of :func:`~mhmoe_vl.evaluation.ptb_tokenizer.ptb_tokenize`.

    Unlike pycocoevalcap's wrapper it writes no file into site-packages and does not depend on the locale.

    Raises:
        MetricUnavailableError: no Java, or the jar failed.
    """
    jar = _package_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = [_require_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "".join(clean_caption_for_scoring(caption) + "\n" for caption in captions)
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, check=True, timeout=_TOKENIZER_DEADLINE_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MetricUnavailableError(f"the tokenizer jar {jar} failed: {_explain(error)}") from None
    lines = done.stdout.decode().split("\n")[:-1]
    if len(lines) != len(captions):
        raise MetricUnavailableError(f"the tokenizer jar gave {len(lines)} lines for {len(captions)} captions")
    return [remove_punctuation(line.rstrip(" ").split(" ")) for line in lines]


def meteor(references: TokensById, hypotheses: TokensById) -> float:
    """METEOR 1.5 of the corpus, a fraction. One Java process (about 1.3 GB) is started and kept until exit.

    Raises:
        MetricUnavailableError: no Java, an unusable path, a failure, or no answer before the deadline.
    """
    process = _meteor_process()
    deadline_s = _METEOR_START_S + _METEOR_PER_CAPTION_S * len(hypotheses)
    timer = threading.Timer(deadline_s, process.meteor_p.kill)
    timer.start()
    try:
        score, _ = process.compute_score(references, hypotheses)
    except (OSError, ValueError):
        code = process.meteor_p.poll()
        close_meteor()
        raise MetricUnavailableError(
            f"METEOR's Java process failed or gave no answer in {deadline_s:.0f} s (exit code {code}); it needs 2 GB"
        ) from None
    finally:
        timer.cancel()
    return float(score)


def close_meteor() -> None:
    """End the METEOR process, if one runs."""
    if _meteor_process.cache_info().currsize:
        process = _meteor_process()
        _meteor_process.cache_clear()
        # compute_score() leaves its lock held when it fails, and Meteor.__del__ would wait for it for ever.
        if process.lock.locked():
            process.lock.release()
        process.meteor_p.kill()
        process.meteor_p.communicate()


def spice(references: TokensById, hypotheses: TokensById) -> float:
    """SPICE 1.0, a fraction, if its CoreNLP files are there.

    Raises:
        MetricUnavailableError: no Java, absent files, or a failure.
    """
    folder = _package_folder() / "spice" / "lib"
    absent = [name for name in _SPICE_JARS if not (folder / name).is_file()]
    if absent:
        raise MetricUnavailableError(
            f"{' and '.join(absent)} not in {folder}; put them there from stanford-corenlp-full-2015-12-09.zip "
            "(https://nlp.stanford.edu/software)"
        )
    _require_java()
    # Imported late: with absent files the constructor would download them.
    from pycocoevalcap.spice.spice import Spice

    try:
        score, _ = Spice().compute_score(references, hypotheses)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise MetricUnavailableError(f"SPICE failed: {_explain(error)}; it needs 8 GB and Java 8") from None
    if not math.isfinite(score):
        raise MetricUnavailableError("SPICE gave no number, because it found no scene graph in some caption")
    return float(score)


@lru_cache(maxsize=1)
def _meteor_process() -> Meteor:
    folder = _package_folder() / "meteor"
    _require_java()
    if " " in str(folder):
        raise MetricUnavailableError(f"METEOR cannot run from a path with a space ({folder}); install elsewhere")
    process = Meteor()
    atexit.register(close_meteor)
    return process


def _package_folder() -> Path:
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MetricUnavailableError("pycocoevalcap is not installed; pip install pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations)))


def _require_java() -> str:
    java = java_runtime()
    if java is None:
        raise MetricUnavailableError(f"no Java runtime; {_INSTALL_JAVA}")
    return java


def _explain(error: Exception) -> str:
    stderr = getattr(error, "stderr", None)
    last_line = stderr.decode(errors="replace").strip().split("\n")[-1] if stderr else ""
    return " ".join(f"{error} {last_line}".split())[:300]
