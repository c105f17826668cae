"""Which timesteps to train on, and how much each one counts.

A method is a timestep sampler (the density p_t), a loss weighting (c_t: what a timestep counts in the objective) and an
error filter (what an error counts within its timestep). Installed, this package is `adaptive_timesteps`; the folder
`samplers`, copied into another project, is the same package by that name. It imports PyTorch alone.

    from adaptive_timesteps import antithetic_randn, make_timestep_sampler     # or: from samplers import ...

    sampler = make_timestep_sampler(noise_scheduler, "adaptive", images=some_training_images, device=device)

    noise = antithetic_randn(*images.shape, device=device)
    timesteps, weights = sampler.sample(len(images))
    ...                                             # errors: [batch_size, C, H, W], eps_theta - eps
    losses = sampler.losses(errors, timesteps)
    sampler.update(timesteps, losses.detach())
    (weights * losses).mean().backward()
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import weightings
from .adaptive import AdaptiveSampler
from .adaptive_log_snr import AdaptiveLogSNRSampler
from .base import ErrorFilter, TimestepBatch, TimestepSampler, antithetic_randn, fold_seed, mean_squares, of_first_rank
from .clts import CLTSSampler
from .info_noise import InfoNoiseSampler
from .kim import KimSampler
from .log_normal import LogNormalSampler
from .logit_normal import LogitNormalSampler
from .loss_second_moment import LossSecondMomentSampler
from .schedule import NoiseSchedule
from .spectrum import Spectrum
from .speed import SpeeDSampler
from .uncertainty import UncertaintySampler
from .uniform import UniformSampler
from .weightings import epsilon_loss_scale
from .wiener import WienerFilter

__version__ = "0.1.0"

TIMESTEP_SAMPLERS: dict[str, type[TimestepSampler]] = {
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

LOSS_WEIGHTINGS: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(weightings, name) for name in ("none", "min_snr", "p2", "change_aware", "edm", "bell", "spectral")
}

ERROR_FILTERS: dict[str, Callable[..., ErrorFilter]] = {
    "none": lambda schedule, spectrum, device: mean_squares,
    "wiener": WienerFilter,
}

PARTS = {"timestep_sampler": TIMESTEP_SAMPLERS, "loss_weighting": LOSS_WEIGHTINGS, "error_filter": ERROR_FILTERS}


class Method(NamedTuple):
    """The names of a method's parts, keys of the registries in `PARTS`."""

    timestep_sampler: str
    loss_weighting: str = "none"
    error_filter: str = "none"

    @property
    def needs_images(self) -> bool:
        """Whether a part is made from the data's spectrum."""
        needs_variance = TIMESTEP_SAMPLERS[self.timestep_sampler].needs_data_variance
        return self.loss_weighting == "spectral" or self.error_filter != "none" or needs_variance


METHODS = {  # as published
    "ddpm": Method("uniform"),
    "min_snr": Method("uniform", "min_snr"),
    "p2": Method("uniform", "p2"),
    "speed": Method("speed", "change_aware"),
    "edm": Method("log_normal", "edm"),
    "logit_normal": Method("logit_normal"),
    "clts": Method("clts"),
    "loss_second_moment": Method("loss_second_moment"),
    "edm2": Method("uncertainty"),  # which learns its weighting
    "adaptive_log_snr": Method("adaptive_log_snr"),
    "info_noise": Method("info_noise", "edm"),
    "kim": Method("kim"),
    "adaptive": Method("adaptive", "spectral", "wiener"),
}

__all__ = [
    "ERROR_FILTERS",
    "LOSS_WEIGHTINGS",
    "METHODS",
    "PARTS",
    "TIMESTEP_SAMPLERS",
    "AdaptiveLogSNRSampler",
    "AdaptiveSampler",
    "CLTSSampler",
    "InfoNoiseSampler",
    "KimSampler",
    "LogNormalSampler",
    "LogitNormalSampler",
    "LossSecondMomentSampler",
    "Method",
    "NoiseSchedule",
    "Spectrum",
    "SpeeDSampler",
    "TimestepBatch",
    "TimestepSampler",
    "UncertaintySampler",
    "UniformSampler",
    "WienerFilter",
    "antithetic_randn",
    "checked_weights",
    "epsilon_loss_scale",
    "fold_seed",
    "make_timestep_sampler",
    "mean_squares",
    "resolve_method",
]


