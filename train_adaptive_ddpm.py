"""Train a DDPM on images with an adaptive timestep sampler; the result is a diffusers pipeline.

accelerate launch train_adaptive_ddpm.py --config configs/digits.yaml
accelerate launch train_adaptive_ddpm.py --config configs/cifar10.yaml --mixed_precision bf16
"""

import argparse
import json
import logging
import math
import os
import sys
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.optimization import get_scheduler

from images import ImageError, check_output_outside_data, training_batches
from pipelines import UnconditionalPipeline, choose_kernels, make_grid_image
from recipes import one_line_errors, parse_options, save_options
from samplers import NoiseSchedule, fold_seed, resolve_method
from training.checkpoints import (
    discard_checkpoints_after,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_process_state,
    save_checkpoint,
)
from training.clock import PhaseClock
from training.data import open_training_data
from training.ema import WeightAverage
from training.evaluation import Evaluator
from training.folder_lock import folder_lock
from training.metrics import LossMeter, TrainingLog
from training.models import (
    build_noise_scheduler,
    build_sampler,
    build_unet,
    check_finite,
    ema_pipeline,
    method_parts,
    warm_up,
)
from training.options import TrainingOptions
from training.output import NOT_SAVED, OPTIONS_FILE, OutputDir, check_disk_space, check_output_dir
from training.plan import plan_run
from training.report import (
    check_hub_repository,
    create_hub_repository,
    plot_timestep_density,
    print_summary,
    upload_to_hub,
    write_model_card,
)
from training.resuming import (
    check_resumed_folder,
    check_same_network,
    is_elsewhere,
    last_good_checkpoint,
    override_settings,
    warn_of_changed_data,
    warn_of_changed_options,
)
from training.saving import replace_file, save_pipeline
from training.step import TrainingStep
from training.stopping import Interval, NonFiniteGuard, StopCondition

logger = logging.getLogger(__name__)


