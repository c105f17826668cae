"""Which timesteps to train on, and how much each one counts.

A method is a timestep sampler (the density p_t), a loss weighting (c_t: what a timestep counts in the objective), an
error filter (what an error counts within its timestep) and a noise coupling (which noise goes with which image).
Installed, this package is `adaptive_timesteps`; the folder `samplers`, copied into another project, is the same package
by that name. It imports PyTorch alone.

    from adaptive_timesteps import make_timestep_sampler     # or: from samplers import ...

    sampler = make_timestep_sampler(noise_scheduler, "adaptive", images=some_training_images, device=device)

    noise = sampler.noise(images)
    timesteps, weights = sampler.sample(len(images))
    ...                                             # errors: [batch_size, C, H, W], eps_theta - eps
    losses = sampler.losses(errors, timesteps)
    sampler.update(timesteps, losses.detach())
    (weights * losses).mean().backward()
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from . import weightings
from .adaptive import AdaptiveSampler
from .adaptive_log_snr import AdaptiveLogSNRSampler
from .base import ErrorFilter, TimestepBatch, TimestepSampler, fold_seed, mean_squares
from .beta import BetaSampler
from .clts import CLTSSampler
from .curriculum import CurriculumSampler
from .frequency import frequency
from .info_noise import InfoNoiseSampler
from .kim import KimSampler
from .laplace import LaplaceSampler
from .log_normal import LogNormalSampler
from .logit_normal import LogitNormalSampler
from .loss_second_moment import LossSecondMomentSampler
from .mode import ModeSampler
from .noise_coupling import NoiseCoupling, antithetic, immiscible, independent
from .processes import of_first_rank
from .schedule import NoiseSchedule, epsilon_loss_scale, in_config
from .spectrum import Spectrum
from .speed import SpeeDSampler
from .uncertainty import UncertaintySampler
from .uniform import UniformSampler
from .uniform_flow import UniformFlowSampler
from .wiener import WienerFilter

__version__ = "0.2.0"

logger = logging.getLogger(__name__)

TIMESTEP_SAMPLERS: dict[str, type[TimestepSampler]] = {
    "uniform": UniformSampler,
    "speed": SpeeDSampler,
    "log_normal": LogNormalSampler,
    "laplace": LaplaceSampler,
    "logit_normal": LogitNormalSampler,
    "mode": ModeSampler,
    "uniform_flow": UniformFlowSampler,
    "curriculum": CurriculumSampler,
    "beta": BetaSampler,
    "clts": CLTSSampler,
    "loss_second_moment": LossSecondMomentSampler,
    "uncertainty": UncertaintySampler,
    "adaptive_log_snr": AdaptiveLogSNRSampler,
    "info_noise": InfoNoiseSampler,
    "kim": KimSampler,
    "adaptive": AdaptiveSampler,
}

LOSS_WEIGHTINGS: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(weightings, name)
    for name in (
        "none",
        "min_snr",
        "p2",
        "p2_half",
        "debiased",
        "v",
        "change_aware",
        "edm",
        "flow",
        "logit_normal",
        "scaled_logit_normal",
        "cosmap",
        "bell",
        "spectral",
        "spectral_ode",
        "spectral_both",
    )
}

ERROR_FILTERS: dict[str, Callable[..., ErrorFilter]] = {
    "none": lambda schedule, spectrum, device: mean_squares,
    "frequency": lambda schedule, spectrum, device: frequency,
    "wiener": WienerFilter,
    "wiener_ode": partial(WienerFilter, exponent=1.0),
    "wiener_amplitude": partial(WienerFilter, exponent=1.0, power=0.5),
}

NOISE_COUPLINGS: dict[str, NoiseCoupling] = {
    "independent": independent,
    "antithetic": antithetic,
    "immiscible": immiscible,
}

PARTS = {
    "timestep_sampler": TIMESTEP_SAMPLERS,
    "loss_weighting": LOSS_WEIGHTINGS,
    "error_filter": ERROR_FILTERS,
    "noise_coupling": NOISE_COUPLINGS,
}

FROM_IMAGES = {  # the parts that are made from the data's spectrum, or its variance
    "timestep_sampler": {name for name, kind in TIMESTEP_SAMPLERS.items() if kind.needs_data_variance},
    "loss_weighting": {"scaled_logit_normal", "spectral", "spectral_ode", "spectral_both"},
    "error_filter": {"wiener", "wiener_ode", "wiener_amplitude"},
    "noise_coupling": set(),
}


class Method(NamedTuple):
    """The names of a method's parts, keys of the registries in `PARTS`."""

    timestep_sampler: str
    loss_weighting: str = "none"
    error_filter: str = "none"
    noise_coupling: str = "independent"

    @property
    def from_images(self) -> dict[str, str]:
        """{part: name} of those that are made from images."""
        return {kind: name for kind, name in self._asdict().items() if name in FROM_IMAGES[kind]}

    @property
    def needs_images(self) -> bool:
        """Whether a part is made from images."""
        return bool(self.from_images)