def make_timestep_sampler(
    noise_scheduler: object,
    method: str = "adaptive",
    *,
    images: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> TimestepSampler:
    """Build a method's sampler for a diffusers noise scheduler.

    With `torch.distributed` initialised, all ranks must call it: they use the first one's images.

    Args:
        noise_scheduler: a diffusers scheduler, or any object with `alphas_cumprod`; or a `NoiseSchedule`.
        method: a key of `METHODS`.
        images: [N, C, H, W] in [-1, 1], a random sample of the training data, a batch or more; needed by the weighting
            `spectral` and the filter `wiener`, which are those of the method `adaptive`, and by the sampler
            `info_noise`.
        device: where to draw; the training device.
        options: `timestep_sampler`, `loss_weighting` and `error_filter`, keys of `PARTS`' registries, in place of the
            method's; and keyword arguments of the sampler's class (`seed`, `low_discrepancy`, `uniform_fraction`, ...).

    Raises:
        ValueError: an unknown name or option, no images where they are needed, or a method that this noise schedule
            does not allow.
    """
    parts = resolve_method(method, **{kind: options.pop(kind, None) for kind in PARTS})
    if not isinstance(noise_scheduler, NoiseSchedule):
        noise_scheduler = NoiseSchedule.from_scheduler(noise_scheduler)
    spectrum = None
    if parts.needs_images:
        if images is None:
            raise ValueError(
                f"timestep_sampler {parts.timestep_sampler!r} with loss_weighting {parts.loss_weighting!r} with "
                f"error_filter {parts.error_filter!r} needs `images`, a batch or more of the training data: "
                "make_timestep_sampler(..., images=next(iter(dataloader)))"
            )
        spectrum = of_first_rank(Spectrum.of(images))
    loss_weights = checked_weights(parts.loss_weighting, noise_scheduler, spectrum)
    error_filter = ERROR_FILTERS[parts.error_filter](noise_scheduler, spectrum, device=device)
    image_shape = list(spectrum.variances.shape) if spectrum else None
    fixed = {
        "error_filter": error_filter,
        "made_of": {"loss_weighting": parts.loss_weighting, "image_shape": image_shape},
        "device": device,
    }
    sampler_class = TIMESTEP_SAMPLERS[parts.timestep_sampler]
    if sampler_class.needs_data_variance:
        fixed["data_variance"] = float(spectrum.variances.mean())
    try:
        return sampler_class(noise_scheduler, loss_weights, **fixed, **options)
    except TypeError as error:
        raise ValueError(f"options {options} of timestep_sampler {parts.timestep_sampler!r}: {error}") from error


def resolve_method(method: str, **parts: str | None) -> Method:
    """The `Method` of that name, with any part replaced that is given and not None.

    Raises:
        ValueError: an unknown name.
    """
    replaced = {kind: name for kind, name in parts.items() if name is not None}
    resolved = _lookup(METHODS, "method", method)._replace(**replaced)
    for kind, registry in PARTS.items():
        _lookup(registry, kind, getattr(resolved, kind))
    return resolved


def checked_weights(name: str, schedule: NoiseSchedule, spectrum: Spectrum | None = None) -> torch.Tensor:
    """[T] float32: c_t of the loss weighting of that name, which must be finite and not negative."""
    data = [spectrum.variances.flatten()] if name == "spectral" and spectrum is not None else []
    values = LOSS_WEIGHTINGS[name](schedule, *data).float()  # as it will be used: EDM's may overflow
    if not (values.isfinite().all() and (values > 0).any() and (values >= 0).all()):
        bad = int((~(values.isfinite() & (values >= 0))).nonzero()[0])
        raise ValueError(
            f"loss_weighting {name!r} cannot be used with this noise schedule: at timestep {bad} the weight "
            f"is {float(values[bad])} (abar = {float(schedule.alphas_cumprod[bad]):.3g})"
        )
    return values


def _lookup(registry, kind, name):
    if name not in registry:
        raise ValueError(f"{kind} must be one of {', '.join(registry)}, not {name!r}")
    return registry[name]
