"""A power law with a floor through the losses of several sizes of the training set, with its band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_helpers.evaluation.intervals import CONFIDENCE, Estimate, Interval

RESAMPLES = 2000
# Measured exponents are between 0.07 and 0.35, and theory has 0.5 to 1 (Hestness et al., section 2). A larger one is a
# loss that has reached its floor.
EXPONENTS = np.geomspace(0.02, 2, 100)


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale x (rows / unit) ^ -exponent, as a difference to the base model in nats per token.

    Hestness et al., "Deep Learning Scaling is Predictable, Empirically", arXiv 1712.00409, section 3; for fine-tuning,
    Zhang et al., arXiv 2402.17193, eq. 1. `fitted` holds floor, scale and exponent, `resampled` the same for each
    resample: shape (resamples, 3). `unit` is the largest size.
    """

    fitted: np.ndarray
    resampled: np.ndarray
    unit: int

    def at(self, rows: float) -> Interval:
        """Difference to the base model after training on `rows` rows, with its band."""
        return self._band(lambda laws: _loss(laws, rows / self.unit))

    @property
    def doubling(self) -> Interval:
        """Change of the loss when the largest size doubles, with its band."""
        return self._band(lambda laws: _loss(laws, 2.0) - _loss(laws, 1.0))

    def _band(self, quantity: Callable[[np.ndarray], np.ndarray]) -> Interval:
        low, high = np.quantile(quantity(self.resampled), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(float(quantity(self.fitted[None])[0]), float(low), float(high))

    def to_dict(self) -> dict[str, float | dict[str, float | None]]:
        """Plain values, for a file."""
        names = ("floor", "scale", "exponent")
        return dict(zip(names, map(float, self.fitted), strict=True)) | {"doubling": self.doubling.to_dict()}


def _loss(laws: np.ndarray, size: float) -> np.ndarray:
    floor, scale, exponent = laws.T
    return floor + scale * size**-exponent


def fit(sizes: Sequence[int], estimates: Sequence[Estimate], lowest: float) -> PowerLaw:
    """Fit the law to the losses of `sizes`, with a floor of `lowest` or more, by least squares; see `_noise`."""
    losses = np.array([estimate.value for estimate in estimates])
    unit = max(sizes)
    laws = _least_squares(np.array(sizes) / unit, np.vstack([losses, losses + _noise(estimates)]), lowest)
    return PowerLaw(laws[0], laws[1:], unit)


def _noise(estimates: Sequence[Estimate]) -> np.ndarray:
    """How far the estimates may be off, by other rows and other seeds: shape (resamples, estimates).

    A bootstrap over rows and seeds: the residuals of each row, or of each seed, are multiplied by one normal number in
    all estimates (Wu, "Jackknife, bootstrap and other resampling methods in regression analysis", 1986, section 7).
    Seeds are few, so what they add is divided by the root of a chi-squared number, as in Student's t.
    """
    rng = np.random.default_rng(0)
    residuals = np.array([estimate.residuals for estimate in estimates])
    noise = rng.standard_normal((RESAMPLES, residuals.shape[1])) @ residuals.T
    for labels in dict.fromkeys(labels for estimate in estimates for labels in estimate.seeds):
        none, freedom = np.zeros(len(labels)), len(labels) - 1
        seeds = np.array([estimate.seed_residuals.get(labels, none) for estimate in estimates])
        spread = np.sqrt(rng.chisquare(freedom, (RESAMPLES, 1)) / freedom)
        noise += rng.standard_normal((RESAMPLES, len(labels))) @ seeds.T / spread
    return noise


def _least_squares(sizes: np.ndarray, losses: np.ndarray, lowest: float) -> np.ndarray:
    """Floor, scale and exponent for each line of `losses`: shape (lines, sizes) to (lines, 3).

    For a given exponent, floor and scale follow in closed form (separable least squares; Golub and Pereyra, 1973), so
    the best of a grid of exponents needs no start values and always ends. The scale is not negative.
    """
    best = np.full(len(losses), np.inf)
    laws = np.zeros((len(losses), 3))
    for exponent in EXPONENTS:
        power = sizes**-exponent
        centered = power - power.mean()
        scale = np.maximum(losses @ centered / (centered @ centered), 0)
        floor = losses.mean(axis=1) - scale * power.mean()
        under = floor < lowest
        scale[under] = np.maximum((losses[under] - lowest) @ power / (power @ power), 0)
        floor[under] = lowest
        errors = ((losses - floor[:, None] - np.outer(scale, power)) ** 2).sum(axis=1)
        better = errors < best
        best[better] = errors[better]
        laws[better] = np.stack([floor, scale, np.full_like(floor, exponent)], axis=1)[better]
    return laws