METHODS = {  # as published
    "ddpm": Method("uniform"),
    "min_snr": Method("uniform", "min_snr"),
    "p2": Method("uniform", "p2"),
    "debiased": Method("uniform", "debiased"),
    "speed": Method("speed", "change_aware"),
    "edm": Method("log_normal", "edm"),
    "laplace": Method("laplace"),
    "logit_normal": Method("logit_normal", "flow"),
    "mode": Method("mode", "flow"),
    "cosmap": Method("uniform_flow", "cosmap"),
    "curriculum": Method("curriculum", "flow"),
    "beta": Method("beta"),
    "frequency": Method("uniform", error_filter="frequency"),
    "clts": Method("clts"),
    "loss_second_moment": Method("loss_second_moment"),
    "edm2": Method("uncertainty"),  # which learns its weighting
    "adaptive_log_snr": Method("adaptive_log_snr"),
    "info_noise": Method("info_noise", "edm"),
    "kim": Method("kim"),
    "immiscible": Method("uniform", noise_coupling="immiscible"),
    "adaptive": Method("adaptive", "scaled_logit_normal", "wiener_ode", "antithetic"),
}

__all__ = [
    "ERROR_FILTERS",
    "FROM_IMAGES",
    "LOSS_WEIGHTINGS",
    "METHODS",
    "NOISE_COUPLINGS",
    "PARTS",
    "TIMESTEP_SAMPLERS",
    "AdaptiveLogSNRSampler",
    "AdaptiveSampler",
    "BetaSampler",
    "CLTSSampler",
    "CurriculumSampler",
    "InfoNoiseSampler",
    "KimSampler",
    "LaplaceSampler",
    "LogNormalSampler",
    "LogitNormalSampler",
    "LossSecondMomentSampler",
    "Method",
    "ModeSampler",
    "NoiseCoupling",
    "NoiseSchedule",
    "Spectrum",
    "SpeeDSampler",
    "TimestepBatch",
    "TimestepSampler",
    "UncertaintySampler",
    "UniformFlowSampler",
    "UniformSampler",
    "WienerFilter",
    "antithetic",
    "checked_weights",
    "epsilon_loss_scale",
    "fold_seed",
    "frequency",
    "immiscible",
    "independent",
    "make_timestep_sampler",
    "mean_squares",
    "resolve_method",
]


