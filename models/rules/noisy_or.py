"""Noisy-OR: the probability that at least one lesion is true, if each is true or false independently of the others.

Xu X et al. 2020, arXiv:2002.09334, combine the candidate regions of a chest CT this way; the rule itself is Pearl's
(Probabilistic Reasoning in Intelligent Systems, 1988).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class NoisyOr:
    """Scan probability 1 - Π(1 - p) over lesion probabilities (after Xu et al. 2020, arXiv:2002.09334)."""

    probability: float
    lesions: int


def noisy_or(probabilities: Iterable[float]) -> NoisyOr:
    """Combine lesion probabilities: 1 - Π(1 - p), 0 for none.

    Summed as logarithms and exactly (`math.fsum`), so that neither many small probabilities nor their order matter.

    Raises
    ------
    ValueError
        A probability outside 0 to 1.
    """
    given = list(probabilities)
    if not all(0 <= p <= 1 for p in given):
        raise ValueError("lesion probabilities lie between 0 and 1")
    if any(p == 1 for p in given):
        return NoisyOr(1.0, len(given))
    return NoisyOr(abs(math.expm1(math.fsum(math.log1p(-p) for p in given))), len(given))
