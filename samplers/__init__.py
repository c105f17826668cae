"""Which timesteps to train on, and how much each one counts.

A method is a pair: a timestep sampler (the density p_t) and a loss weighting (the objective c_t).

    sampler = make_timestep_sampler(noise_scheduler, "adaptive", images=some_training_images, device=device)
    timesteps, weights = sampler.sample(batch_size)
    ...                                             # loss: [batch_size], |eps - eps_theta|^2, mean over pixels
    sampler.update(timesteps, loss.detach())
    (weights * loss).mean().backward()
"""

from . import weightings
from .adaptive import AdaptiveSampler
from .adaptive_log_snr import AdaptiveLogSNRSampler
from .base import TimestepBatch, TimestepSampler, antithetic_randn, fold_seed
from .clts import CLTSSampler
from .info_noise import InfoNoiseSampler
from .kim import KimSampler
from .log_normal import LogNormalSampler
from .logit_normal import LogitNormalSampler
from .loss_second_moment import LossSecondMomentSampler
from .schedule import NoiseSchedule
from .spectrum import component_variances
from .speed import SpeeDSampler
from .uncertainty import UncertaintySampler
from .uniform import UniformSampler
from .weightings import epsilon_loss_scale

TIMESTEP_SAMPLERS = {
    "uniform": UniformSampler,
    "speed": SpeeDSampler,
    "log_normal": LogNormalSampler,
    "logit_normal": LogitNormalSampler,
    "clts": CLTSSampler,
    "loss_second_moment": LossSecondMomentSampler,
    "uncertainty": UncertaintySampler,
    "adaptive_log_snr": AdaptiveLogSNRSampler,
    "info_noise": InfoNoiseSampler,
    "kim": KimSampler,
    "adaptive": AdaptiveSampler,
}

LOSS_WEIGHTINGS = {
    name: getattr(weightings, name) for name in ("none", "min_snr", "p2", "change_aware", "edm", "bell", "spectral")
}

METHODS = {  # name: (timestep sampler, loss weighting), as published
    "ddpm": ("uniform", "none"),
    "min_snr": ("uniform", "min_snr"),
    "p2": ("uniform", "p2"),
    "speed": ("speed", "change_aware"),
    "edm": ("log_normal", "edm"),
    "logit_normal": ("logit_normal", "none"),
    "clts": ("clts", "none"),
    "loss_second_moment": ("loss_second_moment", "none"),
    "edm2": ("uncertainty", "edm"),
    "adaptive_log_snr": ("adaptive_log_snr", "none"),
    "info_noise": ("info_noise", "edm"),
    "kim": ("kim", "none"),
    "adaptive": ("adaptive", "spectral"),
}

__all__ = [
    "LOSS_WEIGHTINGS",
    "METHODS",
    "TIMESTEP_SAMPLERS",
    "AdaptiveLogSNRSampler",
    "AdaptiveSampler",
    "CLTSSampler",
    "InfoNoiseSampler",
    "KimSampler",
    "LogNormalSampler",
    "LogitNormalSampler",
    "LossSecondMomentSampler",
    "NoiseSchedule",
    "SpeeDSampler",
    "TimestepBatch",
    "TimestepSampler",
    "UncertaintySampler",
    "UniformSampler",
    "antithetic_randn",
    "component_variances",
    "epsilon_loss_scale",
    "fold_seed",
    "make_timestep_sampler",
    "resolve_method",
]


def make_timestep_sampler(
    noise_scheduler,
    method="adaptive",
    *,
    timestep_sampler=None,
    loss_weighting=None,
    images=None,
    device="cpu",
    **options,
):
    """Build a method's sampler for a diffusers noise scheduler.

    Args:
        noise_scheduler: a diffusers scheduler with `alphas_cumprod`, or a `NoiseSchedule`.
        method: a key of `METHODS`.
        timestep_sampler: a key of `TIMESTEP_SAMPLERS`, in place of the method's.
        loss_weighting: a key of `LOSS_WEIGHTINGS`, in place of the method's.
        images: [N, C, H, W] in [-1, 1], a random sample of the training data, a batch or more; needed by the weighting
            `spectral` alone, which is that of the method `adaptive`.
        device: where to draw; the training device.
        options: of the sampler's class (`seed`, `low_discrepancy`, `uniform_fraction`, ...).

    Raises:
        ValueError: an unknown name or option, no images where they are needed, or a method that this noise schedule
            does not allow.
    """
    sampler_name, weighting_name = resolve_method(method, timestep_sampler, loss_weighting)
    sampler_class = _lookup(TIMESTEP_SAMPLERS, "timestep_sampler", sampler_name)
    weighting = _lookup(LOSS_WEIGHTINGS, "loss_weighting", weighting_name)
    if not isinstance(noise_scheduler, NoiseSchedule):
        noise_scheduler = NoiseSchedule.from_scheduler(noise_scheduler)
    data = ()
    if weighting is weightings.spectral:
        if images is None:
            raise ValueError(
                f"loss_weighting {weighting_name!r} needs `images`, a batch or more of the training data: "
                "make_timestep_sampler(..., images=next(iter(dataloader)))"
            )
        data = (component_variances(images),)
    loss_weights = weighting(noise_scheduler, *data).float()  # as it will be used: EDM's may overflow
    if not (loss_weights.isfinite().all() and (loss_weights > 0).any() and (loss_weights >= 0).all()):
        bad = int((~(loss_weights.isfinite() & (loss_weights >= 0))).nonzero()[0])
        raise ValueError(
            f"loss_weighting {weighting_name!r} cannot be used with this noise schedule: at timestep {bad} the weight "
            f"is {float(loss_weights[bad])} (abar = {float(noise_scheduler.alphas_cumprod[bad]):.3g})"
        )
    try:
        return sampler_class(noise_scheduler, loss_weights, device=device, **options)
    except TypeError as error:
        raise ValueError(f"timestep_sampler_options {options} for {sampler_name!r}: {error}") from error


def resolve_method(method, timestep_sampler=None, loss_weighting=None):
    """The names of a method's timestep sampler and loss weighting, with either replaced where one is given."""
    default_sampler, default_weighting = _lookup(METHODS, "method", method)
    return timestep_sampler or default_sampler, loss_weighting or default_weighting


def _lookup(registry, kind, name):
    if name not in registry:
        raise ValueError(f"{kind} must be one of {', '.join(registry)}, not {name!r}")
    return registry[name]
