"""Ours: an objective read off the run's own losses, and the density of least gradient variance for it."""

import math

import torch

from .importance import ImportanceSampler

MAX_SIGMA = 80.0  # EDM's sigma_max (arXiv 2206.00364, table 1): beyond it nothing is to be seen of an image


class AdaptiveSampler(ImportanceSampler):
    """c_t ∝ sigma_t^q * (-dE[l_t]/dt), p_t ∝ c_t * sqrt(E[l_t]), w_t = c_t / (T * p_t).

    Where an error of the network matters to what is sampled, for images with principal components of standard
    deviations s_i: an error e of its predicted noise in component i, at noise level sigma, moves the end of ancestral
    sampling by 2 e sigma s_i^2 / (s_i^2 + sigma^2) per unit of log sigma (the error of the drift, shrunk by the steps
    that follow). Relative to s_i, its square is 4 e^2 b_i with the bump b_i = (s_i sigma / (s_i^2 + sigma^2))^2: a
    component is decided around sigma = s_i. The least loss there is, L = mean_i s_i^2 / (s_i^2 + sigma^2), falls by
    just these bumps, -dL/dlog(sigma) = 2 mean_i b_i. So the slope of the loss, which every run measures, is the
    objective under which all components count alike; with weights s_i^q it is sigma^q times the slope.
    q = 2 is the squared error of pixels, q = 0 that of each component in its own unit.

    The slope is that of the loss as it is, not of the least one: it begins at the noise levels that are learned first,
    the high ones, and moves to lower ones as these are learned; the density follows.

    The slope is that of a local linear regression of the losses on log sigma, over the draws that `ImportanceSampler`
    remembers; where the loss does not fall it counts as zero. Until warmed up, c_t is the loss weighting and p_t
    uniform.

    Args:
        loss_weights: [T] the objective until warmed up.
        amplitude_power: q.
        bandwidth: standard deviation of the regression's Gaussian kernel, in units of log sigma.
        floor: share of a constant objective, which keeps every timestep alive.
    """

    state_names = (*ImportanceSampler.state_names, "loss_weights")

    def __init__(self, schedule, loss_weights=None, *, amplitude_power=0.5, bandwidth=0.3, floor=0.01, **options):
        if not bandwidth > 0:
            raise ValueError(f"bandwidth must be greater than 0, not {bandwidth}")
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be in (0, 1], not {floor}")
        super().__init__(schedule, loss_weights, **options)
        self.floor = floor
        self._initial_weights = self.loss_weights
        log_sigma = schedule.sigma.clamp(max=MAX_SIGMA).log()
        grid = regression_grid(log_sigma, bandwidth / 2)
        distance = log_sigma - grid[:, None]
        kernel = torch.exp(-0.5 * (distance / bandwidth) ** 2)
        self._moments = (torch.stack([kernel, kernel * distance, kernel * distance**2])).to(self.device)  # [3, K, T]
        self._interpolate = interpolation(grid, log_sigma).to(self.device)
        amplitude = (amplitude_power * log_sigma).exp() * torch.gradient(log_sigma)[0]
        self._amplitude = self._table(amplitude)

    def loss_slope(self):
        """[T] the current estimate of dE[l_t]/dlog(sigma_t)."""
        losses, draws = self.sums.double()
        n, nu, nuu = (self._moments * draws).sum(-1)  # [K]: of 1, u and u^2, with u = log sigma - that of the grid
        y, yu = (self._moments[:2] * losses).sum(-1)
        spread = n * nuu - nu.square()
        slope = torch.where(spread > 1e-9 * n.square(), (n * yu - nu * y) / spread, 0.0)
        low, share = self._interpolate
        low = low.long()
        return torch.lerp(slope[low], slope[low + 1], share).float()

    def objective(self):
        """[T] c_t, of mean 1, as the losses are now."""
        fall = self._amplitude * (-self.loss_slope()).clamp_min(0.0)
        return (1 - self.floor) * fall / fall.mean().clamp_min(1e-30) + self.floor

    def _renew(self, pending):
        self._learn(pending)
        objective = self.objective()
        self.loss_weights = torch.where(self.is_warm, objective / objective.mean(), self._initial_weights)
        self._renew_density()


def regression_grid(log_sigma, spacing):
    """[K] float64, K >= 2 equally spaced points, at most `spacing` apart, over the range of `log_sigma` [T]."""
    low, high = log_sigma.min().item(), log_sigma.max().item()
    return torch.linspace(low, high, max(2, math.ceil((high - low) / spacing) + 1), dtype=torch.float64)


def interpolation(grid, points):
    """[2, N] the index of the point of `grid` below each of `points` [N], and how far it is on the way to the next."""
    position = (points - grid[0]) / (grid[1] - grid[0])
    low = position.floor().clamp(0, len(grid) - 2)
    return torch.stack([low, position - low])
