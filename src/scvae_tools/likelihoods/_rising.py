"""Log of Γ(x + r) / (Γ(r) r^x), a factor of the negative binomial, and its derivative: stable in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def log_rising_ratio(x: Tensor, r: Tensor) -> Tensor:
    """Log of Γ(x + r) / (Γ(r) r^x), accurate in float32 for every r > 0 and x ≥ 0.

    The difference of two ``lgamma`` cancels for large r: in float32 it is wrong by 0.015 nats at r = e^10 and by 72 at
    e^18. Here both are first shifted up by six, Γ(t) = Γ(t + 6) / (t (t + 1) ⋯ (t + 5)), and the difference of the two
    Stirling series is then taken term by term, so that no large numbers are subtracted:
    with s = r + 6 and c(t) = 1/(12t) − 1/(360t³) + 1/(1260t⁵),

        log Γ(x + s) − log Γ(s) − x log s = (s + x − ½) log1p(x/s) − x + c(s + x) − c(s).

    The first term of the series left out is below 2·10⁻⁹ at s = 6. The gradient comes from the same elementary
    functions, so neither ``lgamma`` nor ``digamma`` is evaluated.
    """
    shifted = r + 6
    series = (shifted + x - 0.5) * torch.log1p(x / shifted) - x
    series = series + _stirling_correction(shifted + x) - _stirling_correction(shifted)
    # The first factor can be as large as x/r, and all six together would overflow float32 for counts above 10^5.
    steps = 1 + x / (r + 1)
    for step in range(2, 6):
        steps = steps * (1 + x / (r + step))
    ratio = series + x * torch.log1p(6 / r) - torch.log1p(x / r) - torch.log(steps)
    return torch.where(x == 1, 0.0, ratio)  # exact, as more than half of the counts above 0 are 1


def differentiate_log_rising_ratio(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """`log_rising_ratio`, and its derivative by log r: r [ψ(x + r) − ψ(r)] − x with ψ the digamma function.

    Both are exactly 0 at x = 1, where nothing is computed: more than half of the counts above 0 are 1.
    """
    is_one = x == 1
    if x.ndim != 1 or x.device.type != "cpu":  # on another device, selecting the others would wait
        parts = _differentiate_log_rising_ratio(x, r.expand_as(x))
        value, by_log_r = (torch.where(is_one, 0.0, part) for part in parts)
        return value, by_log_r
    others = torch.nonzero(~is_one)[:, 0]
    parts = _differentiate_log_rising_ratio(x.index_select(0, others), r.expand_as(x).index_select(0, others))
    value, by_log_r = (torch.zeros_like(x).index_copy_(0, others, part) for part in parts)
    return value, by_log_r


def _differentiate_log_rising_ratio(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of `differentiate_log_rising_ratio` for any x, without the shortcut at x = 1.

    ψ is shifted up by six too, ψ(t) = ψ(t + 6) − Σ_j 1/(t + j), and the two series, of ψ(t) = log t − 1/(2t) + c'(t),
    are subtracted term by term:

        ψ(x + r) − ψ(r) = log1p(x/s) + h(s) − h(s + x) + Σ_j x / ((r + j)(x + r + j)),    h(t) = 1/(2t) − c'(t).

    The terms at both ends, s and s + x, are computed in one operation, and so are the terms of all steps j.
    """
    ends = torch.stack([r, r + x]).add_(6)  # s and s + x
    inverse = ends.reciprocal()
    square = inverse * inverse
    correction = inverse * (1 / 12 - square * (1 / 360 - square / 1260))
    slope_correction = inverse * (0.5 + inverse * (1 / 12 - square * (1 / 120 - square / 252)))
    log_ratio = torch.log1p(x * inverse[0])
    steps = torch.arange(1, 6, dtype=r.dtype, device=r.device).reshape(5, *[1] * r.ndim) + r
    quotients = x / steps
    value = (ends[1] - 0.5) * log_ratio - x
    value += correction[1] - correction[0]
    value += x * torch.log1p(6 / r)
    value -= torch.log1p(x / r)
    slope = log_ratio + (quotients / steps.add_(x)).sum(0)
    slope += slope_correction[0] - slope_correction[1]
    value -= quotients.add_(1).prod(0).log_()
    return value, slope.mul_(r).add_(x / (r + x)).sub_(x)


def _stirling_correction(t: Tensor) -> Tensor:
    inverse = 1 / t
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))
