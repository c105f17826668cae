"""What p_t w_t comes to: importance samplers leave the objective alone, the others leave the weighting alone."""

import pytest
import torch
from sampler_helpers import every_sampler, every_schedule, make_adapted, tables, weighting_table

from samplers import LOSS_WEIGHTINGS, TIMESTEP_SAMPLERS, epsilon_loss_scale, weightings


@every_schedule
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_importance_sampling_is_unbiased_for_every_table(weighting, schedule, T):
    corrected = [name for name, kind in TIMESTEP_SAMPLERS.items() if kind.corrects_for_density]
    assert "adaptive" in corrected
    for name in corrected:
        try:
            sampler = make_adapted(name, schedule, T, weighting)
        except ValueError:
            continue  # refused: see above
        assert not torch.allclose(sampler.probabilities, torch.tensor(1 / T), rtol=0.01)  # it has adapted
        table = torch.rand(T, generator=torch.Generator().manual_seed(0)).double()
        p, w = sampler.probabilities.double(), sampler.weights.double()
        c = weighting_table(weighting, tables(schedule, T))
        assert float((p * w * table).sum()) == pytest.approx(float((c * table).mean() / c.mean()), rel=1e-5)


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_importance_sampling_is_unbiased_in_practice(low_discrepancy):
    sampler = make_adapted("adaptive", low_discrepancy=low_discrepancy)
    table = 1 + torch.sin(7 * torch.arange(1000) / 1000).double()
    batches = [sampler.sample(64) for _ in range(400)]
    estimates = torch.stack([(w * table[t]).mean() for t, w in batches])
    truth = float((weightings.bell(tables()) * table).mean())
    assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / 20


@every_sampler
def test_other_samplers_change_the_objective_and_leave_the_weighting_alone(name):
    sampler = make_adapted(name, weighting="p2")
    if not sampler.corrects_for_density and name != "uncertainty":  # which learns the weighting
        assert torch.allclose(sampler.relative_weights().double(), 1 / (1 + tables().snr))


@every_sampler
def test_every_method_gives_the_same_mass_to_its_objective(name):
    """The scale of all weights together is no part of an objective, but a limit on the gradient's norm would see it: on
    the loss of what the network predicts."""
    for weighting, output in (("none", "epsilon"), ("edm", "epsilon"), ("min_snr", "v_prediction"), ("v", "sample")):
        sampler = make_adapted(name, weighting=weighting, prediction_type=output)
        p, w = sampler.probabilities.double(), sampler.weights.double()
        scale = epsilon_loss_scale(tables(), output)
        assert float((p * w * scale).sum()) == pytest.approx(1, rel=1e-4)
        relative = w / sampler.relative_weights()
        assert torch.allclose(relative, relative[0].expand(len(w)), rtol=1e-4)


def test_the_flow_s_loss_is_level_for_a_network_of_v_alone():
    schedule = tables()
    levels = weightings.flow(schedule) * epsilon_loss_scale(schedule, "v_prediction")
    assert 1 <= levels.min() <= levels.max() <= 2
    assert weightings.flow(schedule).max() > schedule.sigma[-1] ** 2
