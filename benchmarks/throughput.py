"""Images per second of our training step and sampling, against those of diffusers' example script and pipeline.

    python benchmarks/throughput.py --config configs/cifar10_small.yaml --mixed_precision bf16 --compile \\
        --output_json throughput.json

Both train the same network on the same images with the same batch and precision, each in a process of its own (what
`keep_freed_memory` changes, it changes for a whole process), taking turns after a warm-up of each: ours is
`train_step`, as train_adaptive_ddpm.py calls it; theirs is the body of the loop of diffusers'
examples/unconditional_image_generation/train_unconditional.py at its default flags, with its data pipeline. That script
does not compile: `--compile` is for ours alone. All options are those of the training script. It prints, too, what each
timestep sampler costs a step, how much of the device's rate of matrix multiplication the network's arithmetic reaches,
and the convolutions' share of a step.
"""

import json
import multiprocessing
import re
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from timing import TimingOptions, interleaved, seconds_of, summary, time_interleaved
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from generation.options import DTYPES
from images import open_images
from pipelines import choose_kernels, sample_images, to_pil
from recipes import one_line_errors, parse_options
from samplers import METHODS, make_timestep_sampler
from train_adaptive_ddpm import train_step
from training.clock import PhaseClock
from training.data import open_batches
from training.denoiser import Denoiser
from training.machine import device_name, library_versions, this_command
from training.methods import build_sampler
from training.network import build_network
from training.noise_schedule import build_noise_scheduler
from training.options import TrainingOptions
from training.saving import write_json
from training.state import build_state
from training.step_random import StepRandom
from training.warm_up import warm_up


@dataclass
class SamplingRoundOptions:
    """What is measured beside training steps."""

    _argument_group_name = "Sampling and data"

    sampling_batch_size: int = HfArg(default=64, help="Images of a sampling round.")
    sampling_steps: int = HfArg(default=20, help="Denoising steps of a sampling round.")
    data_images: int = HfArg(default=4096, help="Of the data set, that diffusers' script is given.")


@dataclass
class ThroughputOptions(TrainingOptions, TimingOptions, SamplingRoundOptions):
    """Those of training, and those of the measurement."""


def main(options):
    with one_line_errors(ValueError, OSError):
        check_new_record(options.output_json)
        dataset = open_images(options.dataset_name, resolution=options.resolution, cache_dir=options.cache_dir)
    if min(len(dataset), options.data_images) < options.train_batch_size:
        raise SystemExit(
            f"--data_images {options.data_images}, of {len(dataset)}: must be at least --train_batch_size "
            f"({options.train_batch_size})"
        )
    if options.gradient_accumulation_steps != 1:
        raise SystemExit(f"--gradient_accumulation_steps {options.gradient_accumulation_steps}: must be 1 here")
    options.resolution = dataset.resolution

    with ExitStack() as stack:
        contestants = {name: stack.enter_context(Contestant(name, options)) for name in CONTESTANTS}
        images_a_round = options.train_batch_size * options.steps_per_repeat
        training = compare(contestants, "training", images_a_round, options.repeats)
        memory = {name: contestant.ask("memory") for name, contestant in contestants.items()}
        sampling = compare(contestants, "sampling", options.sampling_batch_size, options.repeats)
        convolutions = contestants["ours"].ask("convolutions")

    accelerator = make_accelerator(options)
    device, image_shape = accelerator.device, dataset[0].shape
    cost = partial(sampler_cost, image_shape=image_shape, device=device, repeats=options.repeats)
    batch_size = options.train_batch_size
    results = {
        "training_images_per_second": training,
        "peak_memory_mib": memory,
        "sampling_images_per_second": sampling,
        "arithmetic": arithmetic(accelerator, image_shape, options, training["ours"]["median"]),
        "convolutions_share_of_step": convolutions,
        "sampler_milliseconds": {method: cost(method, batch_size) for method in METHODS},
        "adaptive_milliseconds": {
            f"T={T}, batch {batch}": cost("adaptive", batch, num_train_timesteps=T)
            for T in (1000, 4000)
            for batch in (batch_size, 8 * batch_size)
        },
        "step_milliseconds": 1000 * batch_size / training["ours"]["median"],
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "versions": library_versions(),
        "command": this_command(),
    }
    print_table(results)
    if options.output_json:
        write_json(results, Path(options.output_json))


def make_accelerator(options):
    """As the training script's, with its settings of the process."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options.mixed_precision)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return accelerator


# Two processes that take turns


class Contestant:
    """A process that trains or samples when asked, and otherwise waits.

    Args:
        name: of `CONTESTANTS`.
    """

    def __init__(self, name, options):
        context = multiprocessing.get_context("spawn")
        self.pipe, self.other_end = context.Pipe()
        self.process = context.Process(target=contest, args=(name, options, self.other_end))

    def __enter__(self):
        self.process.start()
        self.other_end.close()  # the process has its own: if that closes, we hear of it
        self.ask("training")  # built, and compiled, before the next one begins
        return self

    def __exit__(self, *_):
        self.pipe.close()
        self.process.join()

    def ask(self, what):
        """Seconds of a round of "training" or "sampling"; the peak "memory" so far, in MiB; or the share of a training
        step that "convolutions" take."""
        try:
            self.pipe.send(what)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise SystemExit("a contestant has failed, as told above") from None


def contest(name, options, pipe):
    """The process of a `Contestant`: answers until nobody asks."""
    accelerator = make_accelerator(options)
    dataset = open_images(options.dataset_name, resolution=options.resolution, cache_dir=options.cache_dir)
    step, sample = CONTESTANTS[name](accelerator, dataset, options)

    def steps():
        for _ in range(options.steps_per_repeat):
            step()

    def samples():
        with accelerator.autocast():
            sample()

    answers = {
        "training": partial(seconds_of, steps),
        "sampling": partial(seconds_of, samples),
        "memory": partial(peak_memory, accelerator.device),
        "convolutions": partial(share_of_convolutions, steps, accelerator.device),
    }
    if accelerator.device.type == "cuda":
        steps()  # compiling and tuning take memory of their own
        torch.cuda.reset_peak_memory_stats()
    try:
        while True:
            pipe.send(answers[pipe.recv()]())
    except EOFError:
        pass


def peak_memory(device):
    """MiB at most: of tensors on a GPU, after compilation; of the process on a CPU, all in all (None but on Linux)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10)


