"""Images per second of our training step and sampling, against those of diffusers' example script and pipeline.

    python benchmarks/throughput.py --config configs/cifar10_small.yaml --mixed_precision bf16 --compile \\
        --output_json throughput.json

Both train the same network on the same images with the same batch and precision, in one process, taking turns after a
warm-up of each: ours is `TrainingStep`, as train_adaptive_ddpm.py calls it; theirs is the body of the loop of
diffusers' examples/unconditional_image_generation/train_unconditional.py at its default flags, with its data
pipeline. All options are those of the training script. It prints, too, what each timestep sampler costs a step, and
how much of the device's rate of matrix multiplication the network's arithmetic reaches.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from sampling import summary, time_interleaved
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from generate import DTYPES
from image_data import open_images, training_batches
from pipelines import UnconditionalPipeline, to_pil
from recipes import one_line_errors, parse_options
from samplers import METHODS, make_timestep_sampler
from train_adaptive_ddpm import TrainingOptions
from training.ema import WeightAverage
from training.metrics import LossMeter, device_name, library_versions
from training.models import build_noise_scheduler, build_unet, choose_kernels, method_parts, warm_up
from training.saving import write_json
from training.step import TrainingStep
from training.stopping import NonFiniteGuard


@dataclass
class ThroughputOptions(TrainingOptions):
    """Those of training, and:"""

    output_json: str | None = HfArg(default=None, help="Where the measurements go.")
    repeats: int = HfArg(default=7, help="Timed rounds, after one untimed.")
    steps_per_repeat: int = HfArg(default=10, help="Training steps a round.")
    sampling_batch_size: int = HfArg(default=64, help="Images of a sampling round.")
    sampling_steps: int = HfArg(default=20, help="Denoising steps of a sampling round.")
    data_images: int = HfArg(default=4096, help="Of the data set, that both train on.")


def main(options):
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options.mixed_precision)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    with one_line_errors(ValueError, OSError):
        dataset = open_images(options.dataset_name, resolution=options.resolution, cache_dir=options.cache_dir)
    options.resolution = dataset.resolution
    images = torch.stack([dataset[i] for i in range(min(len(dataset), options.data_images))])

    ours, sampling_unet = our_step(accelerator, dataset, options)
    theirs = diffusers_step(accelerator, images, options)
    rounds = {"ours": lambda: repeat(ours, options), "diffusers": lambda: repeat(theirs, options)}
    images_a_round = options.train_batch_size * options.steps_per_repeat
    training = compare(rounds, images_a_round, options.repeats, accelerator.device)
    step_seconds = options.train_batch_size / training["ours"]["median"]
    image_shape = images.shape[1:]

    results = {
        "training_images_per_second": training,
        "sampling_images_per_second": compare_sampling(sampling_unet, accelerator, options),
        "arithmetic": arithmetic(accelerator, images, options, training["ours"]["median"]),
        "sampler_milliseconds": {
            method: sampler_cost(method, image_shape, accelerator.device, options.train_batch_size, options.repeats)
            for method in METHODS
        },
        "adaptive_milliseconds": {
            f"T={T}, batch {batch}": sampler_cost(
                "adaptive", image_shape, accelerator.device, batch, options.repeats, T
            )
            for T in (1000, 4000)
            for batch in (options.train_batch_size, 8 * options.train_batch_size)
        },
        "step_milliseconds": 1000 * step_seconds,
        "threads": torch.get_num_threads(),
        "device": device_name(accelerator.device),
        "versions": library_versions(),
        "command": " ".join(["python", *sys.argv]),
    }
    print_table(results)
    if options.output_json:
        write_json(results, Path(options.output_json))


def repeat(step, options):
    for _ in range(options.steps_per_repeat):
        step()


def compare(rounds, images_a_round, repeats, device):
    """Images per second of each, their ratio in rounds that stood beside each other, and on a GPU the peak memory."""
    memory = {}
    if device.type == "cuda":
        for name, run in rounds.items():
            run()
            torch.cuda.reset_peak_memory_stats()
            run()
            memory[name] = round(torch.cuda.max_memory_allocated() / 2**20)
    seconds = time_interleaved(rounds, repeats)
    rates = {name: summary([images_a_round / s for s in times]) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    return rates | {"ours_over_diffusers": summary(ratios)} | ({"peak_memory_mib": memory} if memory else {})


# Training


def our_step(accelerator, dataset, options):
    """A function that makes one step as train_adaptive_ddpm.py does; and the network."""
    device = accelerator.device
    torch.manual_seed(options.seed)
    unet = build_unet(options, dataset.channels, dataset.resolution).to(device)
    noise_scheduler = build_noise_scheduler(options)
    parts = method_parts(options)
    sampler = make_timestep_sampler(
        noise_scheduler, options.method, **parts, images=dataset.sample(), seed=options.seed, device=device
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate, fused=True)
    lr_scheduler = get_scheduler(options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps)
    choose_kernels(unet, device, accelerator.mixed_precision, options.compile)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema = WeightAverage(unet.parameters(), use_ema_warmup=True, power=options.ema_power, foreach=True)
    meter = LossMeter(noise_scheduler.config.num_train_timesteps, device)
    guard = NonFiniteGuard(optimizer.optimizer, device, False, options.max_nonfinite_steps)
    batches = training_batches(
        dataset, options.train_batch_size, seed=options.seed, rank=0, world_size=1, device=device, placement="auto"
    )
    flags = {name: getattr(options, name) for name in ("seed", "random_flip", "max_grad_norm")}
    update = TrainingStep(
        accelerator, unet, noise_scheduler, sampler, optimizer, lr_scheduler, ema, guard, meter, **flags
    )
    image_shape = (dataset.channels, dataset.resolution, dataset.resolution)
    warm_up(accelerator, unet, sampler, image_shape, options.train_batch_size)
    numbers = iter(range(10**9))
    unet.train()
    return lambda: update(next(numbers), next(batches)), accelerator.unwrap_model(unet)


def diffusers_step(accelerator, images, options):
    """A function that makes one step as diffusers' script does, from its data loader to its log."""
    torch.manual_seed(options.seed)
    device, channels = accelerator.device, images.shape[1]
    model = build_unet(options, channels, options.resolution)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noise_scheduler = build_noise_scheduler(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    augmentations = transforms.Compose(
        [
            transforms.Resize(options.resolution, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomCrop(options.resolution),
            transforms.RandomHorizontalFlip() if options.random_flip else transforms.Lambda(lambda x: x),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    mode = "L" if channels == 1 else "RGB"
    dataset = datasets.Dataset.from_dict(
        {"image": [to_pil(image) for image in images]}, features=datasets.Features({"image": datasets.Image()})
    )
    dataset.set_transform(
        lambda examples: {"input": [augmentations(image.convert(mode)) for image in examples["image"]]}
    )
    loader = torch.utils.data.DataLoader(dataset, options.train_batch_size, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler(options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    ema.to(device)
    weight_dtype = DTYPES[accelerator.mixed_precision] or torch.float32
    model.train()
    batches = endless(loader)
    progress_bar = tqdm(disable=None, leave=False)

    def step():
        clean_images = next(batches)["input"].to(weight_dtype)
        noise = torch.randn(clean_images.shape, dtype=weight_dtype, device=clean_images.device)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(noise),), device=noise.device)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample
            loss = F.mse_loss(model_output.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        progress_bar.update(1)
        progress_bar.set_postfix(loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])

    return step


def endless(loader):
    while True:
        yield from loader


# Sampling


def compare_sampling(unet, accelerator, options):
    """`UnconditionalPipeline.sample` against `DDPMPipeline.__call__`, of the same weights in the same precision; ours
    with the kernels that `choose_kernels` gave the network, theirs without."""
    plain_unet = build_unet(options, unet.config.in_channels, options.resolution).to(accelerator.device)
    plain_unet.load_state_dict(unet.state_dict())
    stock = DDPMPipeline(plain_unet.eval(), build_noise_scheduler(options))
    ours = UnconditionalPipeline(unet, build_noise_scheduler(options))
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    batch, steps = options.sampling_batch_size, options.sampling_steps

    def in_precision(call):
        with accelerator.autocast():
            return call()

    rounds = {
        "ours": lambda: in_precision(lambda: ours.sample(range(batch), num_inference_steps=steps)),
        "diffusers": lambda: in_precision(lambda: stock(batch, num_inference_steps=steps, output_type="pt")),
    }
    return compare(rounds, batch, options.repeats, accelerator.device)


# What a step is made of


def arithmetic(accelerator, images, options, images_per_second):
    """FLOPs of a training step's network, forward and backward, and the fraction of a large matrix product's rate."""
    device = accelerator.device
    unet = build_unet(options, images.shape[1], options.resolution).to(device)
    batch = torch.randn(1, *images.shape[1:], device=device)
    with FlopCounterMode(display=False) as counter:
        unet(batch, 0, return_dict=False)[0].sum().backward()
    flops = counter.get_total_flops()
    dtype = DTYPES[accelerator.mixed_precision] or torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    (seconds,) = time_interleaved({"product": lambda: a @ b}, 9).values()
    peak = 2 * size**3 / min(seconds)
    return {
        "gflop_per_image": flops / 1e9,
        "matrix_product_tflop_per_second": peak / 1e12,
        "fraction": flops * images_per_second / peak,
    }


def sampler_cost(method, image_shape, device, batch_size, repeats, num_train_timesteps=1000):
    """Milliseconds a step of drawing, of the loss and its gradient at the network's output, and of learning; for Kim et
    al., without measuring the model. What `ddpm` takes is what any method does."""
    noise_scheduler = build_noise_scheduler(TrainingOptions(ddpm_num_steps=num_train_timesteps))
    images = torch.rand(batch_size, *image_shape, device=device)
    sampler = make_timestep_sampler(noise_scheduler, method, images=images, device=device)
    errors = torch.randn(images.shape, device=device, requires_grad=True)

    def forty_steps():
        for _ in range(40):
            timesteps, weights = sampler.sample(batch_size, images=images)
            losses = sampler.losses(errors, timesteps)
            (weights * losses).mean().backward()
            sampler.update(timesteps, losses.detach())

    (seconds,) = time_interleaved({method: forty_steps}, repeats).values()
    return round(1000 * summary(seconds)["median"] / 40, 4)


def print_table(results):
    print(f"{results['device']}, {results['threads']} threads")
    print(f"{'':34}{'median':>10}{'min':>10}{'max':>10}")
    for kind in ("training", "sampling"):
        for name, row in results[f"{kind}_images_per_second"].items():
            if name != "peak_memory_mib":
                print(f"{kind + ' ' + name:34}" + "".join(f"{row[key]:10.2f}" for key in ("median", "min", "max")))
            else:
                print(f"{kind} {json.dumps(row)} MiB at most")
    print(
        "{gflop_per_image:.3f} GFLOP an image, {fraction:.1%} of a matrix product's rate".format(
            **results["arithmetic"]
        )
    )
    for name, cost in {**results["sampler_milliseconds"], **results["adaptive_milliseconds"]}.items():
        print(f"{name:34}{cost:10.3f} ms, {cost / results['step_milliseconds']:.2%} of a step")


if __name__ == "__main__":
    begun = time.perf_counter()
    main(parse_options(ThroughputOptions))
    print(f"{time.perf_counter() - begun:.0f} s in all")
