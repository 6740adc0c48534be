"""On simulated data, how often intervals and certificates cover, against what they claim.

`python -m tests.studies coverage` prints a Markdown table and writes the same as JSON lines; a row whose claim is not
kept gives exit status 1. With `--quick` there are few simulations, to see that it runs, and the status is always 0.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm, pareto

from onnx_lathe.benchmarks.proportions import clopper_pearson_upper, drop_upper, paired_change, wilson
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.stats import (
    hodges_lehmann,
    least_samples,
    mean_interval,
    percentile,
    shift,
    studentized_bootstrap,
)
from onnx_lathe.benchmarks.verdict import compare
from tests.studies.macro_f1 import CASES as F1_CASES
from tests.studies.macro_f1 import bound as f1_bound
from tests.studies.simulated import MACHINES, QUIET, Machine, simulate

Vector = NDArray[np.float64]
Outcomes = NDArray[np.bool_]
Draw = Callable[[np.random.Generator, int], Vector]
"""Some independent values."""

FALSE_VERDICTS = 1 / 300
"""What the project allows itself of "faster" and "slower" where nothing differs."""
POWER = {1.03: 48 / 60, 1.05: 57 / 60}
"""What it promises to find, on a quiet machine in ten processes, by speed."""
SCORE = 0.94
"""A score bound claims its level, 95 %, within a point: it is an approximation (`drop_upper`)."""
TWO_SCORES = 0.93
"""An interval between two of them claims 95 % within two (`paired_change`)."""
UNLIKELY = 0.001
"""A claim counts as broken where what was found has at most this chance if it held: some hundred rows are tested."""


@dataclass(frozen=True)
class Effort:
    """How many simulations a row rests on, by what one costs."""

    proportions: int
    intervals: int
    verdicts: int
    powers: int
    means: int
    sets: int


FULL = Effort(proportions=20_000, intervals=2_000, verdicts=2_000, powers=300, means=400, sets=200)
"""About four minutes on one core."""
QUICK = Effort(proportions=200, intervals=20, verdicts=4, powers=2, means=4, sets=2)


@dataclass(frozen=True)
class Row:
    """One claim and what was found of it.

    Attributes:
        what: The function or rule.
        case: Its data.
        claimed: Share of simulations; None where nothing is promised.
        most: Whether the claim is "at most" and not "at least".
        found: Share of simulations in which the interval covered, or the verdict was given.
        low: Of Wilson's 95 % interval of that share.
        high: Of it.
        simulations: How many.
    """

    what: str
    case: str
    claimed: float | None
    most: bool
    found: float
    low: float
    high: float
    simulations: int

    @property
    def kept(self) -> bool:
        """Whether the simulations are not significantly worse than the claim: a one-sided binomial test."""
        if self.claimed is None:
            return True
        count = round(self.found * self.simulations)
        if self.most:
            return float(binom.sf(count - 1, self.simulations, self.claimed)) > UNLIKELY
        return float(binom.cdf(count, self.simulations, self.claimed)) > UNLIKELY


def row(what: str, case: str, claimed: float | None, outcomes: Sequence[bool] | Outcomes, most: bool = False) -> Row:
    """Tally the outcomes of simulations."""
    share = wilson(int(np.sum(outcomes)), len(outcomes))
    return Row(what, case, claimed, most, share.value, share.low, share.high, len(outcomes))


def _covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def _bimodal_quantile(quantile: float) -> float:
    """Return a quantile of 80 % normal around 1.0 and 20 % around 1.5, both of deviation 0.05."""
    grid = np.linspace(0.5, 2.0, 1_500_001)
    below = 0.8 * norm.cdf(grid, 1.0, 0.05) + 0.2 * norm.cdf(grid, 1.5, 0.05)
    return float(np.interp(quantile, below, grid))


LATENCIES: dict[str, tuple[Draw, Callable[[float], float]]] = {
    "normal": (lambda rng, n: rng.normal(1.0, 0.05, n), lambda q: float(norm.ppf(q, 1.0, 0.05))),
    "lognormal": (lambda rng, n: rng.lognormal(0.0, 0.5, n), lambda q: float(np.exp(0.5 * norm.ppf(q)))),
    "Pareto 1.5": (lambda rng, n: 1.0 + rng.pareto(1.5, n), lambda q: float(pareto.ppf(q, 1.5))),
    "bimodal": (
        lambda rng, n: rng.normal(np.where(rng.random(n) < 0.2, 1.5, 1.0), 0.05),
        _bimodal_quantile,
    ),
}


def percentiles(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """`percentile` on independent values, at the least number of them and at 2,000."""
    for quantile, (name, (draw, truth)) in product((0.5, 0.9, 0.99), LATENCIES.items()):
        for n in (least_samples(quantile), 2000):
            wanted = truth(quantile)
            found = [_covers(percentile(draw(rng, n), quantile), wanted) for _ in range(effort.intervals)]
            yield row(f"percentile p{100 * quantile:g}", f"{name}, n = {n}", 0.95, found)


def centres(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """`hodges_lehmann` on symmetric values, and `mean_interval` on normal ones and, promising nothing, skewed ones."""
    symmetric: dict[str, Draw] = {
        "normal": lambda rng, n: rng.normal(0.0, 1.0, n),
        "Student, 2 degrees of freedom": lambda rng, n: rng.standard_t(2, n),
        "bimodal": lambda rng, n: rng.normal(rng.choice([-2.0, 2.0], n), 0.5),
    }
    for (name, draw), n in product(symmetric.items(), (6, 12, 40)):
        found = [_covers(hodges_lehmann(draw(rng, n)), 0.0) for _ in range(effort.intervals)]
        yield row("hodges_lehmann", f"{name}, n = {n}", 0.95, found)
    for n in (3, 5, 30):
        found = [_covers(mean_interval(rng.normal(0.0, 1.0, n)), 0.0) for _ in range(effort.intervals)]
        yield row("mean_interval", f"normal, n = {n}", 0.95, found)
        found = [_covers(mean_interval(rng.exponential(1.0, n)), 1.0) for _ in range(effort.intervals)]
        yield row("mean_interval", f"exponential, n = {n}", None, found)


def shifts(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """`shift` of 10 against 10 values, exact for any shape that both share, and of 3 against 3, Welch's."""
    shapes: dict[str, tuple[Draw, float]] = {
        "normal": (lambda rng, n: rng.normal(0.0, 1.0, n), 1.0),
        "Student, 2 degrees of freedom": (lambda rng, n: rng.standard_t(2, n), 1.0),
        "exponential": (lambda rng, n: rng.exponential(1.0, n), 1.0),
        "normal, the second three times as wide": (lambda rng, n: rng.normal(0.0, 1.0, n), 3.0),
    }
    for (name, (draw, spread)), n in product(shapes.items(), (10, 3)):
        found = [_covers(shift(0.3 + draw(rng, n), spread * draw(rng, n)), 0.3) for _ in range(effort.intervals)]
        promised = spread == 1.0 if n == 10 else name.startswith("normal")
        yield row("shift", f"{name}, {n} v {n}", 0.95 if promised else None, found)


