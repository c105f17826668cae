"""What every timestep sampler is: a density p_t to draw from, and a weight w_t on what was drawn."""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from .checks import allowed_indices, check_counts, check_drawn, check_per_example
from .drop_in import DropIn
from .noise_coupling import NoiseCoupling, independent, warn_of_odd_batch
from .precision import widest_float
from .processes import rank_and_world_size
from .schedule import NoiseSchedule, PredictionType, epsilon_loss_scale

logger = logging.getLogger(__name__)

ErrorFilter = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (errors [B, C, H, W], timesteps [B]) -> losses [B]
DenoisingLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # see `before_update`
FILTER_PREFIX = "error_filter."  # of the names that an error filter's state has within the sampler's
STATE_VERSION = 2  # before it, a state had none, and weights were not scaled
PART_OPTIONS = ("loss_weighting_options", "error_filter_options")  # states from before these had the defaults
CHOSEN = ("loss_weighting", "error_filter", "noise_coupling", "prediction_type", *PART_OPTIONS)  # of `_parts`, by flags


def mean_squares(errors: torch.Tensor, timesteps: torch.Tensor | None = None) -> torch.Tensor:
    """[B] the mean squares of `errors` [B, ...], in float32."""
    return errors.float().square().flatten(1).mean(1)


class TimestepBatch(NamedTuple):
    """Timesteps for one batch, and the factor on each example's loss."""

    timesteps: torch.Tensor  # [B] int64: indices into the noise scheduler's tables
    weights: torch.Tensor  # [B] float32


