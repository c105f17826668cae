"""Every sampler's state: saved and reloaded it goes on with the very same draws, and another's is refused."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from sampler_helpers import (
    T,
    adapt,
    assert_same_state,
    draws,
    every_sampler,
    falling_loss,
    images_of,
    make_adapted,
    random_images,
    scheduler,
    state_bits,
    tables,
)

from samplers import METHODS, TIMESTEP_SAMPLERS, Spectrum, WienerFilter, make_timestep_sampler


@every_sampler
@pytest.mark.parametrize("steps", [0, 1, 50])
def test_reloaded_it_goes_on_with_the_very_same_draws(name, steps, tmp_path):
    """Also between two renewals of the density: 50 is not a multiple of 20."""

    def train(sampler, steps):
        for _ in range(steps):
            timesteps = sampler.sample(32).timesteps
            sampler.update(timesteps, falling_loss(1000)[timesteps] + timesteps % 7)
        return sampler

    def fresh(seed):
        return make_timestep_sampler(scheduler(), timestep_sampler=name, images=random_images(), seed=seed)

    saved = train(adapt(fresh(5)) if steps else fresh(5), steps)
    torch.save(saved.state_dict(), tmp_path / "sampler.pt")
    loaded = fresh(0)
    loaded.load_state_dict(torch.load(tmp_path / "sampler.pt"))
    for _ in range(3):
        assert_same_state(state_bits(saved), state_bits(loaded))
        assert torch.equal(saved.weights, loaded.weights)
        for a, b in zip(saved.sample(16), loaded.sample(16), strict=True):
            assert torch.equal(a, b)
        train(saved, 15)
        train(loaded, 15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_was_loaded_to_a_gpu_is_taken(method, tmp_path):
    torch.save(make_timestep_sampler(scheduler(), method, images=random_images()).state_dict(), tmp_path / "sampler.pt")
    for device in ("cpu", "cuda"):
        sampler = make_timestep_sampler(scheduler(), method, images=random_images(), device=device)
        sampler.load_state_dict(torch.load(tmp_path / "sampler.pt", map_location="cuda"))
        assert sampler.sample(8).timesteps.device.type == device


@every_sampler
def test_a_saved_state_is_a_snapshot(name):
    sampler = make_adapted(name)
    state = sampler.state_dict()
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
    other = make_adapted(name)
    other.load_state_dict(state)
    for owner in (sampler, other):
        owner.sample(8)
        owner.update(torch.arange(1000), torch.ones(1000))
        adapt(owner, torch.ones(1000))
    assert_same_state(state, before)


@every_sampler
def test_a_state_of_another_kind_or_length_is_refused_by_name(name):
    sampler = make_adapted(name)
    before = state_bits(sampler)
    other = "uniform" if name != "uniform" else "adaptive"
    with pytest.raises(ValueError, match=TIMESTEP_SAMPLERS[other].__name__):
        sampler.load_state_dict(make_adapted(other).state_dict())
    with pytest.raises(ValueError, match=r"num_train_timesteps is 4000"):
        sampler.load_state_dict(make_adapted(name, T=4000).state_dict())
    assert_same_state(state_bits(sampler), before)


@every_sampler
def test_accelerate_checkpoints_it(name, tmp_path):
    accelerator, sampler = Accelerator(cpu=True), make_adapted(name)
    accelerator.register_for_checkpointing(sampler)
    sampler.sample(8)
    sampler.update(torch.arange(10), torch.ones(10))
    accelerator.save_state(tmp_path)
    expected, next_draws = state_bits(sampler), draws(sampler, 8, 3)
    adapt(sampler, torch.rand(1000))
    accelerator.load_state(tmp_path)
    assert_same_state(state_bits(sampler), expected)
    assert torch.equal(draws(sampler, 8, 3), next_draws)


# The objective


def sampler_of(images, name="adaptive", **parts):
    return make_timestep_sampler(scheduler(), timestep_sampler=name, images=images, **parts)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def smooth_images_of(batch_size, **shape):
    """Of another spectrum than `random_images`, which have none to speak of."""
    return images_of(batch_size, **shape).cumsum(-1).cumsum(-2) / 10


@every_sampler
def test_reloaded_it_has_the_same_objective_though_it_was_made_from_other_images(name, tmp_path):
    saved, loaded = sampler_of(random_images(), name), sampler_of(smooth_images_of(64), name)
    errors, t = torch.randn(T, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(T)
    assert not torch.allclose(saved.loss_weights, loaded.loss_weights, rtol=0.1)
    assert not torch.allclose(saved.losses(errors, t), loaded.losses(errors, t), rtol=0.1)
    torch.save(saved.state_dict(), tmp_path / "sampler.pt")
    loaded.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    assert torch.equal(saved.loss_weights, loaded.loss_weights)
    assert torch.equal(saved.losses(errors, t), loaded.losses(errors, t))
    for a, b in zip(saved.sample(64), loaded.sample(64), strict=True):
        assert torch.equal(a, b)
    assert_same_state(state_bits(saved), state_bits(loaded))


@pytest.mark.parametrize(
    "options", [{"loss_weighting_options": {"s": 1.0}}, {"error_filter_options": {"plain_fraction": 0.5}}]
)
def test_a_state_from_before_parts_had_options_had_none(options):
    state = without(sampler_of(random_images()).state_dict(), "loss_weighting_options", "error_filter_options")
    sampler_of(random_images()).load_state_dict(state)
    (name,) = options
    with pytest.raises(ValueError, match=rf"its {name} is {{}}, not {{'.* give `{name}=`"):
        sampler_of(random_images(), **options).load_state_dict(state)


def test_reloaded_it_has_the_filter_of_the_same_plain_fraction():
    spectra = (Spectrum.of(images) for images in (random_images(), smooth_images_of(64)))
    filters = [WienerFilter(tables(), spectrum, f) for spectrum, f in zip(spectra, (0.5, 0.1), strict=True)]
    saved, loaded = (TIMESTEP_SAMPLERS["uniform"](tables(), error_filter=filter) for filter in filters)
    loaded.load_state_dict(saved.state_dict())
    errors, t = torch.randn(T, 1, 8, 8), torch.arange(T)
    assert torch.equal(saved.losses(errors, t), loaded.losses(errors, t))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"loss_weighting": "bell"},
            r"its loss_weighting is scaled_logit_normal, not bell; .* give `loss_weighting=` \(--loss_weighting\)",
        ),
        ({"error_filter": "none"}, "its error_filter is WienerFilter, not mean_squares; .* give `error_filter=`"),
        ({"noise_coupling": "immiscible"}, "its noise_coupling is antithetic, not immiscible; .* `noise_coupling=`"),
        (
            {"loss_weighting_options": {"s": 1.0}},
            r"its loss_weighting_options is {}, not {'s': 1.0}; .* give `loss_weighting_options=`",
        ),
        ({"error_filter_options": {"plain_fraction": 0.5}}, "its error_filter_options is {}, not {'plain_fraction'"),
        ({"error_filter": "wiener"}, "its exponent is 1.0, not 2.0"),
        ({"error_filter": "wiener_amplitude"}, "its power is 1.0, not 0.5"),
        ({"prediction_type": "v_prediction"}, "its prediction_type is epsilon, not v_prediction"),
        ({"images": images_of(16, channels=3)}, r"its image_shape is \[1, 8, 8\], not \[3, 8, 8\]"),
        ({"images": images_of(16, size=16)}, r"its image_shape is \[1, 8, 8\], not \[1, 16, 16\]"),
    ],
)
def test_a_state_of_another_objective_is_refused_by_name(other, message):
    state = sampler_of(random_images()).state_dict()
    sampler = sampler_of(**{"images": random_images(), **other})
    before = state_bits(sampler)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert_same_state(state_bits(sampler), before)


def test_a_filter_s_state_from_before_there_was_a_power_is_of_the_power_1():
    spectrum = Spectrum.of(random_images())
    state = WienerFilter(tables(), spectrum, exponent=1.0).state_dict()
    del state["power"]
    WienerFilter(tables(), spectrum, exponent=1.0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"power is 1.0, not 0.5; .* `error_filter=` .*wiener_ode 1"):
        WienerFilter(tables(), spectrum, exponent=1.0, power=0.5).load_state_dict(state)


def test_a_filter_s_state_of_another_image_shape_is_refused():
    filters = [WienerFilter(tables(), Spectrum.of(images_of(16, size=size))) for size in (8, 16)]
    with pytest.raises(ValueError, match=r"of images of \[1, 8, 8\], this filter of \[1, 16, 16\]"):
        filters[1].load_state_dict(filters[0].state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_an_earlier_version_is_loaded_with_a_warning_where_images_made_the_objective(method, caplog):
    def made():
        return make_timestep_sampler(scheduler(), method, images=random_images())

    saved = made()
    saved.sample(8)
    saved_then = {"sampler", "num_train_timesteps", "seed", "num_draws", "probabilities", *saved.state_names}
    state = {name: value for name, value in saved.state_dict().items() if name in saved_then}
    assert state.keys() == saved_then
    loaded = made()
    loaded.load_state_dict(state)
    assert ("may differ" in caplog.text) == METHODS[method].needs_images
    assert torch.equal(saved.loss_weights, loaded.loss_weights)
    assert torch.equal(saved.sample(8).timesteps, loaded.sample(8).timesteps)


def test_a_state_that_lacks_what_the_sampler_learned_is_refused_by_name():
    saved, loaded = (sampler_of(random_images(), "adaptive_log_snr") for _ in range(2))
    before = state_bits(loaded)
    with pytest.raises(ValueError, match="of an earlier version, without averages"):
        loaded.load_state_dict(without(saved.state_dict(), "averages"))
    assert_same_state(state_bits(loaded), before)


def test_what_a_state_lacks_is_said_before_what_it_was_made_of():
    """Of an earlier version, info_noise learned other things, and needed no images."""
    sampler = make_timestep_sampler(scheduler(), "info_noise", images=random_images())
    state = without(sampler.state_dict(), "bin_mmse", "data_variance") | {"image_shape": None}
    with pytest.raises(ValueError, match="of an earlier version, without bin_mmse, data_variance"):
        sampler.load_state_dict(state)


@pytest.mark.parametrize(("method", "weighting"), [("logit_normal", "none"), ("edm2", "edm")])
def test_the_loss_weighting_that_a_method_used_to_have_is_given_and_the_run_goes_on(method, weighting):
    saved = make_timestep_sampler(scheduler(), method, loss_weighting=weighting)
    with pytest.raises(ValueError, match="give `loss_weighting=`"):
        make_timestep_sampler(scheduler(), method).load_state_dict(saved.state_dict())
    resumed = make_timestep_sampler(scheduler(), method, loss_weighting=weighting, seed=3)
    resumed.load_state_dict(saved.state_dict())
    assert_same_state(state_bits(resumed), state_bits(saved))


@pytest.mark.parametrize(("method", "factor"), [("edm", "7.46"), ("logit_normal", "11.7"), ("ddpm", None)])
def test_a_state_of_before_the_weights_were_scaled_is_loaded_with_a_warning_of_the_factor(method, factor, caplog):
    saved, loaded = (make_timestep_sampler(scheduler(), method) for _ in range(2))
    loaded.load_state_dict(saved.state_dict())
    assert caplog.text == ""
    loaded.load_state_dict(without(saved.state_dict(), "version"))
    assert caplog.text.count("did not scale its weights") == (factor is not None)
    assert factor is None or f"divided by {factor}." in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_another_noise_schedule_is_refused(method):
    """Of as many timesteps: its objective would not be this run's."""
    state = make_timestep_sampler(scheduler(), method, images=random_images()).state_dict()
    other = DDPMScheduler(num_train_timesteps=scheduler().config.num_train_timesteps, beta_schedule="scaled_linear")
    sampler = make_timestep_sampler(other, method, images=random_images())
    with pytest.raises(ValueError, match=r"its noise_schedule is abar = .*, not abar = "):
        sampler.load_state_dict(state)
