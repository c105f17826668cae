"""The options of a training run: named, explained, and checked as far as that goes without data or network."""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from transformers.hf_argparser import HfArg

from recipes import JsonDict, check_ranges
from samplers import ERROR_FILTERS, LOSS_WEIGHTINGS, METHODS, NOISE_COUPLINGS, PARTS, TIMESTEP_SAMPLERS

from .dit import DEFAULT, PRESETS
from .output import FOLDERS

RANGES = {
    "seed": "[0, 2**32)",
    "resolution": "[1, 2**16]",
    "white_level": "(0, inf)",
    "dataloader_num_workers": "[0, 1024]",
    "ddpm_num_steps": "[2, 10**6]",
    "class_dropout": "[0, 1)",
    "max_train_steps": "[1, 2**53]",
    "num_epochs": "[1, 2**53]",
    "max_train_seconds": "(0, inf)",
    "train_batch_size": "[1, 2**24]",
    "gradient_accumulation_steps": "[1, 2**24]",
    "learning_rate": "(0, inf)",
    "lr_warmup_steps": "[0, 2**53]",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_weight_decay": "[0, inf)",
    "adam_epsilon": "(0, inf)",
    "max_grad_norm": "(0, inf]",
    "max_nonfinite_steps": "[1, 2**53]",
    "ema_inv_gamma": "(0, inf)",
    "ema_power": "(0, inf)",
    "ema_max_decay": "[0, 1)",
    "logging_steps": "[1, 2**53]",
    "eval_batch_size": "[0, 2**16]",
    "ddpm_num_inference_steps": "[1, 10**6]",
    "eval_steps": "[1, 2**53]",
    "eval_seconds": "(0, inf)",
    "eval_num_images": "[1, 2**32)",
    "eval_num_inference_steps": "[1, 10**6]",
    "validation_steps": "[1, 2**53]",
    "save_images_epochs": "[1, 2**53]",
    "save_model_epochs": "[1, 2**53]",
    "checkpointing_steps": "[0, 2**53]",
    "checkpoints_total_limit": "[0, 2**53]",
}


@dataclass
class RunOptions:
    """Where a run goes, and what its random numbers are."""

    _argument_group_name = "Run"

    config: str | None = HfArg(
        default=None, help="A recipe (YAML); flags override it; of digits, default: configs/digits.yaml. See configs/."
    )
    output_dir: str = HfArg(default="ddpm-model", help="Where the pipeline, samples, logs and checkpoints go.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Delete what an earlier run left in --output_dir; on resuming, what is later."
    )
    seed: int = HfArg(default=0, help="Of initial weights, data order, noise and timesteps.")
    dry_run: bool = HfArg(
        default=False, help="Prepare all, time three steps, say what would be trained, and leave the folder as it was."
    )


@dataclass
class DataOptions:
    """The images."""

    _argument_group_name = "Data"

    dataset_name: str = HfArg(
        default="digits",
        aliases=["--train_data_dir"],
        help="A Hub data set, a local folder or file (docs/training.md), or 'digits' (embedded).",
    )
    dataset_config_name: str | None = HfArg(default=None, help="The data set's configuration, if it has several.")
    image_column: str | None = HfArg(default=None, help="Needed only if the data set has several image columns.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    resolution: int | None = HfArg(
        default=None, help="Side of the square they are resized and cropped to; default: their own."
    )
    image_mode: Literal["auto", "RGB", "L"] = HfArg(default="auto", help="auto: grey (L) if all images are.")
    white_level: float | None = HfArg(
        default=None, help="White in grey images of floats or over 8 bits; default: 65535, for floats 1 or 255."
    )
    random_flip: bool = HfArg(default=False, help="Mirror half of the images, at random.")
    on_bad_image: Literal["error", "skip"] = HfArg(default="error", help="What to do about an unreadable image.")
    data_placement: Literal["auto", "device", "memory", "stream"] = HfArg(
        default="auto", help="Decoded images are kept on the GPU (device), in RAM (memory), or decoded anew (stream)."
    )
    dataloader_num_workers: int = HfArg(default=0, help="Processes that decode a streamed data set.")