def make_timestep_sampler(
    noise_scheduler: object,
    method: str = "adaptive",
    *,
    images: torch.Tensor | None = None,
    prediction_type: str | None = None,
    min_timestep: float | None = None,
    max_timestep: float | None = None,
    device: torch.device | str = "cpu",
    loss_weighting_options: Mapping[str, Any] | None = None,
    error_filter_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> TimestepSampler:
    """Build a method's sampler for a diffusers noise scheduler.

    With `torch.distributed` initialised, all ranks must call it: they use the first one's images.

    Args:
        noise_scheduler: a diffusers scheduler, or any object with `alphas_cumprod`, or with the `sigmas` of a straight
            flow; or a `NoiseSchedule`, which says nothing of the network: give `prediction_type` too, unless it
            predicts eps (or the velocity of a flow).
        method: a key of `METHODS`.
        images: [N, C, H, W] as the network sees them (in [-1, 1], or latents), a random sample of the training data, a
            batch or more; needed by the parts in `FROM_IMAGES`, which ours and `info_noise` have. Beyond the range that
            sampling by this scheduler clips to (`clip_sample`) they are taken for latents, which nothing clips.
        prediction_type: of the network, "epsilon", "v_prediction", "sample" or "flow"; by default what the noise
            scheduler's `config` says, an object or a mapping; where it says nothing, "flow" if the schedule is a
            flow's, else "epsilon".
        min_timestep, max_timestep: train only from one to the other, both included: timesteps as the network is given
            them, which for a flow are its noise levels in [0, 1] times T, whatever their order in the tables. 875 and
            None for the high-noise expert of Wan 2.2 (text to video), None and 875 for the other one. The sampler is
            that of the part: its tables have no more timesteps, and a density over t, as `clts` has it, spans the part.
        device: where to draw; the training device.
        loss_weighting_options: keyword arguments of the weighting's function, `{"gamma": 1}` of `min_snr`.
        error_filter_options: keyword arguments of the filter's class, `{"plain_fraction": 0.1}` of `wiener_ode`.
        options: `timestep_sampler`, `loss_weighting`, `error_filter` and `noise_coupling`, keys of `PARTS`' registries,
            in place of the method's; and keyword arguments of the sampler's class (`seed`, `low_discrepancy`,
            `uniform_fraction`, ...) and of the noise coupling (`num_candidates` of `immiscible`).

    Raises:
        ValueError: an unknown name or option, no images where they are needed or unusable ones, a method that this
            noise schedule does not allow, or fewer than two timesteps between `min_timestep` and `max_timestep`.
    """
    is_schedule = isinstance(noise_scheduler, NoiseSchedule)
    schedule = noise_scheduler if is_schedule else NoiseSchedule.from_scheduler(noise_scheduler)
    parts = resolve_method(method, **{kind: options.pop(kind, None) for kind in PARTS})
    if prediction_type is None:
        default = "flow" if schedule.noisiest_first else "epsilon"
        prediction_type = in_config(noise_scheduler, "prediction_type", default)
    if schedule.noisiest_first and prediction_type in ("epsilon", "v_prediction"):
        logger.warning(
            f"the noise schedule is a straight flow's, whose networks predict its velocity, not {prediction_type}"
        )
    spectrum = None
    if parts.needs_images:
        spectrum, largest = of_first_rank((_spectrum_for(parts, images), float(images.abs().max())))
        schedule = _unclipped_beyond(schedule, largest)
    schedule = schedule.between(min_timestep, max_timestep)
    if not epsilon_loss_scale(schedule, prediction_type)[-1]:
        logger.warning(
            "no signal is left at the last timestep (zero terminal SNR), where losses of eps say nothing of what a "
            f"network of {prediction_type} predicts: it is not trained there"
        )
    of_weighting, of_filter = dict(loss_weighting_options or {}), dict(error_filter_options or {})
    _check_option_names("loss_weighting", parts.loss_weighting, of_weighting)
    _check_option_names("error_filter", parts.error_filter, of_filter)
    loss_weights = checked_weights(parts.loss_weighting, schedule, spectrum, **of_weighting)
    error_filter = _made("error_filter", parts.error_filter, schedule, spectrum, device=device, **of_filter)
    image_shape = list(spectrum.variances.shape) if spectrum else None
    fixed = {
        "error_filter": error_filter,
        "noise_coupling": _with_its_options(NOISE_COUPLINGS[parts.noise_coupling], options),
        "made_of": {
            "loss_weighting": parts.loss_weighting,
            "loss_weighting_options": of_weighting,
            "error_filter_options": of_filter,
            "image_shape": image_shape,
        },
        "prediction_type": prediction_type,
        "device": device,
    }
    sampler_class = TIMESTEP_SAMPLERS[parts.timestep_sampler]
    if sampler_class.needs_data_variance:
        fixed["data_variance"] = float(spectrum.variances.mean())
    try:
        return sampler_class(schedule, loss_weights, **fixed, **options)
    except TypeError as error:
        named = f"timestep_sampler {parts.timestep_sampler!r}"
        if unknown := re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error)):
            own = inspect.getfullargspec(NOISE_COUPLINGS[parts.noise_coupling]).kwonlyargs
            allowed = {*own, *_option_names(sampler_class)} - fixed.keys()
            raise ValueError(f"{named} has no option {unknown[1]!r}: it has {', '.join(sorted(allowed))}") from error
        raise ValueError(f"options {options} of {named}: {error}") from error


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


