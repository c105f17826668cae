"""Loss weightings: the table c_t over timesteps on the epsilon-loss, |eps - eps_theta(x_t, t)|^2, filtered or not.

Each function takes a `NoiseSchedule`, some the variances of the data's spectrum too, and returns [T] float64. A
weighting is an objective: what the model should be good at. Options of which none can be made are refused by name
(ValueError). Weights for v- or x_0-prediction are the same ones, on the loss that `epsilon_loss_scale` converts.
"""

import math

import torch

from .checks import check_fractions, check_positive
from .schedule import NoiseSchedule
from .spectrum import for_each_timestep
from .speed import boundaries


def none(schedule: NoiseSchedule) -> torch.Tensor:
    """c_t = 1: DDPM's simple loss (arXiv 2006.11239, eq. 14)."""
    return torch.ones_like(schedule.alphas_cumprod)


def min_snr(schedule: NoiseSchedule, gamma: float = 5.0) -> torch.Tensor:
    """c_t = min(snr_t, gamma) / snr_t: Min-SNR-gamma (arXiv 2303.09556, eq. 8, for eps-prediction)."""
    check_positive(gamma=gamma)
    return (gamma / schedule.snr).clamp(max=1.0)


def p2(schedule: NoiseSchedule, k: float = 1.0, gamma: float = 1.0) -> torch.Tensor:
    """c_t = 1 / (k + snr_t)^gamma: perception prioritized (arXiv 2204.00227, eq. 8)."""
    check_positive(k=k, gamma=gamma)
    return (k + schedule.snr) ** -gamma


def p2_half(schedule: NoiseSchedule) -> torch.Tensor:
    """`p2` with gamma = 1/2, the paper's other setting: c_t = 1 / sqrt(1 + snr_t)."""
    return p2(schedule, gamma=0.5)


def change_aware(schedule: NoiseSchedule, ceiling: float = 0.6) -> torch.Tensor:
    """SpeeD's (arXiv 2405.17403, section 3.3): the rate at which the noise's variance grows, d(1 - abar_t)/dt, scaled
    from [min, max] over all t to [1 - ceiling, ceiling], below the boundary tau; 1 from there on."""
    check_fractions(ceiling=ceiling)
    tau = boundaries(schedule, "loss_weighting 'change_aware'").tau
    change = -schedule.alphas_cumprod_slope
    low, high = change.min(), change.max()
    weights = (1 - ceiling) + (2 * ceiling - 1) * (change - low) / (high - low)
    weights[tau:] = 1
    return weights


def edm(schedule: NoiseSchedule, sigma_data: float = 0.5) -> torch.Tensor:
    """c_t = 1 + (sigma_t / sigma_data)^2: EDM's (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2 on the loss of the
    denoised image (arXiv 2206.00364, table 1), which is sigma^2 times the epsilon-loss. Of a network that predicts v,
    which is EDM's with sigma_data = 1, it is the v-loss times (1 + (sigma / sigma_data)^2) / (1 + sigma^2)."""
    check_positive(sigma_data=sigma_data)
    return 1 + (schedule.sigma / sigma_data) ** 2


def debiased(schedule: NoiseSchedule) -> torch.Tensor:
    """c_t = 1 / sqrt(snr_t): "Debias the Training of Diffusion Models" (arXiv 2310.08442, for eps-prediction)."""
    return schedule.sigma


def v(schedule: NoiseSchedule) -> torch.Tensor:
    """c_t = 1 + sigma_t^2: the plain loss of a network that predicts v (Salimans & Ho 2022, arXiv 2202.00512, "SNR+1"),
    which is 1 / abar_t times that of eps."""
    return 1 + schedule.sigma**2


