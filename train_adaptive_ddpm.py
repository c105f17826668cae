"""Train a DDPM on images with an adaptive timestep sampler; the result is a diffusers pipeline.

accelerate launch train_adaptive_ddpm.py --config configs/digits.yaml
accelerate launch train_adaptive_ddpm.py --config configs/cifar10.yaml --mixed_precision bf16
"""

import argparse
import gc
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from pipelines import null_label
from recipes import is_main_process, one_line_errors, parse_options
from samplers import mean_squares
from training.clock import PhaseClock
from training.data import identify, open_batches, read_data
from training.denoiser import Denoiser
from training.dry_run import dry_run
from training.evaluation import build_evaluator, build_validation
from training.failures import checkpoint_if_data_fails, last_good_checkpoint
from training.intervals import plan_intervals
from training.latents import encode_images
from training.launch import held_output_dir, start_accelerator
from training.log import TrainingLog
from training.methods import build_sampler
from training.network import build_network
from training.noise_schedule import build_noise_scheduler
from training.options import TrainingOptions
from training.output import check_disk_space
from training.plan import check_run
from training.results import PipelineParts, Results
from training.resuming import spent_budget
from training.sharding import full_tensor
from training.state import TrainingState, build_state
from training.step_random import StepRandom
from training.stopping import Budget, StopCondition
from training.warm_up import warm_up_if_slow
from training.writing import begin_writing, finish


def main(options: TrainingOptions) -> None:
    with one_line_errors(ValueError, OSError, FloatingPointError, torch.OutOfMemoryError):
        accelerator = start_accelerator(options)
        with held_output_dir(accelerator, options.output_dir):
            train(options, accelerator)
            accelerator.end_training()


def train(options: TrainingOptions, accelerator: Accelerator) -> None:
    """Train, from the beginning or from a checkpoint, in a folder that this run holds."""
    # What cannot work is refused before data is read, and nothing in the folder changes until the first step can come
    output, hub, start = check_run(options, accelerator)
    clock = PhaseClock(accelerator.device, start.process_state.get("seconds"))

    # What to train, on which images and timesteps
    dataset, validation_images = read_data(options, accelerator, start)
    evaluator = build_evaluator(options, accelerator, dataset, clock)  # a misspelt one ends no hours of encoding
    vae, dataset, validation_images = encode_images(options, accelerator, dataset, validation_images, clock)
    classes = dataset.classes if options.class_conditional else None
    noise_scheduler = build_noise_scheduler(options, options.planned_num_steps)
    network = build_network(options, dataset.channels, dataset.resolution, classes and len(classes))
    check_disk_space(output.folder, network, vae)
    sampler = build_sampler(options, noise_scheduler, dataset.sample, options.seed, accelerator.device)
    batches = open_batches(options, dataset, accelerator, start.images)

    # All that training changes
    max_steps = options.total_steps(batches.num_images / (options.images_per_process * accelerator.num_processes))
    if nothing_to_train := spent_budget(options, output, start, max_steps):
        return accelerator.print(nothing_to_train)
    budget = Budget(accelerator, clock, max_steps, options.max_train_seconds)
    state = build_state(options, accelerator, network, sampler, identify(options, dataset, vae), clock, budget)
    state.begin(start, options.seed)
    validation = build_validation(options, accelerator, validation_images, dataset.classes)

    # An update, and the end of updates
    null, share = null_label(network.config), options.share_of_null_labels
    denoiser = Denoiser(state.network, noise_scheduler, accelerator.device, null)
    step_random = StepRandom(options.seed, accelerator, dataset.to_inputs, options.random_flip, share, null)
    warm_up_if_slow(state, denoiser, dataset.image_shape, options.train_batch_size, options.compile)
    if options.dry_run:
        return dry_run(options, state, batches, budget, partial(train_step, state, denoiser, step_random))
    stop = StopCondition(budget)  # before data workers are forked
    batches.peek()  # the last that can refuse

    begin_writing(options, output, start, state, hub)
    log = TrainingLog(options, state, output, budget)
    parts = PipelineParts(noise_scheduler, classes and dict(enumerate(classes)), vae)
    results = Results(options, state, parts, output, log, stop, options.seed, evaluator, validation)
    every = plan_intervals(options, state, batches.num_images)
    with last_good_checkpoint(output):
        with closing(log), clock.phase("train"):
            while (stop_reason := stop.reason(state.step)) is None:
                with checkpoint_if_data_fails(state, output, options.checkpoints_total_limit):
                    images, labels = next(batches)
                train_step(state, denoiser, step_random, images, labels)
                log.advance()
                if every.log.is_due():
                    log.write(batches.skipped)
                if every.samples.is_due():
                    results.save_samples(f"step-{state.step:07d}")
                if every.score.is_due():
                    results.log_score()
                if every.validation.is_due():
                    results.log_validation_loss()
                if every.pipeline.is_due():
                    results.save_pipeline()
                if every.checkpoint.is_due():
                    state.save(output, options.checkpoints_total_limit)
        finish(options, state, log, results, stop_reason, dataset, hub)


