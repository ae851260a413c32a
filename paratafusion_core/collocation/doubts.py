"""A sign that a run may have ended in another picture than the sequential one, from numbers that it has anyway.

Where the denoiser chooses between pictures late, a small early error decides which, and neither the estimate in dB nor
the rows show it: at window 1 rows are evaluated twice only where many can be spent, so that no slope is known. Four
numbers tell such runs from others, and their logarithms add up to a risk:

- the estimate in dB: how large the error was before it grew;
- the steepest slope along a change between two evaluations of a row (``certificate.py``), 1 where there is none;
- how abruptly D settles: its largest change over a gap below ``HIGH`` over the largest below ``LOW`` (noise in units
  of the data's rms). Small ratios are detail that goes on forming to the end, large ones a picture chosen at once;
- the surprise: the largest distance between D and what the rows before had foreseen, over sigma, as vectors. It bounds
  by how much the odds between two pictures are off that a state was judged by.

How they were weighed: a logistic fit, rounded, on cases of the bench's ``paper`` with an earlier placement and estimate
(9809 runs of the ideal denoiser, the demo network and the mixture, 97 below 20 dB). With this one far fewer go wrong:
of the 2304 of seeds 0 to 7, 11, all of one prompt at CFG 7.5. 10 of them are called doubtful, as are of those from 20
dB on 24 % of the demo network (at CFG 7.5 most, where few rows are few), 3 % of the mixture and 3 % of the ideal
denoiser. With nodes evaluated again from 15 rows on, else the same: 4 of 5 and 12 % of the ideal denoiser's (seeds 20
to 33, 1344 runs). Neither a bound of the growth along the path nor the changes of the picture from round to round added
anything in five-fold tests by seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import certificate
from ..report import Report
from ..rows import Scales
from .impact import Impact

#: The risk from which a run is doubtful, and what a dB of the estimate and the three logarithms count.
RISKY = -4.0
_DB, _SLOPE, _ABRUPT, _SURPRISE = -0.15, 1.8, 0.9, 0.9
#: Noise below which D's changes are compared, and above which surprises count, in units of the data's rms.
HIGH, LOW, _LOUD = 7.0, 1.5, 0.5
#: Changes of D smaller than this share of the data's rms are none.
_NONE = 1e-3
#: Estimates for the picture's own range below this are a reason of their own in the report.
_POOR = 30.0
#: The only sign where each step adds noise: D jumps with it, and neither jumps nor surprises tell anything. Of 560 runs
#: (two networks) 14 of the 21 that end below 30 dB are estimated below this, and a fifth of the others.
_POOR_IN_NOISE = 36.0


@dataclass(frozen=True)
class Signs:
    """What a run has shown so far.

    Attributes:
        steepest: the largest slope, and the sigma of its row. surprise: the largest, 0 while nothing was foreseen.
    """

    steepest: tuple[float, float] = (0.0, 0.0)
    surprise: float = 0.0


def watch(signs: Signs, seen: Impact, scales: Scales, rows: list[int], size: int) -> Signs:
    """``signs`` after a round that evaluated ``rows``; ``size`` is the numbers of one image's state."""
    slope, row = seen.steepest
    level = scales.noise[rows]
    off = (seen.surprise * size**0.5 / (level * scales.data_rms))[level > _LOUD]
    steepest = max(signs.steepest, (slope, float(scales.sigma[row])))
    return Signs(steepest, max([signs.surprise, *off.tolist()]))


def abruptness(turns: Tensor, level: Tensor) -> float:
    """The largest of ``turns`` ``[n-1]`` below ``HIGH`` over the largest below ``LOW``.

    Args:
        turns: rms change of D over each gap, level: ``[n-1]`` noise where the gap begins; in units of the data's rms.
    """
    high, low = (max([_NONE, *turns[level < bound].tolist()]) for bound in (HIGH, LOW))
    return high / low


def risk(estimated_db: float, slope: float, abrupt: float, surprise: float) -> float:
    """The sum; doubtful from ``RISKY`` on."""
    logs = (_SLOPE * math.log(max(slope, 1.0)), _ABRUPT * math.log(abrupt), _SURPRISE * math.log(max(surprise, 1e-3)))
    return _DB * estimated_db + sum(logs)


def doubt(
    signs: Signs,
    rows: list[int],
    seen: Impact,
    scales: Scales,
    report: Report,
    own_db: float | None,
    noisy: bool = False,
) -> str | None:
    """The report's sentence on the nodes ``rows``, None where there is nothing to say.

    ``own_db`` is the estimate for the picture's own range, which the risk was weighed with. ``noisy``: each step adds
    noise of its own.
    """
    target, found = report.target_db, report.estimated_db
    if found is None or own_db is None:  # stopped on the way
        return certificate.doubt(signs.steepest)
    said = []
    if target is not None and found < target:
        near = f"{found:.0f}" if round(found) < target else f"{math.floor(10 * found) / 10:.1f}"
        said.append(f"an estimated {near} dB of the {target:g} dB asked for")
    abrupt = abruptness(seen.turns / scales.data_rms, scales.noise[rows[:-1]])
    unknown = len(rows) < 3  # nothing was foreseen that could have surprised
    few = unknown or own_db < (_POOR_IN_NOISE if noisy else _POOR)
    risky = few if noisy else unknown or risk(own_db, signs.steepest[0], abrupt, signs.surprise) >= RISKY
    if risky:
        why = "its rows are too few" if few else "the model chose it abruptly, where small errors decide"
        said.append(
            f"this may be another picture than the sampler's own, as {why} (an estimated {found:.0f} dB): more rows, a "
            "higher target in dB, or the quasi-newton solver makes it surer"
        )
    return "; ".join(said) or None
