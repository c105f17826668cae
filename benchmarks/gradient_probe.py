"""How noisy a gradient step is at each timestep, and which density of timesteps would make it least noisy.

    python benchmarks/gradient_probe.py --pipeline runs/cifar10_small --dataset_name uoft-cs/cifar10 \\
        --output_json probe.json

At the centre of each of K bins of timesteps, the gradient of single examples' losses: their second moment
G_t = E|grad l_t|^2, in Adam's metric (each coordinate divided by the root of its mean square over all timesteps, which
is what Adam's second moment becomes when gradients are mostly noise) and plainly; against sqrt(s_t E[l_t]), its free
proxy, with s_t the `epsilon_loss_scale` of what the network predicts. From these, for each objective c, the variance of
the gradient estimate, sum_t c_t^2 G_t / p_t, of each density over that of the best one, p_t ∝ c_t sqrt(G_t). Further,
the cosine of the gradients of two examples whose images and noises are related in one of several ways (`PARTNERS`):
where it is below that of unrelated ones, a pair is less noisy than two examples.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDPMPipeline
from tqdm.auto import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from images import normalize, open_images
from recipes import one_line_errors
from samplers import ERROR_FILTERS, NoiseSchedule, Spectrum, checked_weights, epsilon_loss_scale, fold_seed
from training.denoiser import Denoiser
from training.machine import device_name, this_command
from training.saving import write_json

OBJECTIVES = ("none", "min_snr", "p2", "bell", "spectral", "scaled_logit_normal")
PARTNERS = ("-eps, same image", "-eps", "-mean(eps)", "eps", "unrelated")  # noise of the second; another image


@dataclass
class ProbeOptions:
    """Options of benchmarks/gradient_probe.py."""

    pipeline: str = field(metadata={"help": "A trained DDPMPipeline: folder or Hub id."})
    output_json: str = field(metadata={"help": "New file of the measurements."})
    dataset_name: str = field(default="digits", metadata={"help": "As in training."})
    num_bins: int = field(default=20, metadata={"help": "K, bins of timesteps."})
    examples: int = field(default=24, metadata={"help": "Images a bin."})
    error_filter: Literal[tuple(ERROR_FILTERS)] = field(default="none", metadata={"help": "As in training."})
    seed: int = 0
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")


def main(options):
    with one_line_errors(ValueError):
        check_new_record(options.output_json)
    pipeline = DDPMPipeline.from_pretrained(options.pipeline).to(options.device)
    unet, schedule = pipeline.unet, NoiseSchedule.from_scheduler(pipeline.scheduler)
    dataset = open_images(options.dataset_name, resolution=unet.config.sample_size)
    T = schedule.num_train_timesteps
    timesteps = [(2 * i + 1) * T // (2 * options.num_bins) for i in range(options.num_bins)]
    spectrum = Spectrum.of(dataset.sample())
    objectives = {name: checked_weights(name, schedule, spectrum) for name in OBJECTIVES}
    loss_of = ERROR_FILTERS[options.error_filter](schedule, spectrum, device=options.device)
    bins = [partial(example_gradients, pipeline, loss_of, dataset, t, options) for t in timesteps]

    mean_square = sum(measure()[1].square().flatten(0, 1).mean(0) for measure in tqdm(bins, unit="bin")) / len(bins)
    metrics = {"adam": mean_square.sqrt() + 1e-8, "plain": torch.ones_like(mean_square)}
    losses, moments = [], {name: [] for name in metrics}
    for measure in tqdm(bins, unit="bin"):  # a second time, as all the gradients may not fit into memory
        loss, gradients = measure()
        losses.append(loss)
        for name, metric in metrics.items():
            moments[name].append(moments_of(gradients / metric))
    losses = torch.stack(losses)
    scale = epsilon_loss_scale(schedule, pipeline.scheduler.config.prediction_type)

    results = {"timesteps": timesteps, "loss": losses.mean(1).tolist(), "metrics": {}}
    for name in metrics:
        table = {key: [bin[key] for bin in moments[name]] for key in moments[name][0]}
        G = torch.tensor(table["second_moment"])
        table["relative_variance"] = relative_variances(G, losses.cpu(), objectives, timesteps, scale)
        results["metrics"][name] = table
    results |= {"pipeline": options.pipeline, "error_filter": options.error_filter, "examples": options.examples}
    results["device"] = device_name(torch.device(options.device))
    results |= {"seed": options.seed, "command": this_command()}
    write_json(results, Path(options.output_json))
    print_table(results)


def example_gradients(pipeline, loss_of, dataset, t, options):
    """Losses [N] and gradients [N, 1 + len(PARTNERS), P] at timestep t, of N examples and the partners of each."""
    unet, scheduler, device = pipeline.unet.eval(), pipeline.scheduler, options.device
    denoiser, timestep = Denoiser(unet, scheduler, device), torch.tensor([t], device=device)
    generator = torch.Generator().manual_seed(fold_seed(options.seed, t))
    parameters = list(unet.parameters())
    losses, gradients = [], []
    for pair in torch.randint(len(dataset), (options.examples, 2), generator=generator).tolist():
        image, other_image = (normalize(dataset[i][None].to(device)) for i in pair)
        noise, other_noise = torch.randn(2, *image.shape, generator=generator).to(device)
        mean, other_mean = (eps.mean((2, 3), keepdim=True) for eps in (noise, other_noise))
        partners = (-noise, -noise, other_noise - other_mean - mean, noise, other_noise)
        images = (image, image, *(len(PARTNERS) - 1) * [other_image])
        for x, eps in zip(images, (noise, *partners), strict=True):
            loss = loss_of(denoiser.epsilon_errors(x, eps, timestep), timestep)[0]
            losses.append(loss.detach())
            gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
    shape = (options.examples, 1 + len(PARTNERS), -1)
    return torch.stack(losses).view(shape[:2])[:, 0], torch.stack(gradients).view(shape)


def moments_of(gradients):
    """Means over the N examples of gradients [N, 1 + len(PARTNERS), P] in some metric."""
    first = gradients[:, 0]
    n = len(first)
    second_moment = first.square().sum(-1).mean()  # G_t
    products = (first[:, None] * gradients[:, 1:]).sum(-1).mean(0)
    norms = gradients[:, 1:].square().sum(-1).mean(0).sqrt() * second_moment.sqrt()
    return {
        "second_moment": second_moment.item(),
        # |E[g]|^2 without the bias of noise: the mean product of two different examples' gradients
        "mean_square": ((first.sum(0).square().sum() - n * second_moment) / (n * (n - 1))).item(),
        **{f"cosine of {name}": value for name, value in zip(PARTNERS, (products / norms).tolist(), strict=True)},
    }


def relative_variances(second_moment, losses, objectives, timesteps, scale):
    """{objective: {density: variance of the gradient over the least}}; losses: [K, N]; objectives: {name: [T]}; scale:
    [T] of `epsilon_loss_scale`."""
    expected_loss, second_loss = losses.mean(1), losses.square().mean(1)
    scale = scale[timesteps]
    result = {}
    for name, c in objectives.items():
        c = c[timesteps]
        densities = {"uniform": torch.ones_like(c), "root_mean_loss": c * (scale * expected_loss).sqrt()}
        densities["root_mean_square_loss"] = c * second_loss.sqrt()
        least = (c * second_moment.sqrt()).sum().square()
        variances = {density: (c.square() * second_moment / p).sum() * p.sum() for density, p in densities.items()}
        result[name] = {density: (variance / least).item() for density, variance in variances.items()}
    return result


def print_table(results):
    adam = results["metrics"]["adam"]
    print("   t   sqrt(L)  sqrt(G)  |E g|^2/G   cosine of: " + ", ".join(PARTNERS))
    columns = ("second_moment", "mean_square", *(f"cosine of {name}" for name in PARTNERS))
    for t, loss, G, mean_square, *cosines in zip(
        results["timesteps"], results["loss"], *(adam[name] for name in columns), strict=True
    ):
        print(f"{t:4d}  {loss**0.5:8.4f} {G**0.5:8.2f}  {mean_square / G:9.4f}", *(f"{c:9.3f}" for c in cosines))
    print("variance over that of the best density, in Adam's metric:")
    for objective, ratios in adam["relative_variance"].items():
        print(f"  {objective:14}", *(f"{density} {ratio:.2f} " for density, ratio in ratios.items()))


if __name__ == "__main__":
    main(HfArgumentParser(ProbeOptions).parse_args_into_dataclasses()[0])