def flow(schedule: NoiseSchedule) -> torch.Tensor:
    """c_t = (1 + sigma_t)^2: the plain loss of a straight flow's velocity (arXiv 2209.03003; SD3, 2403.03206).

    At its time s, x = (1 - s) x_0 + s eps and v = eps - x_0. With x given, (1 - s) dx_0 = -s d eps, so an error in v is
    one in eps: dv = d eps / (1 - s). A timestep has the noise level of s where sigma_t = s / (1 - s), and there
    1 / (1 - s) = 1 + sigma_t. How much a noise level counts in all is this times the density, of s and not of t.
    """
    return (1 + schedule.sigma) ** 2


def logit_normal(schedule: NoiseSchedule, m: float = 0.0, s: float = 1.0, sigma_data: float = 1.0) -> torch.Tensor:
    """c_t ∝ exp(-(log r_t - m)^2 / (2 s^2)) (1 + r_t)^2 dlog(sigma_t)/dt, r_t = sigma_t / sigma_data: SD3's objective
    (arXiv 2403.03206, eq. 19), whatever the density of the draws.

    It is what training minimises by the loss of `flow` and the timestep sampler `logit_normal`, of data divided by
    sigma_data: there log r is drawn from N(m, s^2), here those draws are a weight. It is 0 where no signal is left.
    """
    check_positive(s=s, sigma_data=sigma_data)
    relative = schedule.sigma / sigma_data
    distance = (relative.log() - m) / s
    drawn = torch.exp(-(distance**2) / 2 + 2 * torch.log1p(relative)).nan_to_num(0.0)  # of sigma = inf
    return drawn * schedule.log_sigma_slope


def scaled_logit_normal(
    schedule: NoiseSchedule, variances: torch.Tensor, s: float = 0.7, noise_fraction: float | None = None
) -> torch.Tensor:
    """c_t = (1 - f) b_t / mean(b) + f r_t^2 / (1 + r_t^2), r_t = sigma_t / sigma_data, b the bell of `logit_normal`.

    The bell lies about the noise level at which noise is as strong as the data; f of the objective is the noise's share
    of what the network sees. sigma_data^2 is the data's variance: SD3's objective is for latents of variance 1, and
    pixels in [-1, 1] have about a quarter of that. How much a noise level counts in the bell depends on its ratio to
    the data alone, but for the mean, on no schedule and on no resolution.

    The second part counts timesteps. It is for networks of eps: at high noise the x_0 of one that nothing has trained
    there is of any size. Where sampling clips x_0 to the range of the data, that did no harm, and f = 0 trained best.
    In the loss of v or of a velocity the part is about a tenth in all, and next to nothing at high noise.

    Args:
        variances: [K] s_i^2, of a `Spectrum`.
        s: the bell's width, of which 1 is SD3's.
        noise_fraction: f, in [0, 1]; by default 0 where sampling clips (`schedule.clip_range`), and 0.3 elsewhere.
    """
    if noise_fraction is None:
        noise_fraction = 0.0 if schedule.clip_range < math.inf else 0.3
    check_fractions(noise_fraction=noise_fraction)
    sigma_data = float(variances.mean().sqrt())
    bell = logit_normal(schedule, s=s, sigma_data=sigma_data)
    noise_share = 1 / (1 + (sigma_data / schedule.sigma) ** 2)
    return (1 - noise_fraction) * bell / bell.mean() + noise_fraction * noise_share


def cosmap(schedule: NoiseSchedule) -> torch.Tensor:
    """c_t = 2 / (pi (1 - 2 s + 2 s^2)) on the loss of `flow`: SD3's CosMap (arXiv 2403.03206, eq. 21), as a weighting.

    With s = sigma_t / (1 + sigma_t) that is c_t = 2 (1 + sigma_t)^4 / (pi (1 + sigma_t^2)). The paper has it as the
    density of s at which the angle arctan(sigma) is uniform; diffusers has it as a weighting, of draws uniform in s.
    """
    return 2 / torch.pi * (1 + schedule.sigma) ** 4 / (1 + schedule.sigma**2)