def share_of_convolutions(steps, device):
    """Of the time of all operations, forward and backward, by a profile. On a GPU, of all kernels' time."""
    with torch.profiler.profile() as profile:
        steps()
    time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = profile.key_averages()
    operations = [event for event in events if event.device_type == DeviceType.CPU]  # which launch the GPU's kernels
    kernels = [event for event in events if event.device_type == DeviceType.CUDA] or operations
    convolutions = [event for event in operations if "convolution" in event.key]
    return sum(getattr(event, time) for event in convolutions) / sum(getattr(event, time) for event in kernels)


def compare(contestants, what, images_a_round, repeats):
    """Images per second of each, and their ratio in rounds that stood beside each other."""
    seconds = interleaved({name: partial(contestant.ask, what) for name, contestant in contestants.items()}, repeats)
    rates = {name: summary([images_a_round / s for s in times]) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    return rates | {"ours_over_diffusers": summary(ratios)}


# Ours


def our_training_and_sampling(accelerator, dataset, options):
    """Two functions: one step as train_adaptive_ddpm.py makes it, and one batch as generate.py does."""
    device = accelerator.device
    torch.manual_seed(options.seed)
    unet = build_network(options, dataset.channels, dataset.resolution)
    noise_scheduler = build_noise_scheduler(options)
    sampler = build_sampler(options, noise_scheduler, dataset.sample, options.seed, device)
    state = build_state(options, accelerator, unet, sampler, {}, PhaseClock(device))
    denoiser = Denoiser(state.network, noise_scheduler, device)
    step_random = StepRandom(options.seed, accelerator, dataset.to_inputs, options.random_flip)
    batches = open_batches(options, dataset, accelerator, images_seen=0)
    warm_up(state, denoiser, dataset.image_shape, options.train_batch_size)

    sampling_unet = build_network(options, dataset.channels, dataset.resolution).to(device)
    choose_kernels(sampling_unet, device, accelerator.mixed_precision, options.compile, mode="reduce-overhead")
    pipeline = DDPMPipeline(sampling_unet, noise_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    indices, steps = range(options.sampling_batch_size), options.sampling_steps
    return (
        lambda: train_step(state, denoiser, step_random, *next(batches)),
        lambda: sample_images(pipeline, indices, num_inference_steps=steps),
    )


# diffusers'


def their_training_and_sampling(accelerator, dataset, options):
    """Two functions: one step as diffusers' script makes it, from its data loader to its log, and one batch by
    `DDPMPipeline.__call__`."""
    torch.manual_seed(options.seed)
    device, channels = accelerator.device, dataset.channels
    images = [dataset[i] for i in range(min(len(dataset), options.data_images))]
    model = build_network(options, channels, options.resolution)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noise_scheduler = build_noise_scheduler(options)
    sampling_unet = build_network(options, channels, options.resolution).to(device).eval()
    pipeline = DDPMPipeline(sampling_unet, build_noise_scheduler(options))
    pipeline.set_progress_bar_config(disable=True)
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

    batch, steps = options.sampling_batch_size, options.sampling_steps
    return step, lambda: pipeline(batch, num_inference_steps=steps, output_type="pt")


def endless(loader):
    while True:
        yield from loader


CONTESTANTS = {"ours": our_training_and_sampling, "diffusers": their_training_and_sampling}


# What a step is made of


def arithmetic(accelerator, image_shape, options, images_per_second):
    """FLOPs of a training step's network, forward and backward, and the fraction of a large matrix product's rate
    (which small convolutions may exceed)."""
    device = accelerator.device
    unet = build_network(options, image_shape[0], options.resolution).to(device)
    choose_kernels(unet, device, accelerator.mixed_precision, compiled=False)
    batch = torch.randn(1, *image_shape, device=device)
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


def sampler_cost(method, batch_size, *, image_shape, device, repeats, num_train_timesteps=1000):
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
            print(f"{kind + ' ' + name:34}" + "".join(f"{row[key]:10.2f}" for key in ("median", "min", "max")))
    print(f"peak memory, MiB: {json.dumps(results['peak_memory_mib'])}")
    print(
        "{gflop_per_image:.3f} GFLOP an image, {fraction:.1%} of a matrix product's rate".format(
            **results["arithmetic"]
        )
    )
    print(f"convolutions take {results['convolutions_share_of_step']:.0%} of a step")
    for name, cost in {**results["sampler_milliseconds"], **results["adaptive_milliseconds"]}.items():
        print(f"{name:34}{cost:10.3f} ms, {cost / results['step_milliseconds']:.2%} of a step")


if __name__ == "__main__":
    begun = time.perf_counter()
    main(parse_options(ThroughputOptions))
    print(f"{time.perf_counter() - begun:.0f} s in all")