@dataclass
class ModelOptions:
    """The network and its noise schedule."""

    _argument_group_name = "Model and noise"

    model: Literal[("unet", "dit", *PRESETS)] = HfArg(
        default="unet", help=f"A UNet2DModel, DDPM's; or a transformer; dit is {DEFAULT}."
    )
    model_config_name_or_path: str | None = HfArg(default=None, help="A saved network's config, in place of --model.")
    unet: JsonDict = field(default_factory=JsonDict, metadata={"help": "UNet2DModel settings, JSON; over the default."})
    dit: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "DiTTransformer2DModel settings, JSON; over the default."}
    )
    vae: str | None = HfArg(default=None, help="An AutoencoderKL's folder or Hub id: train in its latents.")
    latents_dir: str | None = HfArg(default=None, help="Where latents are kept; default: in the data sets' cache.")
    gradient_checkpointing: bool = HfArg(default=False, help="Less memory, for more time: the forward pass runs twice.")
    noise_scheduler: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "Further DDPMScheduler settings, JSON."}
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = HfArg(
        default="epsilon", help="What the network predicts: noise, v, or the image."
    )
    ddpm_num_steps: int = HfArg(default=1000, help="T, the timesteps of training.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = HfArg(
        default="linear", help="Of DDPMScheduler; squaredcos_cap_v2 is the cosine."
    )

    @property
    def is_dit(self) -> bool:
        """Whether the network is a transformer."""
        return self.model != "unet"


@dataclass
class ClassOptions:
    """Whether the network is told what it is to draw."""

    _argument_group_name = "Classes"

    class_conditional: bool = HfArg(default=False, help="Train on labels too, so that a class can be asked for.")
    label_column: str | None = HfArg(default=None, help="The column of labels; default: the one of type ClassLabel.")
    class_dropout: float = HfArg(default=0.1, help="Share of labels withheld, in [0, 1); guidance needs it.")

    @property
    def share_of_null_labels(self) -> float:
        """How often the null class stands for the label: always, in a network that is told no class."""
        return self.class_dropout if self.class_conditional else 1.0


@dataclass
class MethodOptions:
    """Which timesteps to train on, and how much each one counts."""

    _argument_group_name = "Method"

    method: Literal[tuple(METHODS)] = HfArg(
        default="adaptive", help="A name for the four parts below (docs/rivals.md)."
    )
    timestep_sampler: str | None = HfArg(default=None, help=f"Replaces the method's: {', '.join(TIMESTEP_SAMPLERS)}.")
    loss_weighting: str | None = HfArg(default=None, help=f"Replaces the method's: {', '.join(LOSS_WEIGHTINGS)}.")
    error_filter: str | None = HfArg(default=None, help=f"Replaces the method's: {', '.join(ERROR_FILTERS)}.")
    noise_coupling: str | None = HfArg(default=None, help=f"Replaces the method's: {', '.join(NOISE_COUPLINGS)}.")
    timestep_sampler_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": 'Arguments of sampler and noise coupling, JSON: {"k": 2} of speed.'}
    )
    loss_weighting_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": 'Those of the weighting, JSON: {"gamma": 1} of min_snr.'}
    )
    error_filter_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": 'Those of the filter, JSON: {"plain_fraction": 0.1} of wiener_ode.'}
    )
    low_discrepancy: bool = HfArg(
        default=True, help="Spread a batch's timesteps evenly over the density; false: independent draws."
    )


@dataclass
class BudgetOptions:
    """When to end."""

    _argument_group_name = "Budget: the first that is spent ends the run"

    max_train_steps: int | None = HfArg(default=None, help="Updates.")
    num_epochs: int | None = HfArg(default=None, help="Passes over the data; 100 if no budget is given at all.")
    max_train_seconds: float | None = HfArg(default=None, help="Wall-clock time of training proper.")

    def total_steps(self, steps_per_epoch: float) -> int | None:
        """Updates that the budget in steps or epochs allows; None where only time is limited."""
        by_epochs = math.ceil(self.num_epochs * steps_per_epoch) if self.num_epochs else None
        return min((steps for steps in (self.max_train_steps, by_epochs) if steps), default=None)


