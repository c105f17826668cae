"""Train a DDPM on images with an adaptive timestep sampler; the result is a diffusers pipeline.

accelerate launch train_adaptive_ddpm.py --config configs/digits.yaml
accelerate launch train_adaptive_ddpm.py --config configs/cifar10.yaml --mixed_precision bf16
"""

import argparse
import importlib.util
import logging
import math
import os
import sys
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.optimization import get_scheduler
from transformers.hf_argparser import HfArg

from images import BadImage, open_images, training_batches
from pipelines import UnconditionalPipeline, choose_kernels, make_grid_image
from recipes import JsonDict, changed_options, one_line_errors, parse_options, save_options
from samplers import (
    ERROR_FILTERS,
    LOSS_WEIGHTINGS,
    METHODS,
    PARTS,
    TIMESTEP_SAMPLERS,
    NoiseSchedule,
    fold_seed,
    make_timestep_sampler,
    resolve_method,
)
from training.checkpoints import discard_checkpoints_after, find_checkpoint, read_process_state, save_checkpoint
from training.clock import PhaseClock
from training.ema import WeightAverage
from training.evaluation import Evaluator
from training.metrics import LossMeter, TrainingLog
from training.models import build_noise_scheduler, build_unet, ema_pipeline, method_parts, warm_up
from training.output import NOT_SAVED, OPTIONS_FILE, check_disk_space, claim_output_dir, delete_results
from training.report import (
    create_hub_repository,
    plot_timestep_density,
    print_summary,
    upload_to_hub,
    write_model_card,
)
from training.saving import save_pipeline
from training.step import TrainingStep
from training.stopping import Interval, NonFiniteGuard, StopCondition

logger = logging.getLogger(__name__)


