"""Two processes: they share the draws of one, hold the same tables, and resume exactly."""

import pytest
import torch
from conftest import results_of_two_ranks
from sampler_helpers import T, falling_loss, total_variation, uniform_density

from samplers import TIMESTEP_SAMPLERS, NoiseSchedule, make_timestep_sampler

WORKER = """
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from samplers import TIMESTEP_SAMPLERS, NoiseSchedule, make_timestep_sampler

folder = sys.argv[1]
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
assert dist.is_initialized() and accelerator.num_processes == 2
schedule = NoiseSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
loss = torch.load(f"{folder}/loss.pt")
out = {"rank": rank}
own_images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(rank)) * (1 + rank)

def fresh(name="adaptive", **options):
    options |= {"images": own_images}
    return make_timestep_sampler(schedule, timestep_sampler=name, loss_weighting="bell", error_filter="none", **options)

def train(sampler, steps, batch_size=100):
    for _ in range(steps):
        timesteps = sampler.sample(batch_size).timesteps
        sampler.update(timesteps, loss[timesteps])

for name in TIMESTEP_SAMPLERS:
    for low_discrepancy in (True, False):
        sampler = fresh(name, seed=3, low_discrepancy=low_discrepancy)
        out[name, low_discrepancy] = [tuple(sampler.sample(b)) for b in (1, 4, 7)]

sampler = fresh(refresh_every=4)
train(sampler, 90)
out["draws"] = sampler.sample(50).timesteps
out["state"] = sampler.state_dict()

sampler = fresh(refresh_every=4)
sampler.sample(1)
for _ in range(60):  # the ranks' batches differ in size, as at the end of an epoch
    sampler.update(torch.arange(1000)[: 300 - 100 * rank], loss[: 300 - 100 * rank])
out["uneven"] = sampler.probabilities

sampler = fresh(refresh_every=16)
accelerator.register_for_checkpointing(sampler)
train(sampler, 92)  # in the middle between two renewals, at 88 and 96
accelerator.save_state(f"{folder}/checkpoint")
own_state = sampler.state_dict()
train(sampler, 20)
out["uninterrupted"] = sampler.state_dict()
accelerator.load_state(f"{folder}/checkpoint")
train(sampler, 20)
out["resumed from the first's"] = sampler.state_dict()
sampler.load_state_dict(own_state)
train(sampler, 20)
out["resumed from its own"] = sampler.state_dict()

sampler = make_timestep_sampler(schedule, "adaptive", images=own_images)
filtered = sampler.losses(torch.ones(1000, 1, 8, 8), torch.arange(1000))
out["from the first's images"] = sampler.loss_weights, filtered

torch.save(out, f"{folder}/rank{rank}.pt")
accelerator.end_training()
"""


def images_of_first_rank():
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def schedule_of_worker():
    return NoiseSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, T, dtype=torch.float64).cumprod(0))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes saw."""
    return results_of_two_ranks(tmp_path_factory, WORKER, (falling_loss(T) * 256).round() / 256)


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_ranks_share_the_draws_of_one_process(ranks, name, low_discrepancy):
    options = {"seed": 3, "low_discrepancy": low_discrepancy, "error_filter": "none", "images": images_of_first_rank()}
    alone = make_timestep_sampler(schedule_of_worker(), timestep_sampler=name, loss_weighting="bell", **options)
    for i, batch_size in enumerate((1, 4, 7)):
        shares = [rank[name, low_discrepancy][i] for rank in ranks]
        assert shares[0][0].shape == (batch_size,)
        assert batch_size < 4 or not torch.equal(shares[0][0], shares[1][0])
        for shared, expected in zip(zip(*shares, strict=True), alone.sample(2 * batch_size), strict=True):
            assert torch.equal(torch.stack(shared, 1).flatten(), expected)


def test_ranks_take_the_data_s_spectrum_from_the_first_one_s_images(ranks):
    alone = make_timestep_sampler(schedule_of_worker(), "adaptive", images=images_of_first_rank())
    losses = alone.losses(torch.ones(1000, 1, 8, 8), torch.arange(1000))
    for rank in ranks:
        loss_weights, filtered = rank["from the first's images"]
        torch.testing.assert_close(loss_weights, alone.loss_weights)
        torch.testing.assert_close(filtered, losses)


def test_ranks_hold_the_same_tables_as_one_process_with_both_halves(ranks):
    loss = (falling_loss(T) * 256).round() / 256
    options = {"refresh_every": 4, "error_filter": "none"}
    alone = make_timestep_sampler(schedule_of_worker(), "adaptive", loss_weighting="bell", **options)
    for _ in range(90):
        timesteps = alone.sample(200).timesteps
        alone.update(timesteps, loss[timesteps])
    assert total_variation(alone.probabilities, uniform_density()) > 0.1
    first, second = (rank["state"]["probabilities"] for rank in ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.probabilities)
    torch.testing.assert_close(ranks[0]["state"]["sums"], alone.sums)
    assert torch.equal(torch.stack([rank["draws"] for rank in ranks], 1).flatten(), alone.sample(100).timesteps)


def test_ranks_hold_the_same_tables_when_their_batches_differ_in_size(ranks):
    assert torch.equal(ranks[0]["uneven"], ranks[1]["uneven"])
    assert total_variation(ranks[0]["uneven"], uniform_density()) > 0.1


def test_states_saved_one_a_rank_resume_exactly_between_two_renewals(ranks):
    for rank in ranks:
        for name in ("probabilities", "sums", "pending", "draws_seen", "updates", "num_draws"):
            value = rank["uninterrupted"][name]
            torch.testing.assert_close(rank["resumed from its own"][name], value, rtol=0, atol=0)


def test_a_state_of_the_first_rank_for_all_counts_no_loss_twice(ranks):
    """Accelerate saves the main process's state and gives it to every rank: the other's last losses are left out."""
    first, second = (rank["resumed from the first's"] for rank in ranks)
    for name in ("probabilities", "sums", "draws_seen", "updates", "num_draws"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    left_out = ranks[0]["uninterrupted"]["draws_seen"] - first["draws_seen"]
    assert left_out == 4 * 100  # of one rank, in the 4 updates from the renewal at 88 to the save at 92