def main(options):
    warn_of_missing_processes()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # however it was launched; other accelerators are not supported
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=None if options.logger == "none" else options.logger,
        project_config=ProjectConfiguration(
            options.output_dir, logging_dir=f"{options.output_dir}/{options.logging_dir}"
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one draws samples
    )
    logging.basicConfig(level=logging.WARNING if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    torch.backends.cudnn.benchmark = True
    set_seed(options.seed)
    with one_line_errors(ValueError, OSError, FloatingPointError, torch.OutOfMemoryError), ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(folder_lock(options.output_dir))
        accelerator.wait_for_everyone()
        train(options, accelerator)
        accelerator.end_training()


def train(options, accelerator):
    """Train, from the beginning or from a checkpoint, in a folder that this run holds."""
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    clock = PhaseClock(device)
    output = OutputDir(options.output_dir)

    # What cannot work is refused before data is read, and nothing in the folder changes until the first step can come
    checkpoint, state = None, {"step": 0, "images": 0, "seconds": None}
    if accelerator.is_main_process:
        check_output_outside_data(options.output_dir, options.dataset_name)
        check_output_dir(
            output,
            resume=bool(options.resume_from_checkpoint),
            overwrite=options.overwrite_output_dir,
            checkpoints=bool(list_checkpoints(output.folder)),
        )
        if options.resume_from_checkpoint:
            checkpoint = find_checkpoint(output.folder, options.resume_from_checkpoint, logger.warning)
            check_resumed_folder(output, checkpoint)
        if options.push_to_hub:
            check_hub_repository(options)
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16: needs a GPU; on a CPU choose bf16 or no")
    (checkpoint,) = broadcast_object_list([checkpoint])  # the main process decides for all
    if checkpoint:
        state = read_process_state(checkpoint, rank)
        clock = PhaseClock(device, state["seconds"])
        if state["processes"] != world_size:
            logger.warning(f"resuming with {world_size} processes, which were {state['processes']}")
    step, images_seen = state["step"], state["images"]
    plan_run(options)
    if checkpoint:
        check_same_network(options, state.get("unet"), checkpoint)

    # Data
    with accelerator.local_main_process_first():
        dataset = open_training_data(options)
    options.resolution = dataset.resolution
    accelerator.print(dataset.describe())
    if checkpoint:
        warn_of_changed_options(options, checkpoint)
        warn_of_changed_data(dataset, state.get("data"))

    # Model and noise
    noise_scheduler = build_noise_scheduler(options)
    schedule = NoiseSchedule.from_scheduler(noise_scheduler)
    unet = build_unet(options, dataset.channels, dataset.resolution)
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    if accelerator.is_main_process:
        check_disk_space(output.folder, num_parameters)

    # Timesteps: which to train on, and how much each example counts
    needs_images = resolve_method(options.method, **method_parts(options)).needs_images
    sampler = build_sampler(options, schedule, dataset.sample() if needs_images else None, device)
    if checkpoint:
        sampler.load_state_dict(state["sampler"])

    # Batches: all processes together see what one process would with the whole batch
    images_per_process = options.train_batch_size * options.gradient_accumulation_steps
    images_per_step = images_per_process * world_size
    batches = training_batches(
        dataset,
        images_per_process,
        seed=options.seed,
        first_image=images_seen,
        rank=rank,
        world_size=world_size,
        device=device,
        placement=options.data_placement,
        num_workers=options.dataloader_num_workers,
        show_progress=accelerator.is_local_main_process,
    )
    max_steps = total_steps(options, batches.num_images / images_per_step)
    evaluator = Evaluator(options, dataset, accelerator) if options.eval_steps or options.eval_seconds else None

    # Optimiser, learning rate, average
    optimizer = torch.optim.AdamW(
        unet.to(device).parameters(),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,  # which `NonFiniteGuard` needs
    )
    adam_settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "weight_decay", "eps")}
    lr_scheduler = get_scheduler(
        options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps, num_training_steps=max_steps
    )
    choose_kernels(unet, device, accelerator.mixed_precision, options.compile)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema = WeightAverage(
        unet.parameters(),
        decay=options.ema_max_decay if options.use_ema else 0.0,
        use_ema_warmup=True,
        inv_gamma=options.ema_inv_gamma,
        power=options.ema_power,
    )
    accelerator.register_for_checkpointing(lr_scheduler, ema)

    meter = LossMeter(schedule.num_train_timesteps, device)
    guard = NonFiniteGuard(optimizer.optimizer, device, accelerator.scaler is not None, options.max_nonfinite_steps)
    torch.manual_seed(fold_seed(options.seed, rank, stream=2))  # of dropout, which differs by process
    stateful = {"sampler": sampler, "meter": meter, "guard": guard}  # a part on each process
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
        override_settings(optimizer, lr_scheduler, adam_settings)
        for name in ("meter", "guard"):
            stateful[name].load_state_dict(state[name])
        accelerator.print(f"resumed from {checkpoint}")

    update = TrainingStep(
        accelerator,
        unet,
        noise_scheduler,
        sampler,
        optimizer,
        lr_scheduler,
        ema,
        guard,
        meter,
        seed=options.seed,
        random_flip=options.random_flip,
        max_grad_norm=options.max_grad_norm,
    )

    def save_state():
        with clock.phase("save"):
            check_finite(unet.parameters(), f"weights of step {step:,}")
            check_finite(ema.shadow_params, f"averaged weights of step {step:,}")
            state = {"step": step, "images": images_seen, "seconds": clock.report(), "processes": world_size}
            state |= {name: part.state_dict() for name, part in stateful.items()} | made_for
            save_checkpoint(accelerator, output, step, state, options.checkpoints_total_limit)

    def save_model():
        with clock.phase("save"):
            pipeline = ema_pipeline(accelerator, unet, ema, noise_scheduler)
            if accelerator.is_main_process:
                save_pipeline(pipeline, output)

    def save_samples(name):
        with clock.phase("preview"):
            pipeline = ema_pipeline(accelerator, unet, ema, noise_scheduler)
            if accelerator.is_main_process:
                pipeline = UnconditionalPipeline(pipeline.unet, pipeline.scheduler).to(device)
                pipeline.set_progress_bar_config(desc="sampling", leave=False)
                numbers, steps = range(options.eval_batch_size), options.ddpm_num_inference_steps
                images = stop.unless_signalled(partial(pipeline.sample, numbers, options.seed, steps))
                if images is not None:
                    log.save_grid(make_grid_image(images.cpu()), f"samples/{name}.png", step)
            accelerator.wait_for_everyone()

    def save_score():
        with clock.phase("eval"):
            score = evaluator.score(ema_pipeline(accelerator, unet, ema, noise_scheduler), stop.is_signalled)
        if score is not None:
            log.write_score(step, images_seen, evaluator.name, score)

    # DDP settles its buckets, and with them the order of its sums, after the first step: then it must not be the run's
    if options.compile or device.type == "cuda" or world_size > 1:
        with clock.phase("warm_up"):
            image_shape = (dataset.channels, dataset.resolution, dataset.resolution)
            warm_up(accelerator, unet, sampler, image_shape, options.train_batch_size)

    if evaluator:
        with clock.phase("eval"):
            evaluator.add_reference()
    stop = StopCondition(accelerator, max_steps, options.max_train_seconds, clock)  # before data workers are forked
    batches.peek()  # the last that can refuse; from here on the run writes
    hub_repository = None
    made_for = {
        "unet": json.loads(accelerator.unwrap_model(unet).to_json_string()),
        "data": {"images": len(dataset), "fingerprint": dataset.fingerprint()},
    }
    if accelerator.is_main_process:
        if options.push_to_hub:
            hub_repository = create_hub_repository(options)
        output.remove_partial_saves()
        if options.overwrite_output_dir:
            output.delete_results()
        for path in discard_checkpoints_after(output, step):
            logger.warning(f"{path} is discarded: the run goes on from {checkpoint or 'the beginning'}")
        replace_file(output.path(OPTIONS_FILE), lambda path: save_options(options, path, NOT_SAVED))
    if checkpoint and is_elsewhere(checkpoint, output):  # of which this folder must hold what it goes on from
        save_state()
    log = TrainingLog(accelerator, options, output, max_steps, step, images_seen, clock)
    evaluation = Interval(accelerator, options.eval_steps, options.eval_seconds, clock)
    unet.train()
    with last_good_checkpoint(output), closing(log), clock.phase("train"):
        while (reason := stop.reason(step)) is None:
            try:
                images = next(batches)
            except (ImageError, OSError):  # data that was there when the run began
                if world_size == 1:  # the others would wait for this one in the next update
                    save_state()
                raise
            update(step, images)
            step += 1
            images_seen += images_per_step

            log.advance(step)
            if step % options.logging_steps == 0:
                log.write(step, images_seen, meter, guard, lr_scheduler, sampler, batches.skipped)
            if options.eval_batch_size and is_due(
                options.save_images_epochs, images_seen, images_per_step, batches.num_images
            ):
                save_samples(f"step-{step:07d}")
            if evaluation.is_due(step):
                save_score()
            if is_due(options.save_model_epochs, images_seen, images_per_step, batches.num_images):
                save_model()
            if options.checkpointing_steps and step % options.checkpointing_steps == 0:
                save_state()

    # The end; after a signal, only what is needed to go on
    with last_good_checkpoint(output):
        if reason == "signal" or options.checkpointing_steps:
            save_state()
        save_model()
        if reason != "signal":
            if step % options.logging_steps:
                log.write(step, images_seen, meter, guard, lr_scheduler, sampler, batches.skipped, last=True)
            if options.eval_batch_size:
                save_samples("final")
        if accelerator.is_main_process:
            plot_timestep_density(log.path, output.path("timestep_density.png"), schedule.num_train_timesteps)
            summary = log.summary(step, images_seen, num_parameters, reason, dataset.contents(), batches.skipped)
            write_model_card(options, output, summary, hub_repository)
            print_summary(options, summary)
        if hub_repository and reason != "signal":
            upload_to_hub(hub_repository, output, options)


