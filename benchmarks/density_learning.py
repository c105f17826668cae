"""How fast the density of `adaptive` is learned, in draws, by the sampler's smoothing of the losses and by others.

    python benchmarks/density_learning.py --losses runs/density_learning/digits.pt --output_json learning.json \\
        -- --config configs/digits.yaml

Two small networks, of the recipe after `--`, are trained for a minute: one of epsilon by DDPM's schedule, one of the
velocity of a flow. Of each, losses are measured at every timestep, and kept in the file `--losses`. Then samplers draw
timesteps, in batches of 1 and of 4, and are told losses drawn from these; the network stays as it is. What is recorded
is the variance of the gradient, sum_t c_t^2 s_t E[l_t] / p_t, over the least that a density can have,
(sum_t c_t sqrt(s_t E[l_t]))^2, less 1: after so many draws, mean and maximum over the seeds. Beside it that of the
uniform density, and of the density that the true E[l_t] gives, with its tenth of uniform draws.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from images import open_images
from recipes import one_line_errors
from samplers import NoiseSchedule, epsilon_loss_scale, make_timestep_sampler
from samplers.adaptive import mean_losses, sums_of_nearest
from train_adaptive_ddpm import command_line
from training.machine import device_name, this_command
from training.network import build_network
from training.saving import write_json

SCHEDULERS = {"epsilon": DDPMScheduler, "flow": FlowMatchEulerDiscreteScheduler}  # by what the network predicts
OWN = "scaled_logit_normal"  # of `adaptive`, behind its filter
OBJECTIVES = {"epsilon": ("none", OWN), "flow": ("flow", OWN)}
BATCH_SIZES = (1, 4)
SMALL_UNTIL = 400  # draws after which batches are of 100, to save time; so densities are renewed 2,000 draws apart


@dataclass
class LearningOptions:
    """Options of benchmarks/density_learning.py; the training script's follow after `--`."""

    output_json: str = field(metadata={"help": "New file of the measurements."})
    losses: str = field(metadata={"help": "Where the networks' losses are, or go if they are not there yet."})
    train_updates: int = 400
    train_batch_size: int = 32
    losses_per_timestep: int = 16
    draws: list[int] = field(
        default_factory=lambda: [50, 100, 200, 400, 1000, 2000, 5000, 10000], metadata={"help": "When to look."}
    )
    seeds: int = 2


def gaussian(sums, width):
    """[2, T] of sums [2, T]: over neighbouring timesteps by a Gaussian, `width` of a number of draws in timesteps."""
    std = width(float(sums[1].sum()))
    t = torch.arange(-min(int(3 * std), 999), min(int(3 * std), 999) + 1)
    kernel = torch.exp(-0.5 * (t / std) ** 2)
    return torch.nn.functional.conv1d(sums[:, None], kernel[None, None], padding=len(t) // 2)[:, 0]


SMOOTHINGS = {  # how, and how many times over: see `mean_losses`
    "each timestep by itself": (lambda sums: sums, 1),
    "Gaussian, 5 timesteps": (partial(gaussian, width=lambda draws: 5.0), 1),
    "Gaussian, 10 draws": (partial(gaussian, width=lambda draws: max(5.0, 1e4 / max(draws, 40.0))), 1),
    "nearest 20 draws, twice": (partial(sums_of_nearest, least=10.0), 2),
    "nearest 40 draws": (sums_of_nearest, 1),
    "nearest 40 draws, twice": (sums_of_nearest, 2),  # the sampler's
    "nearest 80 draws, twice": (partial(sums_of_nearest, least=40.0), 2),
}


def main(argv):
    split = argv.index("--") if "--" in argv else len(argv)
    (options,) = HfArgumentParser(LearningOptions).parse_args_into_dataclasses(argv[:split])
    flags = argv[split + 1 :]
    with one_line_errors(ValueError):
        check_new_record(options.output_json)
    torch.set_num_threads(1)
    recipe = command_line(flags)
    images = open_images(recipe.dataset_name, resolution=recipe.resolution).sample(5000)
    if not Path(options.losses).exists():
        measured = {predicted: measure(predicted, recipe, images, options) for predicted in SCHEDULERS}
        Path(options.losses).parent.mkdir(parents=True, exist_ok=True)
        torch.save(measured, options.losses)
    tables = torch.load(options.losses)
    cases = [(predicted, objective) for predicted in SCHEDULERS for objective in OBJECTIVES[predicted]]
    results = {
        f"{predicted}, {objective}": learning(predicted, objective, images, tables[predicted][objective], options)
        for predicted, objective in tqdm(cases, unit="case")
    }
    record = {"excess_variance": results, "options": asdict(options), "flags": flags}
    record |= {"device": device_name(torch.device("cpu")), "torch": torch.__version__}
    write_json(record | {"command": this_command()}, Path(options.output_json))
    print_tables(results, options.draws)


def measure(predicted, recipe, images, options):
    """Train a network, and {objective: [T, N] losses of it}, in the order of the noise scheduler's tables."""
    torch.manual_seed(0)
    network = build_network(recipe, images.shape[1], images.shape[-1])
    scheduler = SCHEDULERS[predicted]()
    T = scheduler.config.num_train_timesteps
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(options.train_updates), desc=predicted, unit="update"):
        timesteps = torch.randint(T, (options.train_batch_size,), generator=generator)
        errors(network, scheduler, images, timesteps, generator).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
    samplers = {objective: sampler_of(predicted, objective, images) for objective in OBJECTIVES[predicted]}
    losses = {objective: [] for objective in samplers}
    with torch.no_grad():
        for timesteps in tqdm(torch.arange(T).repeat(options.losses_per_timestep).split(250), unit="batch"):
            error = errors(network, scheduler, images, timesteps, generator)
            for objective, sampler in samplers.items():
                losses[objective].append(sampler.losses(error, timesteps))
    return {objective: torch.cat(rows).view(-1, T).T for objective, rows in losses.items()}