@dataclass
class OptimizationOptions:
    """How an update is made."""

    _argument_group_name = "Optimisation"

    train_batch_size: int = HfArg(default=16, help="Per process and accumulation step.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches per update.")
    learning_rate: float = HfArg(default=1e-4, help="After warm-up.")
    lr_scheduler: Literal[
        "constant_with_warmup", "constant", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = HfArg(default="constant_with_warmup", help="All but the constant ones fall over the budget, of steps or time.")
    lr_warmup_steps: int = HfArg(default=500, help="Updates of linear warm-up.")
    adam_beta1: float = HfArg(default=0.95, help="AdamW.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW.")
    adam_weight_decay: float = HfArg(default=1e-6, help="AdamW.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm; inf for no clipping.")
    max_nonfinite_steps: int = HfArg(default=50, help="Non-finite updates in a row at which to give up.")
    use_ema: bool = HfArg(default=True, help="Save an exponential moving average of the weights.")
    ema_inv_gamma: float = HfArg(default=18.0, help="The average's decay: 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = HfArg(default=1.0, help="The power in that formula.")
    ema_max_decay: float = HfArg(default=0.9999, help="The average's decay at most.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = HfArg(default=None, help="Default: accelerate's setting.")
    compile: bool = HfArg(default=False, help="torch.compile the network; compiled before the clock starts.")

    @property
    def images_per_process(self) -> int:
        """In an update."""
        return self.train_batch_size * self.gradient_accumulation_steps

    def check_warmup(self, max_steps: int) -> None:
        """Refuse a warm-up that diffusers' schedule of this name cannot have in a run of so many updates. Raises
        ValueError."""
        if self.lr_scheduler == "polynomial" and self.lr_warmup_steps >= max_steps:  # it divides by what is left
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: must be below the {max_steps} steps of a run by polynomial"
            )


@dataclass
class LogOptions:
    """What is written down, and how often."""

    _argument_group_name = "Log"

    logger: Literal["tensorboard", "wandb", "none"] = HfArg(default="tensorboard", help="Beside metrics.jsonl.")
    logging_dir: str = HfArg(default="logs", help="Under --output_dir.")
    logging_steps: int = HfArg(default=50, help="Updates between two records of the log.")


@dataclass
class SampleOptions:
    """The pictures during training and at its end."""

    _argument_group_name = "Sample grids"

    eval_batch_size: int = HfArg(default=16, help="Images in a sample grid; 0 for no grids.")
    ddpm_num_inference_steps: int | None = HfArg(default=None, help="Denoising steps for the grids; default: T.")
    save_images_epochs: int | None = HfArg(
        default=None, help="Epochs between two sample grids; default: one at the end alone."
    )


@dataclass
class ScoreOptions:
    """A Fréchet distance now and then."""

    _argument_group_name = "Scores of samples, during training"

    eval_steps: int | None = HfArg(default=None, help="Updates between two scores (FID) of samples; default: none.")
    eval_seconds: float | None = HfArg(default=None, help="Training seconds between two scores.")
    eval_num_images: int = HfArg(default=5000, help="Images drawn for a score.")
    eval_num_inference_steps: int | None = HfArg(default=None, help="Denoising steps for those; default: 50.")
    eval_feature_extractor: str | None = HfArg(default=None, help="As in evaluate.py; default: Inception.")
    eval_feature_extractor_weights: str | None = HfArg(default=None, help="A local file of Inception's weights.")


@dataclass
class ValidationOptions:
    """On what, and how often."""

    _argument_group_name = "Loss by timestep on held-out images"

    validation_split: str | None = HfArg(
        default=None, help="A split's name, or the share to hold out (0.05); needs --validation_steps; default: none."
    )
    validation_steps: int | None = HfArg(
        default=None, help="Updates between two measurements; needs --validation_split."
    )


@dataclass
class CheckpointOptions:
    """What is kept to go on from."""

    _argument_group_name = "Checkpoints"

    save_model_epochs: int | None = HfArg(
        default=None, help="Epochs between two saves of the pipeline; default: at the end alone."
    )
    checkpointing_steps: int = HfArg(default=2000, help="Updates between two checkpoints; 0: none but on a signal.")
    checkpoints_total_limit: int = HfArg(default=2, help="Checkpoints kept, the oldest are deleted; 0: all.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="'latest', or a checkpoint's path; what is later goes by --overwrite_output_dir."
    )


@dataclass
class HubOptions:
    """Where to upload."""

    _argument_group_name = "Hub"

    push_to_hub: bool = HfArg(default=False, help="Upload the results at the end.")
    hub_model_id: str | None = HfArg(default=None, help="Default: the name of --output_dir.")
    hub_token: str | None = HfArg(default=None, help="Default: the one you are logged in with.")
    hub_private_repo: bool = HfArg(default=False, help="Make the repository private.")


@dataclass
class TrainingOptions(
    RunOptions,
    DataOptions,
    ModelOptions,
    ClassOptions,
    MethodOptions,
    BudgetOptions,
    OptimizationOptions,
    LogOptions,
    SampleOptions,
    ScoreOptions,
    ValidationOptions,
    CheckpointOptions,
    HubOptions,
):
    """All of a run's, named as in diffusers' train_unconditional.py where that has them."""

    _recipe_block = "train"

    def __post_init__(self):
        check_ranges(self, RANGES)
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
        for name in ("output_dir", "dataset_name", "resume_from_checkpoint"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"--{name} {getattr(self, name)!r}: must not be empty")
        check_logging_dir(self.logging_dir)
        check_model(self)
        if self.logger == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("--logger wandb: wandb is not installed (pip install wandb)")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError(f"--learning_rate {self.learning_rate:g}: must be above 1e-7, to which polynomial falls")
        if self.max_train_steps:
            self.check_warmup(self.max_train_steps)
        check_validation(self.validation_split, self.validation_steps)
        if self.overwrite_output_dir and self.resume_from_checkpoint == "latest":
            raise ValueError(
                "--overwrite_output_dir would delete what --resume_from_checkpoint latest needs: give one of them"
            )
        if not (self.max_train_steps or self.num_epochs or self.max_train_seconds):
            self.num_epochs = 100

    @property
    def planned_num_steps(self) -> set[int]:
        """Numbers of denoising steps in which the run itself will sample."""
        return {self.ddpm_num_inference_steps, self.eval_num_inference_steps}


def check_model(options: ModelOptions) -> None:
    """Refuse an empty name, and a place for latents where there are none. Raises ValueError, naming the flag."""
    for name in ("vae", "latents_dir"):
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise ValueError(f"--{name} {getattr(options, name)!r}: must not be empty")
    if options.latents_dir and not options.vae:
        raise ValueError(f"--latents_dir {options.latents_dir}: needs --vae, whose latents they are")


def check_logging_dir(name: str) -> None:
    """Refuse what is not a folder of its own inside the output folder.

    Raises:
        ValueError: the output folder itself, one outside of it, or one that holds other results of the run.
    """
    parts = PurePosixPath(name).parts  # "./logs" is ("logs",), and "./" is ()
    if not parts or Path(name).is_absolute() or ".." in parts or not name.isprintable():
        raise ValueError(f"--logging_dir {name!r}: must be a folder inside --output_dir")
    if FOLDERS.fullmatch(parts[0]):
        raise ValueError(f"--logging_dir {name}: a run keeps other results under that name; choose another")


def check_validation(split: str | None, steps: int | None) -> None:
    """Refuse a part of the images without a number of steps or the reverse, and a share that is none.

    Raises:
        ValueError: naming the flag.
    """
    if (split is None) != (steps is None):
        missing, there = ("steps", f"split {split}") if steps is None else ("split", f"steps {steps}")
        raise ValueError(f"--validation_{there}: needs --validation_{missing} too")
    if split is not None and validation_share(split) is not None and not 0 < validation_share(split) < 1:
        raise ValueError(f"--validation_split {split}: must be a share in (0, 1), or the name of a split")


def validation_share(split: str) -> float | None:
    """The share of the images that `--validation_split` holds out; None where it names a split."""
    try:
        return float(split)
    except ValueError:
        return None