@dataclass
class TrainingOptions:
    """Named as in diffusers' train_unconditional.py where that has them."""

    config: str | None = HfArg(default=None, help="A recipe (YAML); flags override it. See configs/.")
    output_dir: str = HfArg(default="ddpm-model", help="Where the pipeline, samples, logs and checkpoints go.")
    overwrite_output_dir: bool = HfArg(default=False, help="Delete the results of an earlier run in --output_dir.")
    seed: int = HfArg(default=0, help="Of initial weights, data order, noise and timesteps.")

    # Data
    dataset_name: str = HfArg(
        default="digits",
        aliases=["--train_data_dir"],
        help="A Hub data set, a local folder of images or parquet files, or 'digits' (embedded).",
    )
    dataset_config_name: str | None = HfArg(default=None, help="The data set's configuration, if it has several.")
    image_column: str | None = HfArg(default=None, help="Needed only if the data set has several image columns.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    resolution: int | None = HfArg(default=None, help="Images are resized and cropped to it; default: their own size.")
    image_mode: Literal["auto", "RGB", "L"] = HfArg(default="auto", help="auto: grey (L) if all images are.")
    random_flip: bool = HfArg(default=False, help="Mirror half of the images, at random.")
    on_bad_image: Literal["error", "skip"] = HfArg(default="error", help="What to do about an unreadable image.")
    data_placement: Literal["auto", "device", "memory", "stream"] = HfArg(
        default="auto", help="Decoded once onto the device or into memory, or decoded by workers as needed."
    )
    dataloader_num_workers: int = HfArg(default=0, help="Processes that decode a streamed data set.")

    # Model and noise
    model_config_name_or_path: str | None = HfArg(default=None, help="A UNet2DModel's config; default: DDPM's.")
    unet: JsonDict = field(default_factory=JsonDict, metadata={"help": "UNet2DModel settings, JSON; over the default."})
    noise_scheduler: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "Further DDPMScheduler settings, JSON."}
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = HfArg(default="epsilon", help="Network's output.")
    ddpm_num_steps: int = HfArg(default=1000, help="T, the timesteps of training.")
    ddpm_beta_schedule: str = HfArg(default="linear", help="As in DDPMScheduler.")

    # Method
    method: Literal[tuple(METHODS)] = HfArg(default="adaptive", help="The three below, by name.")
    timestep_sampler: str | None = HfArg(default=None, help=f"Over the method's: {', '.join(TIMESTEP_SAMPLERS)}.")
    loss_weighting: str | None = HfArg(default=None, help=f"Over the method's: {', '.join(LOSS_WEIGHTINGS)}.")
    error_filter: str | None = HfArg(default=None, help=f"Over the method's: {', '.join(ERROR_FILTERS)}.")
    timestep_sampler_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "Keyword arguments of the sampler's class, JSON."}
    )
    low_discrepancy: bool = HfArg(default=True, help="Equally spaced draws through the inverse CDF.")

    # Budget: the first that is spent ends the run
    max_train_steps: int | None = HfArg(default=None, help="Updates.")
    num_epochs: int | None = HfArg(default=None, help="Passes over the data; 100 if no budget is given at all.")
    max_train_seconds: float | None = HfArg(default=None, help="Wall-clock time of training proper.")

    # Optimisation
    train_batch_size: int = HfArg(default=16, help="Per process and accumulation step.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches per update.")
    learning_rate: float = HfArg(default=1e-4, help="After warm-up.")
    lr_scheduler: Literal[
        "constant_with_warmup", "constant", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = HfArg(default="constant_with_warmup", help="All but the constant ones need the number of steps.")
    lr_warmup_steps: int = HfArg(default=500, help="Updates of linear warm-up.")
    adam_beta1: float = HfArg(default=0.95, help="AdamW.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW.")
    adam_weight_decay: float = HfArg(default=1e-6, help="AdamW.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm; inf for no clipping.")
    max_nonfinite_steps: int = HfArg(default=50, help="Non-finite updates in a row at which to give up.")
    use_ema: bool = HfArg(default=True, help="Save an exponential moving average of the weights.")
    ema_inv_gamma: float = HfArg(default=1.0, help="The average's decay is 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = HfArg(default=0.75, help="The power in that formula.")
    ema_max_decay: float = HfArg(default=0.9999, help="The average's decay at most.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = HfArg(default=None, help="Default: accelerate's setting.")
    compile: bool = HfArg(default=False, help="torch.compile the network; compiled before the clock starts.")

    # Logs, samples, checkpoints
    logger: Literal["tensorboard", "wandb", "none"] = HfArg(default="tensorboard", help="Beside metrics.jsonl.")
    logging_dir: str = HfArg(default="logs", help="Under --output_dir.")
    logging_steps: int = HfArg(default=50, help="Updates between two records of the log.")
    eval_batch_size: int = HfArg(default=16, help="Images in a sample grid; 0 for no grids.")
    ddpm_num_inference_steps: int | None = HfArg(default=None, help="Denoising steps for the grids; default: T.")
    eval_steps: int | None = HfArg(default=None, help="Updates between two scores (FID) of samples; default: none.")
    eval_seconds: float | None = HfArg(default=None, help="Training seconds between two scores.")
    eval_num_images: int = HfArg(default=5000, help="Images drawn for a score.")
    eval_num_inference_steps: int | None = HfArg(default=None, help="Denoising steps for those; default: 50.")
    eval_feature_extractor: str | None = HfArg(default=None, help="As in evaluate.py; default: Inception.")
    eval_feature_extractor_weights: str | None = HfArg(default=None, help="A local file of Inception's weights.")
    save_images_epochs: int | None = HfArg(default=None, help="Epochs between two sample grids.")
    save_model_epochs: int | None = HfArg(default=None, help="Epochs between two saves of the pipeline.")
    checkpointing_steps: int = HfArg(default=2000, help="Updates between two checkpoints; 0: none but on a signal.")
    checkpoints_total_limit: int | None = HfArg(default=2, help="Checkpoints kept; the oldest are deleted.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="'latest' or a checkpoint's path.")

    # Hub
    push_to_hub: bool = HfArg(default=False, help="Upload the results at the end.")
    hub_model_id: str | None = HfArg(default=None, help="Default: the name of --output_dir.")
    hub_token: str | None = HfArg(default=None, help="Default: the one you are logged in with.")
    hub_private_repo: bool = HfArg(default=False, help="Make the repository private.")

    def __post_init__(self):
        positive = """resolution train_batch_size gradient_accumulation_steps learning_rate adam_epsilon max_grad_norm
            max_train_steps num_epochs max_train_seconds max_nonfinite_steps ema_inv_gamma ema_power logging_steps
            ddpm_num_inference_steps save_images_epochs save_model_epochs checkpoints_total_limit
            eval_steps eval_seconds eval_num_images eval_num_inference_steps"""
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value}: must be greater than 0")
        for name in (
            "lr_warmup_steps",
            "checkpointing_steps",
            "dataloader_num_workers",
            "adam_weight_decay",
            "seed",
            "eval_batch_size",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be in [0, 1)")
        if self.ddpm_num_steps < 2:
            raise ValueError(f"--ddpm_num_steps {self.ddpm_num_steps}: must be at least 2")
        self.ddpm_num_inference_steps = self.ddpm_num_inference_steps or self.ddpm_num_steps
        self.eval_num_inference_steps = self.eval_num_inference_steps or min(50, self.ddpm_num_steps)
        for name in ("ddpm_num_inference_steps", "eval_num_inference_steps"):
            if getattr(self, name) > self.ddpm_num_steps:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: must not exceed --ddpm_num_steps ({self.ddpm_num_steps})"
                )
        for name, registry in PARTS.items():
            if getattr(self, name) is not None and getattr(self, name) not in registry:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(registry)}")
        if (
            Path(self.logging_dir).is_absolute()
            or {".."} & set(Path(self.logging_dir).parts)
            or self.logging_dir == "."
        ):
            raise ValueError(f"--logging_dir {self.logging_dir}: must be a folder inside --output_dir")
        if self.logger == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("--logger wandb: wandb is not installed (pip install wandb)")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "--overwrite_output_dir would delete what --resume_from_checkpoint needs: give one of them"
            )
        if not (self.max_train_steps or self.num_epochs or self.max_train_seconds):
            self.num_epochs = 100
        if not self.lr_scheduler.startswith("constant") and not (self.max_train_steps or self.num_epochs):
            raise ValueError(f"--lr_scheduler {self.lr_scheduler}: needs --max_train_steps or --num_epochs")


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
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    clock = PhaseClock(device)
    logging.basicConfig(level=logging.WARNING if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    torch.backends.cudnn.benchmark = True
    set_seed(options.seed)

    with one_line_errors(ValueError, OSError):
        # Output: claimed before anything expensive begins
        output_dir = Path(options.output_dir)
        if accelerator.is_main_process:
            claim_output_dir(options)
        accelerator.wait_for_everyone()
        checkpoint, state = None, {"step": 0, "images": 0, "seconds": None}
        if accelerator.mixed_precision == "fp16" and device.type == "cpu":
            raise ValueError("--mixed_precision fp16: needs a GPU; on a CPU choose bf16 or no")
        if options.resume_from_checkpoint and accelerator.is_main_process:
            checkpoint = find_checkpoint(output_dir, options.resume_from_checkpoint, logger.warning)
        (checkpoint,) = broadcast_object_list([checkpoint])  # the main process decides for all
        if checkpoint:
            state = read_process_state(checkpoint, rank)
            clock = PhaseClock(device, state["seconds"])
            if state["processes"] != world_size:
                logger.warning(f"resuming with {world_size} processes, which were {state['processes']}")
        step, images_seen = state["step"], state["images"]
        hub_repository = create_hub_repository(options) if options.push_to_hub and accelerator.is_main_process else None

        # Data
        with accelerator.local_main_process_first():
            dataset = open_images(
                options.dataset_name,
                dataset_config_name=options.dataset_config_name,
                cache_dir=options.cache_dir,
                image_column=options.image_column,
                resolution=options.resolution,
                image_mode=options.image_mode,
                on_bad_image=options.on_bad_image,
            )
        options.resolution = dataset.resolution
        if checkpoint:
            left_out = (*NOT_SAVED, "output_dir")
            for name, (old, new) in changed_options(options, checkpoint.parent / OPTIONS_FILE, left_out).items():
                logger.warning(f"resuming with --{name} {new}, which was {old}")

        # Model and noise
        noise_scheduler = build_noise_scheduler(options)
        schedule = NoiseSchedule.from_scheduler(noise_scheduler)
        unet = build_unet(options, dataset.channels, dataset.resolution)
        num_parameters = sum(parameter.numel() for parameter in unet.parameters())

        # Timesteps: which to train on, and how much each example counts
        parts = method_parts(options)
        sampler = make_timestep_sampler(
            schedule,
            options.method,
            **parts,
            images=dataset.sample() if resolve_method(options.method, **parts).needs_images else None,
            low_discrepancy=options.low_discrepancy,
            seed=options.seed,
            device=device,
            **options.timestep_sampler_options,
        )
        if checkpoint:
            sampler.load_state_dict(state["sampler"])

        if accelerator.is_main_process:
            check_disk_space(options, num_parameters)
            if checkpoint:
                for path in discard_checkpoints_after(output_dir, step):
                    logger.warning(f"{path} is discarded: the run goes on from {checkpoint}")
            if options.overwrite_output_dir:
                delete_results(output_dir, options.logging_dir)
            save_options(options, output_dir / OPTIONS_FILE, NOT_SAVED)

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
        accelerator.load_state(str(checkpoint))
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
            state = {"step": step, "images": images_seen, "seconds": clock.report(), "processes": world_size}
            state |= {name: part.state_dict() for name, part in stateful.items()}
            save_checkpoint(accelerator, output_dir, step, state, options.checkpoints_total_limit)

    def save_model():
        with clock.phase("save"):
            pipeline = ema_pipeline(accelerator, unet, ema, noise_scheduler)
            if accelerator.is_main_process:
                save_pipeline(pipeline, output_dir)

    def save_samples(name):
        with clock.phase("preview"):
            pipeline = ema_pipeline(accelerator, unet, ema, noise_scheduler)
            if accelerator.is_main_process:
                pipeline = UnconditionalPipeline(pipeline.unet, pipeline.scheduler).to(device)
                pipeline.set_progress_bar_config(desc="sampling", leave=False)
                images = pipeline.sample(
                    range(options.eval_batch_size), options.seed, num_inference_steps=options.ddpm_num_inference_steps
                )
                log.save_grid(make_grid_image(images.cpu()), f"samples/{name}.png", step)
            accelerator.wait_for_everyone()

    def save_score():
        with clock.phase("eval"):
            score = evaluator.score(ema_pipeline(accelerator, unet, ema, noise_scheduler))
        log.write_score(step, images_seen, evaluator.name, score)

    if options.compile or device.type == "cuda":
        with clock.phase("warm_up"):
            image_shape = (dataset.channels, dataset.resolution, dataset.resolution)
            warm_up(accelerator, unet, sampler, image_shape, options.train_batch_size)

    log = TrainingLog(accelerator, options, max_steps, step, images_seen, clock)
    stop = StopCondition(accelerator, max_steps, options.max_train_seconds, clock)
    evaluation = Interval(accelerator, options.eval_steps, options.eval_seconds, clock)
    unet.train()
    with clock.phase("train"), one_line_errors(FloatingPointError, OSError, BadImage), closing(log):
        while (reason := stop.reason(step)) is None:
            update(step, next(batches))
            step += 1
            images_seen += images_per_step

            log.advance(step)
            if step % options.logging_steps == 0:
                log.write(step, images_seen, meter, guard, lr_scheduler, sampler)
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
    with one_line_errors(OSError):
        if reason == "signal" or options.checkpointing_steps:
            save_state()
        save_model()
        if reason != "signal":
            if step % options.logging_steps:
                log.write(step, images_seen, meter, guard, lr_scheduler, sampler, last=True)
            if options.eval_batch_size:
                save_samples("final")
        if accelerator.is_main_process:
            plot_timestep_density(log.path, output_dir / "timestep_density.png", schedule.num_train_timesteps)
            summary = log.summary(step, images_seen, num_parameters, reason, skipped_images=batches.skipped)
            write_model_card(options, summary, hub_repository)
            print_summary(options, summary)
        if hub_repository and reason != "signal":
            upload_to_hub(hub_repository, options)
    accelerator.end_training()


def warn_of_missing_processes():
    """`accelerate launch --cpu --num_processes 2` prepares an address for two processes, and starts one."""
    if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "accelerate launch started one process only; for several on a CPU, launch with "
            "--config_file accelerate_configs/cpu.yaml --num_processes N"
        )


def override_settings(optimizer, lr_scheduler, settings):
    """Let flags override what a checkpoint has brought of the optimiser's settings, and keep its state."""
    for group in optimizer.param_groups:
        group.update(settings, initial_lr=settings["lr"])
    lr_scheduler.base_lrs = [settings["lr"]] * len(lr_scheduler.lr_lambdas)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = settings["lr"] * factor(lr_scheduler.last_epoch)


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
