"""The lines of docs/integrations.md, in loops of the conventions of the trainers that they are for.

A step here is what such a loop does with one batch. It returns the loss to train by, and the one that the trainer would
have computed for the same noise and timesteps.
"""

import io
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from tiny_networks import tiny_unet
from toys import flux, latents, sd3, text, unet_with_text, wan

from samplers import NoiseSchedule, epsilon_loss_scale, make_timestep_sampler

BATCH_SIZE, ACCUMULATION_STEPS = 2, 2
T = 1000
PLAIN_FLOW = NoiseSchedule.of_flow(torch.arange(T, 0, -1) / T)  # sigma = 1, 0.999, ..., 0.001
ALL_SIGMAS = torch.arange(1, T + 1) / T  # OneTrainer's


def train_unconditional(model, noise_scheduler, sampler, clean_images):
    """diffusers: predicts epsilon, or the image with the SNR as its weight."""
    noise = sampler.noise(clean_images)
    timesteps, weights = sampler.sample(len(clean_images))
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    model_output = model(noisy_images, timesteps).sample
    is_epsilon = noise_scheduler.config.prediction_type == "epsilon"
    losses = sampler.losses(model_output - (noise if is_epsilon else clean_images), timesteps)
    sampler.update(timesteps, losses.detach())
    loss = (weights * losses).mean()
    if is_epsilon:
        return loss, F.mse_loss(model_output, noise)
    alpha_t = noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return loss, (alpha_t / (1 - alpha_t) * F.mse_loss(model_output, clean_images, reduction="none")).mean()


def train_text_to_image(model, noise_scheduler, sampler, latents):
    """diffusers: predicts epsilon or v."""
    noise = sampler.noise(latents)
    timesteps, weights = sampler.sample(len(latents))
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    is_epsilon = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if is_epsilon else noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = model(noisy_latents, timesteps, text(len(latents)), return_dict=False)[0]
    losses = sampler.losses(model_pred.float() - target.float(), timesteps)
    sampler.update(timesteps, losses.detach())
    return (weights * losses).mean(), F.mse_loss(model_pred.float(), target.float())


def get_sigmas(noise_scheduler, timesteps, n_dim):
    """As diffusers' scripts look them up."""
    indices = [(noise_scheduler.timesteps == t).nonzero().item() for t in timesteps]
    return noise_scheduler.sigmas[indices].view(-1, *(n_dim - 1) * [1])