def warn_of_missing_processes():
    """`accelerate launch --cpu --num_processes 2` prepares an address for two processes, and starts one."""
    if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "accelerate launch started one process only; for several on a CPU, launch with "
            "--config_file accelerate_configs/cpu.yaml --num_processes N"
        )


def total_steps(options, steps_per_epoch):
    """The number of updates that the budget in steps or epochs allows; None where only time is limited."""
    by_epochs = math.ceil(options.num_epochs * steps_per_epoch) if options.num_epochs else None
    return min((steps for steps in (options.max_train_steps, by_epochs) if steps), default=None)


def is_due(epochs, images_seen, images_per_step, num_images):
    """Whether a multiple of `epochs` passes over the data ended within the last step."""
    if not epochs:
        return False
    return images_seen // (epochs * num_images) > (images_seen - images_per_step) // (epochs * num_images)


def command_line(argv):
    """The options of a command line; where it names neither recipe nor other data, those of the embedded digits'."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dataset_name", "--dataset-name", "--train_data_dir", default="digits")
    named, _ = parser.parse_known_args(argv)
    if named.config is None and named.dataset_name == "digits" and not {"-h", "--help"} & set(argv):
        argv = ["--config", str(Path(__file__).parent / "configs" / "digits.yaml"), *argv]
    return parse_options(TrainingOptions, argv)


if __name__ == "__main__":
    main(command_line(sys.argv[1:]))