def checked_weights(
    name: str, schedule: NoiseSchedule, spectrum: Spectrum | None = None, **options: Any
) -> torch.Tensor:
    """[T] float32: c_t of the loss weighting of that name, which must be finite and not negative."""
    data = [spectrum.variances.flatten()] if name in FROM_IMAGES["loss_weighting"] and spectrum is not None else []
    # Of a part of the schedule, what its timesteps count in the whole
    values = schedule.own(_made("loss_weighting", name, schedule.whole, *data, **options))
    values = values.float()  # as it will be used: EDM's may overflow
    usable = values.isfinite() & (values >= 0)
    if usable.all() and (values > 0).any():
        return values
    bad = int((~usable).int().argmax())  # the first; where all are usable they are 0
    with_options = f" {options}" if options else ""
    and_others = ", and nowhere above 0" if usable.all() else ""
    raise ValueError(
        f"loss_weighting {name!r}{with_options} cannot be used with this noise schedule: at timestep "
        f"{float(schedule.timesteps[bad]):g} the weight is {float(values[bad])} "
        f"(abar = {float(schedule.alphas_cumprod[bad]):.3g}){and_others}"
    )


def _spectrum_for(parts, images):
    needed_by = " and ".join(f"{kind} {name!r}" for kind, name in parts.from_images.items())
    if images is None:
        raise ValueError(
            f"no `images`, of which {needed_by} would be made: give a batch or more of the training data, "
            "make_timestep_sampler(..., images=next(iter(dataloader)))"
        )
    try:
        return Spectrum.of(images)
    except ValueError as error:
        raise ValueError(f"{error} (`images` are for {needed_by}: others need none)") from error


def _unclipped_beyond(schedule, largest):
    """The schedule of sampling that clips nothing, where it would clip images that reach `largest`: DDPMScheduler clips
    by default, and so does many a one that latents are trained by."""
    if largest <= 1.1 * schedule.clip_range:  # some more, as resizing overshoots
        return schedule
    logger.warning(
        f"the images reach {largest:.3g}, and sampling by this scheduler would clip them to {schedule.clip_range:g}: "
        "they are taken for latents; give it clip_sample=False"
    )
    return schedule.unclipped()


def _with_its_options(coupling, options):
    """The coupling with those of `options` that are its own, which are taken out of them."""
    own = {name: options.pop(name) for name in inspect.getfullargspec(coupling).kwonlyargs if name in options}
    return partial(coupling, **own) if own else coupling


def _made(kind, name, *data, **options):
    """What the part of that name makes of data and options."""
    try:
        return PARTS[kind][name](*data, **options)
    except TypeError as error:
        if not options:  # a fault of its own
            raise
        raise ValueError(f"options {options} of {kind} {name!r}: {error}") from error


def _check_option_names(kind, name, options):
    parameters = inspect.signature(PARTS[kind][name]).parameters.values()
    own = sorted({p.name for p in parameters if p.default is not p.empty} - {"device"})
    for option in options.keys() - own:
        raise ValueError(f"{kind} {name!r} has no option {option!r}: it has {', '.join(own) or 'none'}")


def _option_names(sampler_class):
    """Of a class and those that it is made of, which can be given."""
    names = {
        name
        for base in sampler_class.__mro__
        if "__init__" in vars(base)
        for name in inspect.getfullargspec(base.__init__).kwonlyargs
    }
    return names - sampler_class.settled_options


def _lookup(registry, kind, name):
    if name not in registry:
        raise ValueError(f"{kind} must be one of {', '.join(registry)}, not {name!r}")
    return registry[name]