def draw_as_diffusers(noise_scheduler, sampler, model_input):
    u = sampler.compute_density_for_timestep_sampling(
        weighting_scheme="logit_normal", batch_size=len(model_input), logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    indices = (u * noise_scheduler.config.num_train_timesteps).long()
    timesteps = noise_scheduler.timesteps[indices]
    return indices, timesteps, get_sigmas(noise_scheduler, timesteps, model_input.ndim)


def train_dreambooth_lora_sd3(model, noise_scheduler, sampler, model_input):
    noise = sampler.noise(model_input)
    indices, timesteps, sigmas = draw_as_diffusers(noise_scheduler, sampler, model_input)
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    model_pred = model(
        hidden_states=noisy_model_input,
        timestep=timesteps,
        encoder_hidden_states=text(len(model_input)),
        pooled_projections=text(len(model_input))[:, 0],
        return_dict=False,
    )[0]
    target = noise - model_input
    losses = sampler.losses(model_pred.float() - target.float(), indices)
    sampler.update(indices, losses.detach())
    return (sampler.weights_of(indices) * losses).mean(), F.mse_loss(model_pred, target)


def predict_with_flux(model, noisy_model_input, times):
    """In packed tokens; unpacked again."""
    B, C, H, W = noisy_model_input.shape
    model_pred = model(
        hidden_states=FluxPipeline._pack_latents(noisy_model_input, B, C, H, W),
        timestep=times,
        pooled_projections=text(B)[:, 0],
        encoder_hidden_states=text(B),
        txt_ids=torch.zeros(3, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(model_pred, height=H * 8, width=W * 8, vae_scale_factor=8)


def train_dreambooth_lora_flux(model, noise_scheduler, sampler, model_input):
    noise = sampler.noise(model_input)
    indices, timesteps, sigmas = draw_as_diffusers(noise_scheduler, sampler, model_input)
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    model_pred = predict_with_flux(model, noisy_model_input, timesteps / 1000)
    target = noise - model_input
    losses = sampler.losses(model_pred.float() - target.float(), indices)
    sampler.update(indices, losses.detach())
    return (sampler.weights_of(indices) * losses).mean(), F.mse_loss(model_pred, target)


def train_wan(model, noise_scheduler, sampler, latents):
    """A video [B, C, F, H, W]."""
    noise = sampler.noise(latents)
    indices, weights = sampler.sample(len(latents))
    timesteps, sigmas = noise_scheduler.timesteps[indices], noise_scheduler.sigmas[indices].view(-1, 1, 1, 1, 1)
    model_pred = model((1 - sigmas) * latents + sigmas * noise, timesteps, text(len(latents)), return_dict=False)[0]
    target = noise - latents
    losses = sampler.losses(model_pred - target, indices)
    sampler.update(indices, losses.detach())
    return (weights * losses).mean(), F.mse_loss(model_pred, target)


LOSS_WEIGHTS = torch.tensor([1.0, 0.5])  # of a data set's subsets, by example
MASK = torch.ones(1, 1, 8, 8).tril()


def sd_scripts_train_network(model, noise_scheduler, sampler, latents):
    """kohya: its own losses, with masks and weights."""
    noise = sampler.noise(latents)
    timesteps, weights = sampler.sample(len(latents))
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    is_epsilon = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if is_epsilon else noise_scheduler.get_velocity(latents, noise, timesteps)
    noise_pred = model(noisy_latents, timesteps, text(len(latents))).sample
    loss = F.mse_loss(noise_pred.float(), target.float(), reduction="none") * MASK
    loss = own = loss.mean(dim=[1, 2, 3]) * LOSS_WEIGHTS
    loss = sampler.losses_from(loss, timesteps)
    sampler.update(timesteps, loss.detach())
    return (weights * loss).mean(), own.mean()


def sd_scripts_sd3_train_network(model, noise_scheduler, sampler, latents):
    """kohya: without its preconditioning, which makes an error of the image of one of the velocity."""
    noise = sampler.noise(latents)
    indices, weights = sampler.sample(len(latents))
    timesteps, sigmas = noise_scheduler.timesteps[indices], noise_scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy_model_input = sigmas * noise + (1.0 - sigmas) * latents
    model_pred = model(noisy_model_input, text(len(latents)), text(len(latents))[:, 0], timesteps).sample
    loss = own = F.mse_loss(model_pred, noise - latents, reduction="none").mean(dim=[1, 2, 3])
    loss = sampler.losses_from(loss, indices)
    sampler.update(indices, loss.detach())
    return (weights * loss).mean(), own.mean()


def musubi_tuner(model, noise_scheduler, sampler, latents):
    """kohya: the high-noise expert of Wan 2.2."""
    noise = sampler.noise(latents)
    indices, weights = sampler.sample(len(latents))
    timesteps = (1000 - indices).float()
    assert (timesteps >= 875).all()
    t = (timesteps / 1000).view(-1, *[1] * (latents.ndim - 1))
    model_pred = model((1 - t) * latents + t * noise, timesteps, text(len(latents)), return_dict=False)[0]
    loss = own = F.mse_loss(model_pred.float(), (noise - latents).float(), reduction="none").flatten(1).mean(1)
    loss = sampler.losses_from(loss, indices)
    sampler.update(indices, loss.detach())
    return (weights * loss).mean(), own.mean()


def onetrainer(model, noise_scheduler, sampler, scaled_latent_image):
    """Timesteps rise with the noise: sigma = (timestep + 1) / T."""
    latent_noise = sampler.noise(scaled_latent_image)
    indices, weights = sampler.sample(len(scaled_latent_image))
    timestep = (T - 1 - indices).int()
    sigma = ALL_SIGMAS[timestep].view(-1, 1, 1, 1)
    predicted = predict_with_flux(model, latent_noise * sigma + scaled_latent_image * (1 - sigma), timestep / 1000)
    losses = own = F.mse_loss(predicted, latent_noise - scaled_latent_image, reduction="none").mean([1, 2, 3])
    losses = sampler.losses_from(losses, indices)
    sampler.update(indices, losses.detach())
    return (weights * losses).mean(), own.mean()


def simpletuner(model, noise_scheduler, sampler, latents):
    """Noise levels of its own, that are no scheduler's."""
    noise = sampler.noise(latents)
    indices, weights = sampler.sample(len(latents))
    sigmas = (T - indices) / T
    grid = sigmas.view(-1, 1, 1, 1)
    model_pred = predict_with_flux(model, (1.0 - grid) * latents + grid * noise, sigmas)
    loss = own = F.mse_loss(model_pred.float(), (noise - latents).float(), reduction="none").mean(dim=[1, 2, 3])
    loss = sampler.losses_from(loss, indices)
    sampler.update(indices, loss.detach())
    return (weights * loss).mean(), own.mean()


class Trainer(NamedTuple):
    step: object
    make_network: object
    noise_scheduler: object
    plain_weighting: str  # with which an equal draw trains as the trainer itself does
    size: tuple[int, ...] = (4, 8, 8)
    min_timestep: float | None = None


V = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
TRAINERS = {
    "train_unconditional": Trainer(train_unconditional, lambda: tiny_unet(3), DDPMScheduler(), "none", (3, 8, 8)),
    "train_unconditional, sample": Trainer(
        train_unconditional, lambda: tiny_unet(3), DDPMScheduler(prediction_type="sample"), "none", (3, 8, 8)
    ),
    "train_text_to_image, epsilon": Trainer(train_text_to_image, unet_with_text, DDPMScheduler(), "none"),
    "train_text_to_image, v": Trainer(train_text_to_image, unet_with_text, DDPMScheduler(**V), "v"),
    "train_dreambooth_lora_sd3": Trainer(train_dreambooth_lora_sd3, sd3, FLOW, "flow"),
    "train_dreambooth_lora_flux": Trainer(train_dreambooth_lora_flux, flux, FLOW, "flow"),
    "Wan": Trainer(train_wan, wan, FLOW, "flow", (4, 3, 8, 8)),
    "sd-scripts, epsilon": Trainer(sd_scripts_train_network, unet_with_text, DDPMScheduler(), "none"),
    "sd-scripts, v": Trainer(sd_scripts_train_network, unet_with_text, DDPMScheduler(**V), "v"),
    "sd-scripts, SD3": Trainer(sd_scripts_sd3_train_network, sd3, FLOW, "flow"),
    "musubi-tuner": Trainer(musubi_tuner, wan, PLAIN_FLOW, "flow", (4, 3, 8, 8), min_timestep=875),
    "OneTrainer": Trainer(onetrainer, flux, PLAIN_FLOW, "flow"),
    "SimpleTuner": Trainer(simpletuner, flux, PLAIN_FLOW, "flow"),
}
every_trainer = pytest.mark.parametrize("name", TRAINERS)


def update(trainer, network, sampler):
    """One update of the network, from several batches. [(loss, the trainer's own)] of these."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for part in range(ACCUMULATION_STEPS):
        batch = latents(BATCH_SIZE, *trainer.size, seed=part + 1)
        loss, own = trainer.step(network, trainer.noise_scheduler, sampler, batch)
        (loss / ACCUMULATION_STEPS).backward()
        losses.append((loss.detach(), own.detach()))
    optimizer.step()
    return losses


def make(trainer, method="adaptive", **options):
    images = latents(16, *trainer.size)
    options = {"images": images, "gradient_accumulation_steps": ACCUMULATION_STEPS, **options}
    options["min_timestep"] = trainer.min_timestep
    return make_timestep_sampler(trainer.noise_scheduler, method, **options)


def moved(before, network):
    return [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]


@every_trainer
def test_an_update_by_the_adaptive_draw(name):
    trainer = TRAINERS[name]
    network, sampler = trainer.make_network(), make(trainer)
    before = [p.detach().clone() for p in network.parameters()]
    for loss, _ in update(trainer, network, sampler):
        assert loss.isfinite()
        assert loss > 0
    assert sum(moved(before, network)) > len(before) / 2
    assert all(p.isfinite().all() for p in network.parameters())
    losses, draws = sampler.sums.sum(1)
    assert float(draws) == BATCH_SIZE * ACCUMULATION_STEPS  # it has learned from all
    assert float(losses) > 0


@every_trainer
def test_an_equal_draw_trains_as_the_trainer_does(name):
    """The draw that the lines replace, but for its order: nothing of the trainer's loss is lost, and none is added."""
    trainer = TRAINERS[name]
    network, sampler = trainer.make_network(), make(trainer, "ddpm", loss_weighting=trainer.plain_weighting)
    for loss, own in update(trainer, network, sampler):
        own = own * sampler.weights[0] if name == "train_unconditional, sample" else own  # on the scale of all methods
        torch.testing.assert_close(loss, own, rtol=1e-4, atol=0)


@every_trainer
def test_a_restored_sampler_goes_on_with_the_same_draws(name):
    trainer = TRAINERS[name]
    sampler, network = make(trainer), trainer.make_network()
    update(trainer, network, sampler)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    restored = make(trainer, seed=1)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        for ours, theirs in zip(sampler.sample(BATCH_SIZE), restored.sample(BATCH_SIZE), strict=True):
            assert torch.equal(ours, theirs)


def draws_of_diffusers(scheme, **options):
    """[N] sigma, as the scripts for SD3 and Flux draw it from a table with the shift 3."""
    u = compute_density_for_timestep_sampling(scheme, 200_000, **options)
    return FLOW.sigmas[(u * T).long()]


def shifted(sigmas, shift):
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@pytest.mark.parametrize(
    ("noise_scheduler", "weighting", "options", "draw"),
    [
        (FLOW, "flow", {}, lambda: draws_of_diffusers("none")),
        (
            FLOW,
            "logit_normal",
            {"m": math.log(3) - 0.4, "s": 0.8},
            lambda: draws_of_diffusers("logit_normal", logit_mean=0.4, logit_std=0.8),
        ),
        (PLAIN_FLOW, "flow", {}, lambda: torch.rand(200_000)),
        (PLAIN_FLOW, "logit_normal", {"s": 1.3}, lambda: (1.3 * torch.randn(200_000)).sigmoid()),
        (
            PLAIN_FLOW,
            "logit_normal",
            {"m": math.log(5), "s": 1.3},
            lambda: shifted((1.3 * torch.randn(200_000)).sigmoid(), 5),
        ),
    ],
)
def test_the_objective_is_that_of_the_draws_that_it_replaces(noise_scheduler, weighting, options, draw):
    """The share that each noise level has in the loss of the velocity, by twenty bins: the table of the page."""
    torch.manual_seed(0)
    parts = {"loss_weighting": weighting, "loss_weighting_options": options, "error_filter": "none"}
    sampler = make_timestep_sampler(noise_scheduler, "adaptive", **parts)
    if not isinstance(noise_scheduler, NoiseSchedule):
        noise_scheduler = NoiseSchedule.from_scheduler(noise_scheduler)
    share = sampler.probabilities * sampler.weights * epsilon_loss_scale(noise_scheduler, "flow").float()
    sigmas = noise_scheduler.sigma / (1 + noise_scheduler.sigma)
    ours = torch.histogram(sigmas.float(), 20, range=(0.0, 1.0), weight=share).hist
    theirs = torch.histogram(draw(), 20, range=(0.0, 1.0)).hist / 200_000
    assert (ours - theirs).abs().sum() < 0.03


@pytest.mark.parametrize("name", ["train_dreambooth_lora_sd3", "train_dreambooth_lora_flux"])
def test_the_scripts_sigmas_are_those_of_the_indices_and_noise_is_opposite(name):
    trainer = TRAINERS[name]
    sampler, noise = make(trainer), []
    for part in range(ACCUMULATION_STEPS):
        model_input = latents(BATCH_SIZE, *trainer.size, seed=part)
        noise.append(sampler.noise(model_input))
        indices, timesteps, sigmas = draw_as_diffusers(trainer.noise_scheduler, sampler, model_input)
        torch.testing.assert_close(sigmas.flatten(), FLOW.sigmas[indices])
        torch.testing.assert_close(timesteps, 1000 * sigmas.flatten())
    assert torch.equal(noise[0], -noise[1])


def test_the_noise_levels_of_a_plain_flow_are_those_that_the_loops_use():
    """OneTrainer's table at T - 1 - index, and SimpleTuner's formula: the sampler has the same at that index."""
    indices = torch.arange(1, T)  # at the first, nothing is left of the image
    of_sampler = PLAIN_FLOW.sigma.flip(0)[indices]
    of_sampler = (of_sampler / (1 + of_sampler)).float()
    torch.testing.assert_close(of_sampler, ALL_SIGMAS[T - 1 - indices])
    torch.testing.assert_close(of_sampler, (T - indices) / T)
