"""Two processes: the rivals that learn hold the same tables, or the same policy."""

import pytest
import torch
from conftest import results_of_two_ranks
from sampler_helpers import RIVALS, T, assert_same_state, begin, falling_loss, make_sampler

WORKER = """
import sys
import torch
from accelerate import Accelerator
from samplers import NoiseSchedule, make_timestep_sampler

folder = sys.argv[1]
torch.set_num_threads(1)
rank = Accelerator(cpu=True).process_index
schedule = NoiseSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
loss = torch.load(f"{folder}/loss.pt")
images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * (1 + rank)  # the first one's count
out = {}
for name in ("loss_second_moment", "uncertainty", "adaptive_log_snr", "info_noise"):
    options = {"warmup": 4} if name == "info_noise" else {}
    options = {"refresh_every": 4, "error_filter": "none", "images": images, **options}
    sampler = make_timestep_sampler(schedule, timestep_sampler=name, loss_weighting="edm", **options)
    sampler.sample(1)
    for _ in range(40):
        t = torch.cat([torch.arange(1000)[rank::2], torch.arange(100 * rank)])  # batches differ in size
        sampler.update(t, loss[t])
    out[name] = {"weights": sampler.weights, "probabilities": sampler.probabilities}
    sampler.update(t, loss[t])
    nothing = sampler._nothing()
    sampler.load_state_dict(sampler.state_dict() | {"rank": 0})  # as when the first one's state is given to all
    out[name]["counts its own only"] = torch.equal(sampler.pending, nothing) == (rank == 1)

sampler = make_timestep_sampler(schedule, "kim", update_every=2)
generator = torch.Generator().manual_seed(rank)
level = loss.clone() * 10
def denoising_loss(images, noise, t):
    return level[t] * (1 + images.mean((1, 2, 3)))
out["draws"] = []
for step in range(7):
    images = torch.rand(30, 1, 8, 8, generator=generator)
    t = sampler.sample(30, images=images).timesteps
    out["draws"].append(t)
    sampler.before_update(images, denoising_loss)
    level = level * 0.9
    sampler.after_update(denoising_loss)
out["kim"] = sampler.state_dict()
torch.save(out, f"{folder}/rank{rank}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes saw."""
    return results_of_two_ranks(tmp_path_factory, WORKER, (falling_loss(T) * 256).round() / 256)


@pytest.mark.parametrize("name", RIVALS)
def test_ranks_learn_the_same_tables_as_one_process(ranks, name):
    loss = (falling_loss(T) * 256).round() / 256
    options = {"warmup": 4} if name == "info_noise" else {}
    alone = begin(make_sampler(name, "edm", refresh_every=4, **options))
    t = torch.cat([torch.arange(T), torch.arange(100)])
    for _ in range(40):
        alone.update(t, loss[t])
    for table in ("probabilities", "weights"):
        first, second = (rank[name][table] for rank in ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, getattr(alone, table), rtol=3e-3, atol=1e-9)
    assert all(rank[name]["counts its own only"] for rank in ranks)
    untouched = make_sampler(name, "edm")
    learned = torch.stack([alone.probabilities, alone.weights]) / torch.stack(
        [untouched.probabilities, untouched.weights]
    )
    assert float((learned - 1).abs().max()) > 0.1


def test_ranks_hold_the_same_policy_and_draw_for_their_own_images(ranks):
    first, second = (rank["kim"] for rank in ranks)
    assert first.keys() == second.keys()
    assert_same_state(first, second)
    assert first["policy_steps"] == 4
    assert (first["falls"][:4].abs() > 0).any(1).all()
    assert not torch.equal(ranks[0]["draws"][0], ranks[1]["draws"][0])
