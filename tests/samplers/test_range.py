"""Training a part of the noise levels, as the two experts of Wan 2.2 do: of the rest, nothing is drawn or learned."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from sampler_helpers import assert_same_state, draws, falling_loss, images_of, scheduler, state_bits, tables

from samplers import METHODS, NoiseSchedule, epsilon_loss_scale, make_timestep_sampler

SCHEDULERS = {"ddpm": scheduler(), "flow": FlowMatchEulerDiscreteScheduler(shift=5.0)}
EXPERTS = {
    "high": {"min_timestep": 875},
    "low": {"max_timestep": 875},
    "middle": {"min_timestep": 200, "max_timestep": 400},
}
every_method = pytest.mark.parametrize("method", METHODS)
every_scheduler = pytest.mark.parametrize("process", SCHEDULERS)
every_expert = pytest.mark.parametrize("expert", EXPERTS)


def make(process, method, expert, **options):
    return make_timestep_sampler(SCHEDULERS[process], method, images=images_of(16), **EXPERTS[expert], **options)


def timestep_of(process, indices):
    """What the network is given."""
    return SCHEDULERS[process].timesteps[indices] if process == "flow" else indices


def inside(process, expert):
    """[T] which of the scheduler's indices may be drawn."""
    t = timestep_of(process, torch.arange(1000)).double()
    bounds = EXPERTS[expert]
    return (t >= bounds.get("min_timestep", 0)) & (t <= bounds.get("max_timestep", 1000))


@every_expert
@every_scheduler
@every_method
def test_every_method_trains_the_range_and_nothing_else(method, process, expert):
    sampler = make(process, method, expert)
    allowed = inside(process, expert)
    mean_loss = falling_loss(1000)

    def denoising_loss(images, noise, timesteps):  # for those that measure the model
        assert allowed[timesteps].all()
        return mean_loss[timesteps] * next(falling)

    falling = iter(torch.linspace(2, 1, 10000))
    for _ in range(25):  # past the first renewal of what learns
        images = images_of(8)
        timesteps, weights = sampler.sample(8, images=images)
        assert allowed[timesteps].all()
        assert (weights.isfinite() & (weights >= 0)).all()
        assert torch.equal(weights, sampler.weights_of(timesteps))
        errors = mean_loss[timesteps].sqrt().view(-1, 1, 1, 1) * images
        losses = sampler.losses(errors, timesteps)
        of_epsilon = sampler.losses_from(torch.ones(8), timesteps).sqrt().view(-1, 1, 1, 1) * errors
        torch.testing.assert_close(sampler.losses_of_epsilon(of_epsilon, timesteps), losses)
        sampler.before_update(images, denoising_loss)
        sampler.update(timesteps, losses)
        sampler.after_update(denoising_loss)
    p, w = sampler.probabilities.double(), sampler.weights.double()
    assert len(p) == len(w) == allowed.sum()
    assert float(p.sum()) == pytest.approx(1, rel=1e-5)
    assert p.min() > 0
    network = SCHEDULERS[process].config.get("prediction_type", "flow")
    scale = epsilon_loss_scale(NoiseSchedule.from_scheduler(SCHEDULERS[process]).between(**EXPERTS[expert]), network)
    assert float((p * w * scale).sum()) == pytest.approx(1, rel=1e-4)


@every_expert
@every_scheduler
def test_all_of_a_range_is_drawn(process, expert):
    """And as often as any other timestep of it, by equal draws."""
    counts = torch.bincount(draws(make(process, "ddpm", expert), 1000, 10).flatten(), minlength=1000)
    assert torch.equal(counts > 0, inside(process, expert))


@pytest.mark.parametrize("weighting", ["none", "flow", "bell"])
@every_expert
@every_scheduler
def test_the_objective_is_the_ranges_share_of_the_whole(weighting, process, expert):
    """Whatever the density has learned, timesteps count among each other as they do without a range."""
    allowed = inside(process, expert)
    parts = {"loss_weighting": weighting, "error_filter": "none"}
    part, whole = make(process, "adaptive", expert, **parts), make_timestep_sampler(SCHEDULERS[process], **parts)
    indices = allowed.nonzero()[:, 0]
    part.sample(1)
    for _ in range(20):
        part.update(indices, torch.linspace(1, 9, len(indices)))
    assert part.probabilities.max() > 1.5 * part.probabilities.min()  # it has adapted
    counts = (part.probabilities * part.weights).double()
    order = allowed.flip(0) if process == "flow" else allowed
    expected = whole.loss_weights[order].double()
    torch.testing.assert_close(counts / counts.sum(), expected / expected.sum(), rtol=1e-4, atol=0)