def errors(network, scheduler, images, timesteps, generator):
    """Of the network, in what it predicts, for random images and noise at these timesteps."""
    clean = images[torch.randint(len(images), timesteps.shape, generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    if isinstance(scheduler, DDPMScheduler):
        return network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample - noise
    s = scheduler.sigmas[timesteps].view(-1, 1, 1, 1)
    return network((1 - s) * clean + s * noise, scheduler.timesteps[timesteps]).sample - (noise - clean)


def sampler_of(predicted, objective, images):
    parts = {"loss_weighting": objective, "error_filter": "wiener_ode" if objective == OWN else "none"}
    return make_timestep_sampler(SCHEDULERS[predicted](), "adaptive", images=images[:512], **parts)


def learning(predicted, objective, images, losses, options):
    """Excess variances of an objective: {density: it}, and {"batches of B": {smoothing: {draws: [mean, maximum]}}}."""
    schedule = NoiseSchedule.from_scheduler(SCHEDULERS[predicted]())
    T = schedule.num_train_timesteps
    known = losses.mean(1)[schedule.to_scheduler(torch.arange(T))]
    sampler = sampler_of(predicted, objective, images)
    fresh = sampler.state_dict()
    steepness = (sampler.loss_weights.double() ** 2 * epsilon_loss_scale(schedule, predicted) * known).sqrt()

    def excess(density):
        return float((steepness**2 / density).sum() / steepness.sum() ** 2 - 1)

    f = sampler.uniform_fraction
    result = {"uniform": excess(torch.full((T,), 1 / T))}
    result["known"] = excess((1 - f) * steepness / steepness.sum() + f / T)
    for batch_size in BATCH_SIZES:
        result[f"batches of {batch_size}"] = table = {}
        for name, smoothing in SMOOTHINGS.items():
            seeds = []
            for seed in range(options.seeds):
                sampler.load_state_dict(fresh | {"seed": seed})
                seeds.append(learn(sampler, smoothing, losses, batch_size, options.draws))
            at = [[excess(density) for density in densities] for densities in zip(*seeds, strict=True)]
            table[name] = {n: [sum(row) / len(row), max(row)] for n, row in zip(options.draws, at, strict=True)}
    return result


def learn(sampler, smoothing, losses, batch_size, draws):
    """Let a sampler draw, and tell it losses: its density [T] after each number of draws."""
    smooth, times = smoothing

    scale = sampler._epsilon_loss_scale.clamp(max=1.0)
    sampler.expected_loss = lambda: mean_losses(scale, sampler.sums, smooth, times)
    generator = torch.Generator().manual_seed(sampler.seed)
    densities, drawn = [], 0
    for n in draws:
        while drawn < n:
            timesteps = sampler.sample(batch_size if drawn < SMALL_UNTIL else 100).timesteps
            chosen = torch.randint(losses.shape[1], timesteps.shape, generator=generator)
            sampler.update(timesteps, losses[timesteps, chosen])
            drawn += len(timesteps)
        densities.append(sampler.probabilities.double())
    return densities


def print_tables(results, draws):
    for case, result in results.items():
        print(f"{case}: uniform {result['uniform']:.3f}, known {result['known']:.3f}")
        for batch_size in BATCH_SIZES:
            print(f"  {f'batches of {batch_size}, draws':36}", *(f"{n:7d}" for n in draws))
            for name, row in result[f"batches of {batch_size}"].items():
                print(f"  {name:36}", *(f"{row[n][0]:7.3f}" for n in draws))


if __name__ == "__main__":
    main(sys.argv[1:])
