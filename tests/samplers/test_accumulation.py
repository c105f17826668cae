"""Small batches, several for each update: they are one batch to the draws, the pairs and the density."""

import pytest
import torch
from sampler_helpers import (
    assert_same_state,
    every_sampler,
    falling_loss,
    images_of,
    make_adapted,
    scheduler,
    state_bits,
)

from samplers import make_timestep_sampler


def adaptive(**options):
    options = {"loss_weighting": "none", "error_filter": "none", **options}
    return make_timestep_sampler(scheduler(), "adaptive", **options)


@every_sampler
@pytest.mark.parametrize(("batch_size", "steps"), [(1, 8), (2, 4), (4, 2), (3, 3), (1, 7)])
def test_the_batches_of_an_update_together_are_one_batch(name, batch_size, steps):
    if name == "kim":
        pytest.skip("its draws are independent, by image")
    whole = make_adapted(name, seed=3)
    parts = make_adapted(name, seed=3, gradient_accumulation_steps=steps)
    parts.load_state_dict({**whole.state_dict(), "updates": 0} if hasattr(parts, "updates") else whole.state_dict())
    for _ in range(3):
        expected = whole.sample(batch_size * steps)
        timesteps, weights = (
            torch.cat(each) for each in zip(*(parts.sample(batch_size) for _ in range(steps)), strict=True)
        )
        assert torch.equal(timesteps, expected.timesteps)
        assert torch.equal(weights, expected.weights)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 8), (2, 4), (4, 2), (3, 3), (1, 7), (2, 3), (8, 1)])
def test_noise_is_opposite_for_neighbours_in_t_whichever_batch_they_are_in(batch_size, steps):
    sampler, images = adaptive(gradient_accumulation_steps=steps), torch.zeros(batch_size, 2, 4, 4)
    for _ in range(2):
        noise, timesteps = [], []
        for _ in range(steps):
            noise.append(sampler.noise(images))
            timesteps.append(sampler.sample(batch_size).timesteps)
        noise, timesteps = torch.cat(noise), torch.cat(timesteps)
        pairs, size = len(noise) // 2, len(noise)
        assert noise.shape == (size, 2, 4, 4)
        assert torch.equal(noise[:pairs], -noise[size - pairs :])
        assert len(noise.flatten(1).unique(dim=0)) == size
        stride = (1 + size % 2) * 1000 / size  # of an odd number, two neighbours may be those of the one that is alone
        assert (timesteps[:pairs] - timesteps[size - pairs :]).abs().max() <= stride + 1


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_batches_of_other_shapes_have_noise_of_their_own(steps):
    """The last of an epoch, and those of a bucket of another size: none of it is anyone's opposite."""
    sampler = adaptive(gradient_accumulation_steps=steps)
    shapes = [(4, 2, 4, 4), (1, 2, 4, 4), (4, 2, 4, 4), (4, 2, 6, 4)]
    for shape in [shapes[i] for i in torch.randint(4, (24,), generator=torch.Generator().manual_seed(0))]:
        assert sampler.noise(torch.zeros(shape)).shape == shape
        assert sampler.sample(shape[0]).timesteps.shape == shape[:1]
    noise = [sampler.noise(torch.zeros(shape)).flatten(1) for _ in range(24 * steps) for shape in shapes[:2]]
    assert {len(each) for each in noise} == {1, 4}
    assert len(torch.cat(noise).abs().unique(dim=0)) == len(torch.cat(noise))


def test_the_pairs_are_back_with_the_next_update():
    sampler, images = adaptive(gradient_accumulation_steps=2), torch.zeros(2, 2, 4, 4)
    sampler.noise(images)
    sampler.noise(images[:1])
    assert torch.equal(sampler.noise(images), -sampler.noise(images))