@every_scheduler
def test_two_experts_that_meet_share_no_more_than_the_timestep_between_them(process):
    assert (inside(process, "high") & inside(process, "low")).sum() <= 1
    assert (inside(process, "high") | inside(process, "low")).all()


@every_method
def test_saved_and_reloaded_it_goes_on_with_the_same_draws(method):
    saved, loaded = (make("flow", method, "low", seed=seed) for seed in (0, 1))
    t = saved.sample(16).timesteps
    saved.update(t, falling_loss(1000)[t])
    loaded.load_state_dict(saved.state_dict())
    assert_same_state(state_bits(saved), state_bits(loaded))
    assert torch.equal(saved.sample(16).timesteps, loaded.sample(16).timesteps)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"min_timestep": 500}, {"min_timestep": 600}, r"its timestep_range is \[500.0, 999.0\], not \[600.0, 999.0\]"),
        ({}, {"max_timestep": 500}, r"its timestep_range is None, not \[0.0, 500.0\]"),
        ({"max_timestep": 500}, {}, r"its timestep_range is \[0.0, 500.0\], not None"),
        ({"max_timestep": 499}, {"min_timestep": 500}, r"is \[0.0, 499.0\], not \[500.0, 999.0\]"),  # of as many
    ],
)
def test_a_state_of_another_range_is_refused_by_name(saved, loaded, message):
    state = make_timestep_sampler(scheduler(), "ddpm", **saved).state_dict()
    sampler = make_timestep_sampler(scheduler(), "ddpm", **loaded)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)


@pytest.mark.parametrize(
    "bounds", [(900, 100), (1001, None), (None, -1), (500, 500), (0.875, None), (0.5, 1.0), (float("nan"), None)]
)
@every_scheduler
def test_a_range_without_timesteps_and_fractions_are_refused_with_those_there_are(process, bounds):
    last = {"ddpm": "0 to 999", "flow": "4.98 to 999.9"}[process]
    message = f"min_timestep {bounds[0]} and max_timestep {bounds[1]} must have two .* {last}"
    with pytest.raises(ValueError, match=message):
        make_timestep_sampler(SCHEDULERS[process], "ddpm", min_timestep=bounds[0], max_timestep=bounds[1])


@every_scheduler
def test_the_whole_range_is_no_range(process):
    for bounds in ({}, {"min_timestep": 0, "max_timestep": 1000}):
        sampler = make_timestep_sampler(SCHEDULERS[process], "ddpm", **bounds)
        assert_same_state(state_bits(sampler), state_bits(make_timestep_sampler(SCHEDULERS[process], "ddpm")))


@every_scheduler
def test_a_timestep_outside_is_refused(process):
    """One of torch.randint, say, which knows of no range."""
    sampler = make(process, "adaptive", "middle", loss_weighting="none", error_filter="none")
    drawn = sampler.sample(2).timesteps
    outside = torch.where(inside(process, "middle"), -1, torch.arange(1000)).sort().values[[-1, -800]]
    for bad in outside:
        timesteps = torch.stack([drawn[0], bad])
        for ask in (
            lambda t=timesteps: sampler.losses(torch.ones(2, 1, 8, 8), t),
            lambda t=timesteps: sampler.losses_from(torch.ones(2), t),
            lambda t=timesteps: sampler.update(t, torch.ones(2)),
            lambda t=timesteps: sampler.weights_of(t),
        ):
            with pytest.raises(ValueError, match=r"timesteps must be integers in \[\d+, \d+\) as `sample` draws them"):
                ask()


def test_where_no_signal_is_left_a_range_before_it_has_weights():
    """Of v at zero terminal SNR, 1 / abar is infinite at the last timestep alone."""
    noise_scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"loss_weighting 'v' .* at timestep 999 the weight is inf"):
        make_timestep_sampler(noise_scheduler, "ddpm", loss_weighting="v")
    sampler = make_timestep_sampler(noise_scheduler, "ddpm", loss_weighting="v", max_timestep=998)
    assert sampler.weights.isfinite().all()


def test_a_part_of_a_part_is_a_part_of_the_whole():
    schedule = tables().between(100, 900).between(200, 300)
    assert schedule.timesteps.tolist() == list(range(200, 301))
    assert torch.equal(schedule.alphas_cumprod, tables().between(200, 300).alphas_cumprod)


def test_weights_of_another_number_of_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"loss_weights must be \[101\], one for each timestep, not \[1000\]"):
        type(make("ddpm", "ddpm", "low"))(tables().between(200, 300), torch.ones(1000))
