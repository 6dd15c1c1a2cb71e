"""Sums that several oracles need; this holds no case."""

from torch import Tensor


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all values, by sums."""
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


def shaped(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.reshape(1, -1, *[1] * (x.dim() - 2))


def moved(
    state: dict[str, Tensor], means: Tensor, variances: Tensor, share: float
) -> dict[str, Tensor]:
    """The running values after a batch."""
    return {
        'running_mean': (1 - share) * state['running_mean'] + share * means,
        'running_var': (1 - share) * state['running_var'] + share * variances,
    }