def bell(schedule: NoiseSchedule, k: float = 2.0) -> torch.Tensor:
    """A bell in log-SNR: mass (sigma / (1 + sigma^2))^k per unit of log sigma, mean 1.

    Per timestep that is c_t ∝ |d log sigma_t / dt| (sigma_t / (1 + sigma_t^2))^k
                            = -1/2 abar'_t (abar_t (1 - abar_t))^(k/2 - 1),
    since sigma / (1 + sigma^2) = sqrt(abar (1 - abar)). For k = 2 it is the rate at which signal turns into noise,
    c_t ∝ -d abar_t / dt; for k = 1 it is uniform in the angle arccos(sqrt(abar)).
    """
    check_positive(k=k)
    spread = schedule.alphas_cumprod * (1 - schedule.alphas_cumprod)
    mass = -schedule.alphas_cumprod_slope * spread ** (k / 2 - 1)
    return mass / mass.mean()


def spectral(schedule: NoiseSchedule, variances: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """c_t ∝ dM_t/dt: the share of an image's variance that sampling decides at t. Mean 1.

    M_t = sum_i s_i^2 sigma_t^2 / (s_i^2 + sigma_t^2) is how much of an image's variance x_t leaves open, to the best
    linear denoiser (Wiener's), for components of variance s_i^2; dM_t is what is decided from t + dt to t.

    It is also what an error of the network at t does to the finished image. An error in eps at component i moves it, by
    the end of ancestral sampling of Gaussian data (the reverse SDE), by 2 s_i^2 sigma / (s_i^2 + sigma^2) per unit of
    log sigma; and dM = 2 sum_i (s_i^2 sigma / (s_i^2 + sigma^2))^2 d log sigma. For white data of unit variance it is
    `bell` with k = 2.

    Args:
        variances: [K] s_i^2, of a `Spectrum`.
        power: of s_i^2 in M_t: 1 for squares of what an error moves, 1/2 for these relative to the amplitude s_i.
    """
    return _decided(undecided(schedule, variances, power))


def spectral_ode(schedule: NoiseSchedule, variances: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """c_t ∝ M_t dlog(sigma_t)/dt, M_t as in `spectral`: what an error does to an image sampled by the ODE. Mean 1.

    By the end of the probability flow ODE (DDIM without noise) of Gaussian data, an error in eps at component i moves
    the image by sigma s_i / sqrt(s_i^2 + sigma^2) per unit of log sigma: none of what is put in at high noise is
    replaced. The squares sum up to M_t, which does not fall at the noisy end.

    Args:
        variances, power: as in `spectral`.
    """
    return _carried(schedule, undecided(schedule, variances, power))


def spectral_both(schedule: NoiseSchedule, variances: torch.Tensor) -> torch.Tensor:
    """The mean of `spectral` and `spectral_ode`, of power 1/2, and 1: for images sampled either way. Mean 1.

    Relative to the variance an error would count the same in all components, however faint they are; with no regard to
    it, in the few strongest alone. The amplitude lies between; by DDPM it trained better, and by DDIM worse. The third
    part leaves no timestep out, as what an error does is derived for Gaussian data.

    Args:
        variances: as in `spectral`.
    """
    amplitude = undecided(schedule, variances, power=0.5)
    return (_decided(amplitude) + _carried(schedule, amplitude) + 1) / 3


def _decided(undecided):
    rate = torch.gradient(undecided)[0].clamp_min(0)  # rounding, where no signal is left
    return rate / rate.mean()


def _carried(schedule, undecided):
    moved = undecided * schedule.log_sigma_slope
    return moved / moved.mean()


def undecided(schedule: NoiseSchedule, variances: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """[T] M_t = sum_i s_i^(2 power) sigma_t^2 / (s_i^2 + sigma_t^2): how much of an image's variance x_t leaves open,
    for components of these variances; see `spectral`."""
    check_fractions(power=power)
    relative = variances.flatten().clamp_min(1e-12) ** (power - 1)
    opened = for_each_timestep(lambda gains: (gains * relative).sum(1), variances, schedule)
    return (1 - schedule.alphas_cumprod) * opened