class TimestepSampler(DropIn):
    """Draws t ~ p_t and weighs each example by w_t. Only p_t * w_t decides what a timestep counts in the objective.

    A subclass states its density. If it is an importance sampler (`corrects_for_density`), then w_t is the loss
    weighting divided by T * p_t, so that the objective stays that of the weighting whatever p_t is; otherwise w_t is
    the weighting itself and the density changes the objective, as in the papers that propose one. The scale of all
    weights together is no part of an objective; it is set so that squared errors of what the network predicts have a
    mean weight of 1 by every method. So a limit on the gradient's norm means the same for all.

    Draws are low-discrepancy by default, as in VDM (arXiv 2107.00630, appendix I.1): one uniform offset a batch and n
    equally spaced points through the inverse CDF, in random order. With `torch.distributed` initialised, all
    ranks make the same n = B * world_size draws and each takes its own share.

    Where the noise comes in pairs (`antithetic`), example i of a batch and example i + n / 2, whose noises are
    opposite, are neighbours in t. It holds on every rank for its own batch, if that is even, and always for the batch
    of all ranks together, in which rank r has the examples r, r + world_size, ...: of odd batches on several ranks, the
    two of a pair are on different ones.

    Args:
        schedule: the noise schedule, or the part of one that is trained, `schedule.between(min_timestep,
            max_timestep)`: to a sampler it is a schedule of its own, and T is the number of its timesteps.
        loss_weights: [T] the loss weighting c_t; ones by default.
        error_filter: makes losses [B] of errors [B, C, H, W] and timesteps [B]; by default their mean squares. One that
            is made from data has `state_dict` and `load_state_dict`: it becomes a part of the sampler's state.
        made_of: {"loss_weighting": name, "image_shape": [C, H, W], or None if no images were used, ...}: what the
            objective was made of, where that is known. The state of a sampler made of something else is refused.
        prediction_type: what the network predicts. Losses are of eps whatever that is; how large the gradients are that
            they send into the network is not.
        low_discrepancy: False for independent draws.
        noise_coupling: makes the noise of a batch; see `noise`.
        gradient_accumulation_steps: G, calls of `sample` and `update` for each update of the network. Draws are equally
            spaced, and noise is in pairs, over all batches of an update together, also where each has one image.
        seed: of the draws; the same on all ranks.
        device: where draws are made and tables live.
    """

    corrects_for_density: bool = False
    needs_data_variance: bool = False  # whether its class takes `data_variance`, of the images' pixels
    settled_options: frozenset[str] = frozenset()  # of the classes above it, which a subclass gives them itself
    measures_model: bool = False  # whether `before_update` and `after_update` run the network, without gradients
    state_names: tuple[str, ...] = ()  # what a subclass learns, tensors and numbers: saved and restored
    counts_of_batches: tuple[str, ...] = ("num_draws",)  # of the state, G for each update of the network

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        error_filter: ErrorFilter = mean_squares,
        made_of: dict[str, Any] | None = None,
        prediction_type: PredictionType = "epsilon",
        low_discrepancy: bool = True,
        noise_coupling: NoiseCoupling = independent,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_counts(gradient_accumulation_steps=gradient_accumulation_steps)
        self.num_train_timesteps = T = schedule.num_train_timesteps
        self.device = torch.device(device)
        self.error_filter = error_filter
        self.made_of = {**(made_of or {}), "noise_schedule": describe_schedule(schedule)}
        self.made_of["prediction_type"] = prediction_type
        self.low_discrepancy = low_discrepancy
        self.noise_coupling = noise_coupling
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._first_half: Any = None  # of the noise of an update
        self._noise_calls = 0  # of `noise`
        self.seed = seed
        self.num_draws = 0  # calls of `sample` so far: with the seed, the whole state of the random draws
        self.loss_weights = self._table(torch.ones(T) if loss_weights is None else loss_weights)
        if self.loss_weights.shape != (T,):
            raise ValueError(f"loss_weights must be [{T}], one for each timestep, not {list(self.loss_weights.shape)}")
        self.probabilities = self._table(torch.full((T,), 1 / T))
        self._generator = torch.Generator(self.device)
        self._generator_state: Any = None  # of a caller's generator, at the first batch of an update
        self._drawn_weights: Any = None  # [T] w_t of the density of the latest draws
        self._epsilon_loss_scale = self._table(epsilon_loss_scale(schedule, prediction_type))
        self._schedule = schedule
        self._set_density(self.initial_density(schedule))
        if not 0 < self._scale() < math.inf:
            raise ValueError(
                f"abar from {float(schedule.alphas_cumprod[0]):.4g} to {float(schedule.alphas_cumprod[-1]):.4g}, of a "
                f"network that predicts {prediction_type}: squared errors of its output have a mean weight of "
                f"{float(self._scale()):g}, which must be positive and finite"
            )

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        """[T] the density to begin with; need not be normalised."""
        return torch.ones(schedule.num_train_timesteps)

    @property
    def weights(self) -> torch.Tensor:
        """[T] w_t, the factor on the loss of an example at t; sum_t p_t w_t s_t = 1, s_t of `epsilon_loss_scale`."""
        return self.relative_weights() / self._scale()

    def _scale(self):
        """The mean weight, before it is scaled, of the squared errors of what the network predicts."""
        return (self.probabilities * self.relative_weights() * self._epsilon_loss_scale).sum()

    def relative_weights(self) -> torch.Tensor:
        """[T] w_t before it is scaled: the loss weighting, divided by T * p_t if that is corrected for."""
        if not self.corrects_for_density:
            return self.loss_weights
        return self.loss_weights / (self.num_train_timesteps * self.probabilities)

    @torch.no_grad()
    def sample(
        self, batch_size: int, generator: torch.Generator | None = None, images: torch.Tensor | None = None
    ) -> TimestepBatch:
        """Draw a batch: timesteps [B] int64, indices into the noise scheduler's tables, and weights [B] float32, on
        `device`.

        Args:
            batch_size: B, of this process.
            generator: a `torch.Generator` on `device`, in the same state on all ranks; the sampler's own by default.
                All batches of an update are drawn from the state that it had at the first, and the draws of that
                one alone move it on. Of several processes each needs another one for its noise.
            images: [B, C, H, W] in [-1, 1], that the timesteps are for; most samplers do not look at them.
        """
        rank, world_size = rank_and_world_size()
        update, part = divmod(self.num_draws, self.gradient_accumulation_steps)
        if generator is None:
            generator = self._generator.manual_seed(fold_seed(self.seed, update))
        elif self.gradient_accumulation_steps > 1:
            generator = self._of_the_update(generator, part)
        if part == 0:
            self._begin_update(update)
        self.num_draws += 1
        # Every part of an update makes the draws of all, and takes its own
        drawn = self._draw(batch_size * self.gradient_accumulation_steps * world_size, generator)
        order = self._random_order(len(drawn), generator)[rank::world_size]
        return self._batch_of(drawn[order[part * batch_size : (part + 1) * batch_size]])

    def _of_the_update(self, generator, part):
        """A caller's generator at the first of an update's batches; at the others one in the state that it had there:
        the caller's own, which may draw noise too, goes on."""
        if part == 0:
            self._generator_state = generator.get_state()
            return generator
        if self._generator_state is None:  # of an update that a reloaded sampler is in the middle of
            return generator
        self._generator.set_state(self._generator_state)
        return self._generator

    def _begin_update(self, update: int) -> None:
        """The draws of the network's update number `update` come next; for a density that is a schedule of these."""

    def _batch_of(self, timesteps):
        """What `sample` returns, of `timesteps` [B] in the order of the tables."""
        self._drawn_weights = self._weights  # another table takes its place when the density changes
        return TimestepBatch(self._schedule.to_scheduler(timesteps), self._weights[timesteps])

    def weights_of(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] float32 the weights of timesteps [B] of the latest `sample`, on `device`; the same that it returned.

        Raises:
            ValueError: nothing was drawn yet, or `timesteps` are no indices.
        """
        check_drawn(self._drawn_weights, "weights_of")
        return self._drawn_weights[self._in_tables(timesteps)[0]]

    def _random_order(self, count, generator):
        """[count] a random permutation; for noise in pairs one that puts neighbours half a batch apart, and of an odd
        number one without a neighbour in the middle. At each place of a batch it leaves p_t what it is."""
        rand = partial(torch.rand, generator=generator, device=self.device)
        if not self._in_pairs:
            return rand(count).argsort()
        half, ranks = count // 2, torch.arange(count, device=self.device)
        alone = ranks[:0]
        if count % 2:
            alone = (rand(1) * count).long().clamp_(max=count - 1)  # rounding
            ranks = ranks[:-1] + (ranks[:-1] >= alone)
        pairs = ranks.view(half, 2)[rand(half).argsort()]
        pairs = torch.where(rand(half, 1) < 0.5, pairs, pairs.flip(1))
        return torch.cat([pairs[:, 0], alone, pairs[:, 1]])

    def noise(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """[B, ...] the noise of a batch of images [B, ...], on their device: in place of `torch.randn_like(images)`.
        Called once for each call of `sample`, before it or after.

        Args:
            generator: on that device; the global one by default.
        """
        if self._in_pairs:
            warn_of_odd_batch(len(images) * self.gradient_accumulation_steps)
        options = {"generator": generator, "device": images.device, "dtype": images.dtype}
        if self._in_pairs and self.gradient_accumulation_steps > 1:
            return self._noise_of_part(images, options)
        return self.noise_coupling(images, lambda randn, *shape: randn(*shape, **options))

    def _noise_of_part(self, images, options):
        """The noise of one of the batches of an update, of all of which together the second half is minus the first.
        Where a batch is of another shape than the one before, it and the rest of the update have independent noise."""
        B, G = len(images), self.gradient_accumulation_steps
        part, self._noise_calls = self._noise_calls % G, self._noise_calls + 1
        half, begin, end = (B * G + 1) // 2, part * B, part * B + B
        so_far = torch.empty(0, *images.shape[1:], device=images.device) if part == 0 else self._first_half
        if len(so_far) != min(begin, half) or so_far.shape[1:] != images.shape[1:]:
            self._first_half = so_far[:0]  # which fits no batch to come
            return torch.randn(images.shape, **options)
        new = torch.randn(min(max(half - begin, 0), B), *images.shape[1:], **options)
        self._first_half = torch.cat([so_far.to(new.dtype), new])
        return torch.cat([new, -self._first_half[max(begin - half + len(new), 0) : max(end - half, 0)]])

    def losses(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] the unweighted losses of a batch, each a mean over an image's pixels or components: of eps, whatever the
        network predicts.

        Args:
            errors: [B, C, H, W] the network's errors in what it predicts (`prediction_type`), of either sign.
            timesteps: [B] as drawn.

        Raises:
            ValueError: `timesteps` are no indices, or `errors` are of another number of examples.
        """
        timesteps, scale = self._in_tables(timesteps, errors=errors)
        return self.error_filter(errors.float() * scale.sqrt().view(-1, *(errors.ndim - 1) * [1]), timesteps)

    def losses_of_epsilon(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] the same of errors in eps."""
        return self.error_filter(errors, self._in_tables(timesteps, errors=errors)[0])

    def losses_from(self, own_losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] the unweighted losses of eps, from a training loop's own: s_t of `epsilon_loss_scale` times these. The
        error filter, which needs the errors, has no part in it.

        Args:
            own_losses: [B] of what the network predicts (`prediction_type`): the mean of an example's squared errors,
                with a mask or a weight of its own if the loop has them, but none of its timestep.
            timesteps: [B] as drawn.

        Raises:
            ValueError: `timesteps` are no indices, or `own_losses` are not one for each.
        """
        if self.error_filter is not mean_squares:
            warn_of_unused_filter(name_of(self.error_filter))
        return self._in_tables(timesteps, own_losses=own_losses)[1] * own_losses.float()

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from a step.

        Args:
            timesteps: [B] as drawn.
            losses: [B] of `losses` or `losses_from`, detached: of eps, without the weights. Those of another prediction
                as they are teach another density.

        Raises:
            ValueError: nothing was drawn yet, `timesteps` are no indices, or `losses` are not one for each.
        """
        check_drawn(self._drawn_weights, "update")
        self._learn(self._in_tables(timesteps, losses=losses)[0], losses)

    def _in_tables(self, timesteps, **per_example):
        """`timesteps` [B] as drawn as indices into the tables here, and s_t of each."""
        check_per_example(timesteps, self._schedule, **per_example)
        # Indices on the CPU are sent to a GPU without waiting for it
        timesteps = timesteps.to(self.device, torch.int64, non_blocking=self.device.type == "cuda")
        timesteps = self._schedule.of_scheduler(timesteps)
        try:  # without waiting; and -1 is not taken for the last, as [timesteps] would
            return timesteps, self._epsilon_loss_scale.index_select(0, timesteps)
        except IndexError as error:
            raise ValueError(f"timesteps must be {allowed_indices(self._schedule)}: one is outside") from error

    def _learn(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """What a subclass makes of a step; `timesteps` [B] in the order of the tables."""

    def before_update(self, images: torch.Tensor, denoising_loss: DenoisingLoss) -> None:
        """Measure the model before the optimiser moves it; only for a sampler that learns from what an update changes.

        Args:
            images: [B, C, H, W] as given to `sample`.
            denoising_loss: of the model as it is: (images [N, C, H, W], noise like images, timesteps [N]) -> [N]
                unweighted epsilon-losses, without gradients, dropout or use of the global random state.
        """

    def after_update(self, denoising_loss: DenoisingLoss) -> None:
        """The optimiser has moved the model: measure it again."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws and the objective depend on, and what the sampler is made of, by name."""
        state = {"version": STATE_VERSION} | self._kind() | self._parts()
        names = ("seed", "num_draws", "gradient_accumulation_steps", "probabilities", "loss_weights")
        for name in (*names, *self.state_names):
            state[name] = getattr(self, name)
        if hasattr(self.error_filter, "state_dict"):
            state |= {FILTER_PREFIX + name: value for name, value in self.error_filter.state_dict().items()}
        return {name: value.cpu().clone() if torch.is_tensor(value) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the sampler that was saved would have, with its objective, whatever images this one was made from.
        `gradient_accumulation_steps` may be others: it goes on with the next update of the network.

        A state of an earlier version may lack the objective: this sampler's own stays, which is logged as a warning if
        it was made from images. Its weights may have been of another scale, which is warned of too.

        Raises:
            ValueError: the state is of another kind of sampler, another number of timesteps, or another loss weighting,
                error filter, image shape or noise schedule, or lacks what the sampler learned; nothing is changed.
        """
        self._refuse_other(state)
        if "loss_weights" in state:
            self._restore_objective(state)
        elif self.made_of.get("image_shape", True):  # or not known
            logger.warning(
                "this timestep sampler state is of an earlier version, without the objective: loss weighting and error "
                "filter are made anew from the images, and may differ from those of the run so far"
            )
        own = self.gradient_accumulation_steps
        saved = state.get("gradient_accumulation_steps", own)  # an earlier version did not save it
        for name in ("seed", "num_draws", *self.state_names):
            value = state[name]
            if name in self.counts_of_batches and saved != own:  # an update that was begun is begun anew
                value = value // saved * own
            setattr(self, name, value.to(self.device, copy=True) if torch.is_tensor(value) else value)
        self._generator_state = None
        self._restore_density(state["probabilities"])
        self._weights = self._drawn_weights = self.weights
        # Noise goes in step with the draws; the rest of an update that was begun has independent noise
        self._noise_calls, self._first_half = self.num_draws % self.gradient_accumulation_steps, torch.empty(0)
        if "version" not in state:
            self._warn_of_scale()

    def _refuse_other(self, state):
        cannot = "cannot load this timestep sampler state: "
        for name, own in self._kind().items():
            if state.get(name) != own:
                raise ValueError(f"{cannot}its {name} is {state.get(name)}, not {own}")
        if missing := [name for name in self.state_names if name not in state]:
            raise ValueError(f"{cannot}it is of an earlier version, without {', '.join(missing)}")
        for name, own in self._parts().items():
            then = state.get(name, {} if name in PART_OPTIONS and "loss_weights" in state else own)
            if then != own:
                remedy = f"; to go on with that, give `{name}=` (--{name})" if name in CHOSEN else ""
                raise ValueError(f"{cannot}its {name} is {then}, not {own}{remedy}")

    def _warn_of_scale(self):
        scale = float(self._scale())
        if abs(math.log(scale)) > 0.01:
            logger.warning(
                "this timestep sampler state is of an earlier version, which did not scale its weights: all weights, "
                f"and with them the gradients, are those of the run so far divided by {scale:.3g}. The objective is "
                "the same, but an optimizer that holds the size of past gradients, as Adam does, takes steps of "
                "another size until it has forgotten them"
            )

    def _kind(self):
        part = None if self._schedule.part_of is None else self._schedule.timesteps[[0, -1]].tolist()
        return {
            "sampler": type(self).__name__,
            "timestep_range": part,
            "num_train_timesteps": self.num_train_timesteps,
        }

    def _parts(self):
        """What the objective is made of, by name."""
        names = {name: name_of(getattr(self, name)) for name in ("error_filter", "noise_coupling")}
        return {**names, **self.made_of}

    @property
    def _in_pairs(self):
        return getattr(self.noise_coupling, "in_pairs", False)

    def _restore_objective(self, state):
        if hasattr(self.error_filter, "load_state_dict"):
            names = (name for name in state if name.startswith(FILTER_PREFIX))
            self.error_filter.load_state_dict({name.removeprefix(FILTER_PREFIX): state[name] for name in names})
        self.loss_weights = state["loss_weights"].to(self.device, copy=True)

    def _restore_density(self, probabilities):
        self.probabilities = self._table(probabilities)  # already normalised: again would change the last bits
        self._draw_from(self.probabilities)

    def _set_density(self, density):
        """Draw from `density` [T] from now on, normalised."""
        density = self._table(density)
        self.probabilities = density / density.sum()
        self._draw_from(self.probabilities)

    def _draw_from(self, probabilities):
        cdf = probabilities.to(widest_float(self.device)).cumsum(0)
        self._cdf = cdf / cdf[-1]
        self._weights = self.weights

    def _draw(self, num_draws, generator):
        """[num_draws] timesteps by the inverse CDF, in rising order."""
        options = {"generator": generator, "device": self.device, "dtype": self._cdf.dtype}
        if self.low_discrepancy:
            points = (torch.arange(num_draws, device=self.device) + torch.rand(1, **options)) / num_draws
        else:
            points = torch.rand(num_draws, **options).sort().values
        # The last point may round to 1, beyond every timestep: in float32 much sooner
        return torch.searchsorted(self._cdf, points, right=True).clamp_(max=self.num_train_timesteps - 1)

    def _table(self, values):
        return torch.as_tensor(values).float().to(self.device)  # in this order: the device may have no float64


@cache
def warn_of_unused_filter(name: str) -> None:
    """Once."""
    logger.warning(
        f"losses_from: the error filter {name} has no part in a loop's own losses; give the errors to `losses`, or "
        'make the sampler with error_filter="none"'
    )


def describe_schedule(schedule: NoiseSchedule) -> str:
    """The first, middle and last abar_t, in the digits on which all devices agree: they tell schedules apart."""
    abar = schedule.alphas_cumprod
    return "abar = " + ", ".join(f"{value:.4g}" for value in abar[[0, len(abar) // 2, -1]].tolist())


def name_of(part: Callable[..., Any]) -> str:
    """A function's name, with the options that a `functools.partial` sets; of another callable that of its class."""
    if isinstance(part, partial):
        return f"{name_of(part.func)}({', '.join(f'{name}={value}' for name, value in sorted(part.keywords.items()))})"
    return getattr(part, "__name__", type(part).__name__)


def fold_seed(seed: int, counter: int, stream: int = 0) -> int:
    """A seed for event number `counter` of a run, in 32 bits, which is all that a CPU generator reads: counters do not
    collide within a stream, and other streams and run seeds lie far away (Knuth's multiplicative hash)."""
    return ((seed * 2654435761 + stream) * 2654435761 + counter) % 2**32
