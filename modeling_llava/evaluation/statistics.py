"""Confidence intervals of scores, and paired differences between models."""

import math
from collections.abc import Sequence

import numpy as np


RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK = 2**22  # indices drawn at a time


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """95 % interval of a share, in [0, 1] (Wilson 1927); valid at 0, at 1 and for few samples."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959963984540054, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # Rounding would leave 0.9999… where it must be 1.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == total else centre + half


def bootstrap_ratios(
    scores: Sequence[float], out_of: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """`[resamples]`: Σ score / Σ out_of over samples drawn with replacement."""
    scores, out_of = np.asarray(scores, float), np.asarray(out_of, float)
    rng, ratios = np.random.default_rng(seed), []
    step = max(1, _CHUNK // max(1, len(scores)))
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(scores), (min(step, resamples - start), len(scores)))
        ratios.append(scores[drawn].sum(axis=1) / out_of[drawn].sum(axis=1))
    return np.concatenate(ratios)


def interval(scores: Sequence[float], out_of: Sequence[float] | None = None) -> tuple[float, float] | None:
    """95 % interval of Σ score / Σ out_of; `None` for fewer than two samples. Shares by Wilson, others by bootstrap."""
    if len(scores) < 2:
        return None
    if out_of is None and set(scores) <= {0.0, 1.0}:
        return wilson_interval(sum(scores), len(scores))
    ratios = bootstrap_ratios(scores, [1.0] * len(scores) if out_of is None else out_of)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def paired_difference(
    first: Sequence[tuple[float, float]],
    second: Sequence[tuple[float, float]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """
    Second minus first, in percentage points, on the same samples.

    Args:
        first, second (`list[tuple[float, float]]`): (score, out of) of each sample, in the same order.

    Returns:
        `dict`: `difference`; `interval`, 95 %, by a bootstrap that draws the same samples for both; `p_value`, two-sided: twice
        the share of resamples whose difference is on the other side of zero.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or len(first) == 0:
        raise ValueError(f"Paired samples are needed, got {len(first)} and {len(second)}.")

    def value(rows):
        return 100 * rows[..., 0].sum(axis=-1) / rows[..., 1].sum(axis=-1)

    rng, differences = np.random.default_rng(seed), []
    step = max(1, _CHUNK // len(first))
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(first), (min(step, resamples - start), len(first)))
        differences.append(value(second[drawn]) - value(first[drawn]))
    differences = np.concatenate(differences)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # One is added to both: with finitely many resamples no p-value is zero.
    tail = (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / (1 + len(differences))
    return {
        "difference": float(value(second) - value(first)),
        "interval": [float(low), float(high)],
        "p_value": float(min(1.0, 2 * tail)),
        "samples": len(first),
    }


__all__ = ["bootstrap_ratios", "interval", "paired_difference", "wilson_interval"]