def verdicts(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """`compare` on simulated runs: the speed's interval, false verdicts, power."""
    for machine in MACHINES:
        same = _comparisons(machine, 1.0, effort.verdicts, rng)
        # In logarithms a true difference only moves the interval: it covers as often at any speed.
        yield row("compare, interval of the speed", machine.name, 0.95, same["covers"])
        false = same["faster"] | same["slower"]
        yield row("compare, false verdict", machine.name, FALSE_VERDICTS, false, most=True)
        yield row("compare, inconclusive", f"{machine.name}, no difference", None, same["inconclusive"])
        for speed, power in POWER.items():
            other = _comparisons(machine, speed, effort.powers, rng)
            case = f"{machine.name}, {speed - 1:.0%} faster"
            yield row("compare, found", case, power if machine is QUIET else None, other["faster"])
            yield row("compare, wrong direction", case, FALSE_VERDICTS, other["slower"], most=True)


def _comparisons(machine: Machine, speed: float, count: int, rng: np.random.Generator) -> dict[str, Outcomes]:
    """Return what holds of each simulated comparison, ``bool [simulations]`` by name."""
    found = [compare(*simulate(machine, speed, rng))[0] for _ in range(count)]
    outcomes = {
        verdict: [each.verdict == verdict for each in found] for verdict in ("faster", "slower", "inconclusive")
    }
    outcomes["covers"] = [_covers(each.speed, speed) for each in found]
    return {name: np.array(outcome) for name, outcome in outcomes.items()}


def shares(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """`wilson` and `clopper_pearson_upper` on binomial counts.

    A score interval has its level on average over all shares; at single ones it swings around it (Brown, Cai &
    DasGupta 2001, Statistical Science 16, p. 101), and promises nothing.
    """
    upper = cache(clopper_pearson_upper)
    score = cache(wilson)
    for n in (50, 200, 1000):
        chances = rng.random(effort.proportions)
        drawn = zip(rng.binomial(n, chances).tolist(), chances.tolist(), strict=True)
        yield row("wilson", f"any share, n = {n}", 0.95, [_covers(score(count, n), chance) for count, chance in drawn])
        for chance in (0.5, 0.9, 0.99):
            counts: list[int] = rng.binomial(n, chance, effort.proportions).tolist()
            covered = [_covers(score(count, n), chance) for count in counts]
            yield row("wilson", f"share {chance:g}, n = {n}", None, covered)
            covered = [upper(n - count, n) >= 1 - chance for count in counts]
            yield row("clopper_pearson_upper", f"share {1 - chance:.2g}, n = {n}", 0.95, covered)


DISCORDANT = ((0.01, 0.0), (0.002, 0.001), (0.01, 0.005), (0.03, 0.02), (0.1, 0.02), (0.1, 0.1), (0.01, 0.05))
"""Chances of a loss and of a gain in one sample."""


def paired(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """`drop_upper`, the certificate of what is right or wrong, and `paired_change`.

    The certificate promises where accuracy really falls: elsewhere a bound that is too low certifies nothing false.
    """
    bound = cache(drop_upper)
    change = cache(paired_change)
    for n, (loss, gain) in product((60, 200, 1000, 5000), DISCORDANT):
        draws: list[list[int]] = rng.multinomial(n, [loss, gain, 1 - loss - gain], effort.proportions).tolist()
        case = f"losses {loss:g}, gains {gain:g}, n = {n}"
        covered = [bound(losses, gains, n)[0] >= loss - gain for losses, gains, _ in draws]
        yield row("certificate, right or wrong", case, SCORE if loss > gain else None, covered)
        covered = [_covers(change(losses, gains, n), gain - loss) for losses, gains, _ in draws]
        yield row("paired_change", case, TWO_SCORES, covered)


DROPS: dict[str, tuple[Draw, float]] = {
    "exponential, mean 0.1": (lambda rng, n: rng.exponential(0.1, n), 0.1),
    "lognormal 1, mean 0.05": (lambda rng, n: 0.05 * rng.lognormal(-0.5, 1.0, n), 0.05),
    "gains and losses, skewed": (lambda rng, n: 0.3 * rng.beta(0.5, 2.0, n) - 0.03, 0.03),
    "one sample in 20 loses 0.5": (lambda rng, n: 0.5 * (rng.random(n) < 0.05).astype(np.float64), 0.025),
    "one sample in 100 loses all": (lambda rng, n: (rng.random(n) < 0.01).astype(np.float64), 0.01),
}
"""Drops of single samples, and their true mean."""


def means(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """The certificate of a mean of values: the bootstrap of the drop and `judge`'s floor under it."""
    for (name, (draw, truth)), n in product(DROPS.items(), (50, 200, 1000)):
        # `judge` also bootstraps what the two models are worth: three times the work, and nothing to do with the drop.
        limits = np.array([studentized_bootstrap(draw(rng, n), (0.95,))[0] for _ in range(effort.means)])
        case = f"{name}, n = {n}"
        yield row("studentized bootstrap alone", case, None, limits >= truth)
        yield row("certificate, mean", case, 0.95, np.maximum(limits, clopper_pearson_upper(0, n)) >= truth)


def macro_f1(effort: Effort, rng: np.random.Generator) -> Iterator[Row]:
    """The certificate of a metric of the whole set."""
    for case, n in product(F1_CASES, (100, 400, 1500)):
        truth = case.drop()
        limits = np.array([f1_bound(*case.draw(rng, n)) for _ in range(effort.sets)])
        yield row("BCa bootstrap alone", f"macro F1, {case.name}, n = {n}", None, limits >= truth)
        covered = np.maximum(limits, clopper_pearson_upper(0, n)) >= truth
        yield row("certificate, macro F1", f"{case.name}, n = {n}", 0.95, covered)


STUDIES = (percentiles, centres, shifts, shares, paired, verdicts, means, macro_f1)


def study(effort: Effort, seed: int = 0) -> Iterator[Row]:
    """Run all studies; each has its own stream of random numbers."""
    for number, part in enumerate(STUDIES):
        yield from part(effort, np.random.default_rng([seed, number]))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | data | claimed | found | 95 % interval | simulations | kept |", "|---|---|---|---|---|---|---|"]
    for each in rows:
        claimed = "none" if each.claimed is None else f"{'at most' if each.most else 'at least'} {each.claimed:.1%}"
        kept = "" if each.claimed is None else "yes" if each.kept else "**no**"
        cells = (each.what, each.case, claimed, f"{each.found:.1%}", f"{each.low:.1%} to {each.high:.1%}")
        lines.append(f"| {' | '.join(cells)} | {each.simulations} | {kept} |")
    return "\n".join(lines)


def run(effort: Effort, folder: Path) -> list[Row]:
    """Run the studies, and write ``coverage.jsonl``, row by row, and ``coverage.md`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (folder / "coverage.jsonl").open("w") as file:
        for each in study(effort):
            rows.append(each)
            file.write(json.dumps({**asdict(each), "kept": each.kept}) + "\n")
            file.flush()
    (folder / "coverage.md").write_text(table(rows) + "\n")
    return rows
