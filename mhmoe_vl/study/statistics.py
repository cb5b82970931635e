"""What few seeds can say: means, paired differences, their confidence intervals, and a verdict in words.

Two arms of a study see the same data in the same order from the same weights where they share some, once per seed.
Their results are therefore compared in pairs, and what a seed does to both drops out. Intervals and p-values are
Student's, for the mean of the differences; several comparisons are corrected by Holm's method (Scandinavian Journal of
Statistics 6, 1979), which needs no independence.

Three pairs have two degrees of freedom, with which next to nothing survives a correction for many comparisons. All arms
together have more: they are a randomised complete block design, with the seeds as its blocks (Montgomery, Design and
Analysis of Experiments, chapter 4). :func:`residual_scatter` is its residual; the scatter has to be alike in all arms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import special


@dataclass(frozen=True)
class Summary:
    """Mean over seeds, with its standard error.

    Attributes:
        sd: standard deviation of single runs, n - 1 in the denominator; None for one run.
    """

    n: int
    mean: float
    sd: float | None

    @property
    def standard_error(self) -> float | None:
        return None if self.sd is None else self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences of one arm to another over the seeds that both have.

    Attributes:
        margin: half the width of the confidence interval of the mean; None for one pair.
        p: two-sided p-value of Student's test that the mean is 0; None for one pair. 1 where all differences are 0.
    """

    n: int
    mean: float
    standard_error: float | None
    margin: float | None
    p: float | None

    @property
    def is_identical(self) -> bool:
        """Whether the two arms agree in every seed, to the last bit."""
        return self.mean == 0 and self.standard_error in (0, None)

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.margin is None else (self.mean - self.margin, self.mean + self.margin)


@dataclass(frozen=True)
class Scatter:
    """What is left of the results once the means of arms and of seeds are taken out.

    Attributes:
        sd: standard deviation of a single result.
        degrees: of freedom of ``sd``.
    """

    sd: float
    degrees: int


def residual_scatter(arms: Sequence[Mapping[int, float]]) -> Scatter | None:
    """Over the seeds that all ``arms`` have; None with fewer than two arms or two such seeds.

    Args:
        arms: results of each arm by seed. With two of them this is the scatter of their differences over sqrt(2).
    """
    seeds = sorted(set.intersection(*(set(arm) for arm in arms))) if arms else []
    if len(arms) < 2 or len(seeds) < 2:
        return None
    degrees = (len(arms) - 1) * (len(seeds) - 1)
    of_arm = [statistics.fmean(arm[seed] for seed in seeds) for arm in arms]
    of_seed = [statistics.fmean(arm[seed] for arm in arms) for seed in seeds]
    mean = statistics.fmean(of_arm)
    squares = math.fsum(
        (arm[seed] - arm_mean - seed_mean + mean) ** 2
        for arm, arm_mean in zip(arms, of_arm, strict=True)
        for seed, seed_mean in zip(seeds, of_seed, strict=True)
    )
    return Scatter(math.sqrt(squares / degrees), degrees)


def summarize(values: Sequence[float]) -> Summary:
    """Of the results of at least one run."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(len(values), statistics.fmean(values), sd)


def paired_difference(
    arm: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    confidence: float = 0.95,
    scatter: Scatter | None = None,
) -> PairedDifference | None:
    """``arm`` minus ``reference``, by seed; None if they have no seed in common.

    Args:
        arm, reference: results by seed.
        confidence: of the interval, between 0 and 1.
        scatter: of single results, where the error is not to come from the differences themselves.
    """
    differences = [arm[seed] - reference[seed] for seed in sorted(arm.keys() & reference.keys())]
    if not differences:
        return None
    of_pairs = summarize(differences)
    standard_error, degrees = of_pairs.standard_error, of_pairs.n - 1
    if standard_error is None:
        return PairedDifference(1, of_pairs.mean, None, None, None)
    # Arms that agree to the last bit have no error, whatever the others do.
    if scatter is not None and (of_pairs.mean, standard_error) != (0, 0):
        standard_error, degrees = scatter.sd * math.sqrt(2 / of_pairs.n), scatter.degrees
    quantile = _quantile(confidence, degrees)
    if standard_error == 0:
        p = 1.0 if of_pairs.mean == 0 else 0.0
    else:
        p = 2 * float(special.stdtr(degrees, -abs(of_pairs.mean) / standard_error))
    return PairedDifference(of_pairs.n, of_pairs.mean, standard_error, quantile * standard_error, p)


def _quantile(confidence: float, degrees: int) -> float:
    """Student's, which two-sided intervals reach to. (``scipy.stats`` has it too, and takes seconds to import.)"""
    return float(special.stdtrit(degrees, (1 + confidence) / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being compared together, in the same order: those below a level are significant at it.

    The i-th smallest of m is multiplied by m - i + 1, is at least as large as the one before it, and at most 1.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class NoiseFloor:
    """How far runs lie apart that differ in their seed alone.

    Attributes:
        sd: standard deviation of single runs within an arm, pooled over the arms.
        degrees: of freedom of ``sd``.
        detectable: difference of two means of n seeds each that unpaired runs would have to exceed.
    """

    sd: float
    degrees: int
    detectable: float


def noise_floor(groups: Sequence[Sequence[float]], *, confidence: float = 0.95) -> NoiseFloor | None:
    """Pooled over arms with several runs each; None if there is none.

    Args:
        groups: results of each arm over its seeds.
    """
    groups = [group for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in groups)
    if degrees == 0:
        return None
    sd = math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / degrees)
    n = min(map(len, groups))
    quantile = _quantile(confidence, degrees)
    return NoiseFloor(sd, degrees, quantile * sd * math.sqrt(2 / n))


def verdict(
    arm: str, reference: str, difference: PairedDifference, adjusted_p: float | None, *, unit: str, confidence: float
) -> str:
    """One sentence.

    Args:
        adjusted_p: by :func:`holm`.
        unit: of the difference.
    """
    n = difference.n
    if difference.is_identical:
        return f"{arm} and {reference}: identical at {n} seed{'s' if n > 1 else ''}"
    if difference.margin is None or adjusted_p is None:
        return f"{arm} and {reference}: one seed says nothing ({f'{signed(difference.mean)} {unit}'.rstrip()})"
    if adjusted_p < 1 - confidence:
        direction = "lower" if difference.mean < 0 else "higher"
        by = f"{rounded(abs(difference.mean), difference.margin)} ± {rounded(difference.margin, difference.margin)}"
        return f"{arm} {direction} than {reference} by {by} {unit}".rstrip()
    by = f"{signed(difference.mean, difference.margin)} ± {rounded(difference.margin, difference.margin)}"
    return f"{arm} and {reference}: no difference at {n} seeds ({f'{by} {unit}'.rstrip()})"


def rounded(value: float, margin: float) -> str:
    """``value`` to the second digit of its ``margin``."""
    digits = 4 if margin == 0 else max(0, 1 - math.floor(math.log10(margin)))
    return f"{value:.{min(digits, 8)}f}"


def signed(value: float, margin: float | None = None) -> str:
    text = f"{abs(value):.4g}" if margin is None else rounded(abs(value), margin)
    return f"{'-' if value < 0 else '+'}{text}"