def test_the_density_is_the_same_throughout_an_update():
    sampler = adaptive(gradient_accumulation_steps=4, refresh_every=5)
    changes = []
    for call in range(1, 121):
        before = sampler.probabilities.clone()
        timesteps = sampler.sample(2).timesteps
        sampler.update(timesteps, falling_loss(1000)[timesteps])
        if not torch.equal(sampler.probabilities, before):
            changes.append(call)
    assert all(call % 4 == 0 for call in changes)  # after the last batch of an update
    assert [call // 4 for call in changes if call >= 64] == [16, 18, 20, 22, 24, 26, 28, 30]  # within a tenth


def test_schedules_count_updates():
    info_noise = make_timestep_sampler(
        scheduler(),
        "info_noise",
        images=images_of(16),
        gradient_accumulation_steps=4,
        warmup=10,
        refresh_every=1,
        min_bin_count=1,
    )
    before = info_noise.probabilities.clone()
    for call in range(40):
        assert torch.equal(info_noise.probabilities, before), call
        timesteps = info_noise.sample(50).timesteps
        info_noise.update(timesteps, falling_loss(1000)[timesteps])
    assert not torch.equal(info_noise.probabilities, before)
    clts = make_timestep_sampler(scheduler(), "clts", gradient_accumulation_steps=4, num_updates=10, refresh_every=1)
    curriculum = make_timestep_sampler(scheduler(), "curriculum", gradient_accumulation_steps=4, num_updates=10)
    first = curriculum.probabilities.clone()
    for call in range(44):
        before = clts.probabilities.clone()
        clts.sample(2)
        curriculum.sample(2)
        assert torch.equal(clts.probabilities, before) or call % 4 == 0
        assert torch.equal(curriculum.probabilities, first) == (call < 40)


def test_saved_between_updates_it_goes_on_as_it_would_have():
    saved, loaded = adaptive(gradient_accumulation_steps=3), adaptive(gradient_accumulation_steps=3, seed=5)
    for _ in range(6):
        saved.sample(2)
    loaded.load_state_dict(saved.state_dict())
    for _ in range(6):
        for a, b in zip(saved.sample(2), loaded.sample(2), strict=True):
            assert torch.equal(a, b)
    assert_same_state(state_bits(saved), state_bits(loaded))


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_noise_goes_in_step_with_the_draws_after_a_state_of_half_an_update(calls):
    images = images_of(2)
    saved, loaded = (adaptive(gradient_accumulation_steps=3) for _ in range(2))
    loaded.noise(images)  # of an update of its own, which ends here
    for _ in range(calls):
        saved.sample(2)
        saved.noise(images)
    loaded.load_state_dict(saved.state_dict())
    for _ in range(-calls % 3):
        loaded.sample(2)
        loaded.noise(images)
    for _ in range(2):
        drawn = [(loaded.sample(2).timesteps, loaded.noise(images)) for _ in range(3)]
        timesteps, noise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        assert torch.equal(noise[:3], -noise[3:])
        assert (timesteps[:3] - timesteps[3:]).abs().max() <= 1000 / 6 + 1


def test_no_accumulation_is_refused_by_name():
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be an integer of at least 1, not 0"):
        make_timestep_sampler(scheduler(), "adaptive", images=images_of(8), gradient_accumulation_steps=0)


def losses_seen(sampler, num_updates):
    """A sampler as it is after so many updates of the network."""
    for _ in range(num_updates * sampler.gradient_accumulation_steps):
        timesteps = sampler.sample(2).timesteps
        sampler.update(timesteps, falling_loss(1000)[timesteps])
    return sampler


@every_sampler
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3)])
def test_reloaded_with_other_batches_for_each_update_it_counts_on_in_updates(name, before, after):
    def made(steps):
        options = {"clts": {"num_updates": 40, "refresh_every": 5}, "curriculum": {"num_updates": 15}}.get(name, {})
        options |= {"images": images_of(16), "gradient_accumulation_steps": steps}
        return make_timestep_sampler(scheduler(), timestep_sampler=name, **options)

    saved, other = losses_seen(made(before), 16), made(after)
    expected = torch.cat([saved.sample(12 // before).timesteps for _ in range(before)])
    saved.load_state_dict(saved.state_dict() | {"num_draws": 16 * before})  # as if it had not drawn these
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.probabilities, saved.probabilities)
    if name != "kim":  # whose draws are independent, by batch
        assert torch.equal(torch.cat([other.sample(12 // after).timesteps for _ in range(after)]), expected)
    losses_seen(other, 4)
    if hasattr(other, "network_updates"):
        assert other.network_updates == 20


@pytest.mark.parametrize("name", ["uniform", "speed", "log_normal", "adaptive"])
def test_a_generator_of_the_users_own_draws_an_update_as_one_batch(name):
    whole, parts = make_adapted(name), make_adapted(name, gradient_accumulation_steps=4)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    updates = []
    for _ in range(2):
        expected = whole.sample(16, generators[0]).timesteps
        updates.append(torch.cat([parts.sample(4, generators[1]).timesteps for _ in range(4)]))
        assert torch.equal(updates[-1], expected)
    assert not torch.equal(*updates)


def test_a_generator_that_draws_the_noise_too_draws_other_noise_for_each_batch():
    sampler = make_adapted("uniform", gradient_accumulation_steps=4)
    generator, noise = torch.Generator().manual_seed(3), []
    for _ in range(4):
        sampler.sample(2, generator)
        noise.append(torch.randn(3, generator=generator))
    assert len({tuple(values.tolist()) for values in noise}) == 4
