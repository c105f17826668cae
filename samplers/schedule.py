"""The noise schedule as every sampler and weighting sees it: tables over the training timesteps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

# What a network predicts, as diffusers names it; "flow" is the velocity of a straight flow, eps - x_0
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for t = 0 .. T-1.

    Any other x_t = signal_t x_0 + noise_t eps is that but for a factor, with abar = signal^2 / (signal^2 + noise^2):
    what is known of x_0, and what an error in eps does, is the same.

    Args:
        alphas_cumprod: [T] float64 on the CPU, abar_t, decreasing in (0, 1]; the last may be 0 (zero terminal SNR).
        noisiest_first: whether the scheduler's own tables begin at the noisy end. The tables here never do.
        clip_range: the largest |x_0| that sampling lets through, as it clips each that it predicts, in pixels.
        part_of: the schedule of which these are the timesteps from `first` on, if they are not all; see `between`.

    Raises:
        ValueError: the table rises, or leaves [0, 1].
    """

    alphas_cumprod: torch.Tensor
    noisiest_first: bool = False
    clip_range: float = math.inf
    part_of: "NoiseSchedule | None" = None
    first: int = 0

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if not ((abar >= 0) & (abar <= 1)).all() or not (abar.diff() <= 0).all():
            raise ValueError(
                f"alphas_cumprod must fall from each to the next within [0, 1], not from {float(abar[0]):.4g} to "
                f"{float(abar[-1]):.4g} with the least {float(abar.min()):.4g} and the largest {float(abar.max()):.4g}"
            )

    @classmethod
    def from_scheduler(cls, noise_scheduler: object) -> "NoiseSchedule":
        """Read the schedule of a diffusers scheduler: by its `alphas_cumprod` (DDPM, DDIM, DPM-Solver, ...), and its
        `clip_sample` and `thresholding`; or by its `sigmas` (FlowMatchEulerDiscreteScheduler).

        Raises:
            ValueError: the scheduler has neither, T < 2, or the sigmas are not those of training a straight flow.
        """
        alphas_cumprod, sigmas = (getattr(noise_scheduler, name, None) for name in ("alphas_cumprod", "sigmas"))
        kind = type(noise_scheduler).__name__
        if alphas_cumprod is not None and in_config(noise_scheduler, "use_flow_sigmas", False):
            raise ValueError(
                f"{kind} with use_flow_sigmas has no table to train a flow by, but the `alphas_cumprod` of another "
                "process: give FlowMatchEulerDiscreteScheduler(shift=...), by which the training adds noise"
            )
        if alphas_cumprod is None and sigmas is None:
            raise ValueError(
                f"{kind} has neither `alphas_cumprod` nor `sigmas`: timestep samplers need a scheduler with a discrete "
                "noise schedule, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler"
            )
        table = torch.as_tensor(sigmas if alphas_cumprod is None else alphas_cumprod).detach().cpu().double()
        if len(table) < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, not {len(table)}")
        if alphas_cumprod is None:
            return cls.of_flow(table, kind)
        if in_config(noise_scheduler, "thresholding", False):  # which goes before clip_sample
            return cls(table, clip_range=1.0)
        clips = in_config(noise_scheduler, "clip_sample", False)
        return cls(table, clip_range=in_config(noise_scheduler, "clip_sample_range", 1.0) if clips else math.inf)

    @classmethod
    def of_flow(cls, sigmas: torch.Tensor, named: str = "the schedule") -> "NoiseSchedule":
        """The schedule of a straight flow, x = (1 - s) x_0 + s eps (flow matching, rectified flow).

        Where s is 1, and nothing is left of the image, the middle between 1 and its neighbour stands for it: losses of
        eps have no weight there that is finite.

        Args:
            sigmas: [T] s, falling, in (0, 1], as diffusers has them.
            named: what to call it in an error.

        Raises:
            ValueError: they are something else.
        """
        inside = (sigmas > 0) & (sigmas <= 1)
        if not inside.all():
            hint = (
                "After set_timesteps, a scheduler holds those of sampling, and a last 0: make the timestep sampler "
                "before that, or from a copy, or state those of training by NoiseSchedule.of_flow"
                if inside[:-1].all()
                else "Is it the schedule of a straight flow?"
            )
            raise ValueError(
                f"{named}: its sigmas must be in (0, 1], as those of training a flow are, not "
                f"{float(sigmas[~inside][0]):.4g}. {hint}"
            )
        if not (sigmas.diff() < 0).all():
            raise ValueError(f"{named}: its sigmas must fall from each to the next")
        s = sigmas.detach().cpu().double().flip(0)
        s[-1] = s[-1] if s[-1] < 1 else (1 + s[-2]) / 2
        return cls((1 - s) ** 2 / ((1 - s) ** 2 + s**2), noisiest_first=True)

    def between(self, min_timestep: float | None = None, max_timestep: float | None = None) -> "NoiseSchedule":
        """The part of the schedule with `min_timestep` <= timestep <= `max_timestep`: a schedule of its own.

        Indices into the scheduler's tables stay what they are.

        Args:
            min_timestep, max_timestep: in the unit of `timesteps`, as trainers have them; None for no bound.

        Raises:
            ValueError: fewer than two timesteps are between them, or the first is a fraction of 1.
        """
        t = self.timesteps
        low = -math.inf if min_timestep is None else min_timestep
        high = math.inf if max_timestep is None else max_timestep
        inside = (t >= low) & (t <= high)
        # Of a fraction, as Wan's boundary_ratio of 0.875, nearly all timesteps would be above
        if inside.sum() < 2 or 0 < low < 1:
            raise ValueError(
                f"min_timestep {min_timestep} and max_timestep {max_timestep} must have two timesteps or more between "
                f"them: timesteps as the network is given them, {float(t[0]):g} to {float(t[-1]):g} with this noise "
                "schedule, not fractions of these"
            )
        if inside.all():
            return self
        first, last = inside.nonzero()[[0, -1], 0].tolist()
        return replace(
            self, alphas_cumprod=self.alphas_cumprod[first : last + 1], part_of=self.whole, first=self.first + first
        )

    def unclipped(self) -> "NoiseSchedule":
        """The same schedule, of sampling that clips nothing."""
        part_of = None if self.part_of is None else self.part_of.unclipped()
        return replace(self, clip_range=math.inf, part_of=part_of)

    @property
    def whole(self) -> "NoiseSchedule":
        """The schedule of all the scheduler's timesteps."""
        return self if self.part_of is None else self.part_of

    def own(self, table: torch.Tensor) -> torch.Tensor:
        """[T] of a `table` [all] over the timesteps of `whole`, those of the timesteps here."""
        return table[self.first : self.first + self.num_train_timesteps]

    @property
    def timesteps(self) -> torch.Tensor:
        """[T] what the network is given: t; of a flow s * T, rounded to thousandths, as float32 tables miss them (for
        s = 1 that of the middle that stands for it)."""
        T = self.whole.num_train_timesteps
        if self.noisiest_first:
            return (self.sigma / (1 + self.sigma) * T).round(decimals=3)
        return self.own(torch.arange(T, dtype=torch.float64))

    def to_scheduler(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Indices into the tables here as such into the scheduler's."""
        last = self.whole.num_train_timesteps - 1
        return last - self.first - timesteps if self.noisiest_first else timesteps + self.first

    def of_scheduler(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices into the scheduler's tables as such into the tables here."""
        last = self.whole.num_train_timesteps - 1
        return last - self.first - indices if self.noisiest_first else indices - self.first

    @property
    def num_train_timesteps(self) -> int:
        """T, or of a part the number of its timesteps."""
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> torch.Tensor:
        """[T] signal-to-noise ratio, abar_t / (1 - abar_t)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def sigma(self) -> torch.Tensor:
        """[T] noise level relative to the signal, 1 / sqrt(snr_t): EDM's sigma. Infinite where the SNR is zero."""
        return self.snr.rsqrt()

    @property
    def log_sigma_slope(self) -> torch.Tensor:
        """[T] dlog(sigma_t)/dt, per timestep; positive. It is finite without any signal too: a last step that leaves
        less than a quarter of abar_t, as diffusers' cosine schedule has one, counts as if it left a quarter."""
        abar = self.alphas_cumprod.clamp_min(self.alphas_cumprod[-2] / 4)
        return torch.gradient((1 / abar - 1).log() / 2)[0]

    @property
    def alphas_cumprod_slope(self) -> torch.Tensor:
        """[T] d(abar_t)/dt, per timestep; negative."""
        return torch.gradient(self.alphas_cumprod)[0]


def in_config(noise_scheduler: object, name: str, default: Any) -> Any:
    """What the scheduler's `config`, an object or a mapping, has under a name; where it has nothing, the default."""
    config = getattr(noise_scheduler, "config", None)
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def epsilon_loss_scale(schedule: NoiseSchedule, prediction_type: PredictionType) -> torch.Tensor:
    """[T] the factor that turns the mean squared error of a network's prediction into its epsilon-loss.

    With x_t given, an error in v or x_0 is one in eps: d eps = sqrt(abar) dv = -sqrt(snr) dx_0; and an error in the
    velocity u of a flow, x = (1 - s) x_0 + s eps, is d eps = (1 - s) du = du / (1 + sigma).

    Raises:
        ValueError: `prediction_type` is not epsilon, v_prediction, sample or flow.
    """
    scales = {
        "epsilon": torch.ones_like(schedule.alphas_cumprod),
        "v_prediction": schedule.alphas_cumprod,
        "sample": schedule.snr,
        "flow": (1 + schedule.sigma) ** -2,
    }
    if prediction_type not in scales:
        raise ValueError(f"prediction_type must be one of {', '.join(scales)}, not {prediction_type!r}")
    return scales[prediction_type]