def train_step(
    state: TrainingState, denoiser: Denoiser, step_random: StepRandom, images: torch.Tensor, labels: torch.Tensor
) -> None:
    """Make one update from images [B, C, H, W], or moments of latents, and labels [B] on the device, B of all
    accumulated batches.

    Nothing in it waits for the device.
    """
    accelerator, network, sampler, optimizer = state.accelerator, state.network, state.sampler, state.optimizer
    step_random.begin(state.step)
    images = step_random.inputs(images)
    noise = step_random.noise(images, sampler.noise_coupling)
    labels = step_random.drop_labels(labels)
    timesteps, weights = sampler.sample(len(images), images=images)
    sampler.before_update(images, denoiser.epsilon_losses)
    num_parts, losses_of_parts = accelerator.gradient_accumulation_steps, []
    for part in (slice(i, None, num_parts) for i in range(num_parts)):
        with accelerator.accumulate(network):
            errors = denoiser.epsilon_errors(images[part], noise[part], timesteps[part], labels[part])
            losses = sampler.losses_of_epsilon(errors, timesteps[part])
            weighted_losses = weights[part] * losses
            accelerator.backward(weighted_losses.mean())
            state.meter.add_losses(timesteps[part], weighted_losses.detach(), mean_squares(errors.detach()))
            if accelerator.sync_gradients:
                grad_norm = full_tensor(accelerator.clip_grad_norm_(network.parameters(), state.max_grad_norm))
                state.meter.add_gradient_norm(grad_norm, state.max_grad_norm)
                state.guard.observe(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses_of_parts.append(losses.detach())
    sampler.update(timesteps, torch.stack(losses_of_parts, dim=1).flatten())  # in the order of the draws
    sampler.after_update(denoiser.epsilon_losses)
    state.lr_scheduler.step()
    state.ema.step(network.parameters())
    state.advance()


def command_line(argv: list[str]) -> TrainingOptions:
    """The options of a command line; where it names neither recipe nor other data, those of the embedded digits'."""
    words = with_default_recipe(argv)
    if words != argv and is_main_process():
        print(f"without --config, and with no other data than digits: {' '.join(words[:2])}", file=sys.stderr)
    return parse_options(TrainingOptions, words)


def with_default_recipe(argv: list[str]) -> list[str]:
    """A command line that names a recipe, that of the embedded digits, where it named neither one nor other data."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dataset_name", "--dataset-name", "--train_data_dir", default="digits")
    named, others = parser.parse_known_args(argv)
    assigned = [word for word in others if word.startswith("dataset_name=") and word != "dataset_name=digits"]
    is_digits = named.dataset_name == "digits" and not assigned
    if named.config is None and is_digits and not {"-h", "--help"} & set(argv):
        argv = ["--config", str(Path(__file__).parent / "configs" / "digits.yaml"), *argv]
    return argv


if __name__ == "__main__":
    gc.freeze()  # all that was imported: looking through it when the process ends would take a second and more
    main(command_line(sys.argv[1:]))
