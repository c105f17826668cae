"""A race of ways to draw the timesteps of flow matching, in equal time and in equal images: a table and a plot.

    python benchmarks/flow_matching.py --config configs/digits.yaml --output_dir runs/flow_matching/digits_unet \\
        --eval_num_images 640 --eval_feature_extractor runs/feature_extractor \\
        --max_train_seconds 100 --score_at_images 51200

It is a small loop (`loss_of` in flow_entrants.py), with this package as a user of it has it, and with the rivals' own
code where diffusers has it. Network, data and optimiser are a recipe's; the network predicts the velocity, eps - x_0,
whatever the recipe has for DDPM's process.
Its averaged weights are sampled by 50 steps of Euler's method: by the schedule that the run trained with ("own
schedule": all but shift_3 have the one without a shift), and at the end of each ladder by that of shift 3, too. Classes
are asked for equally often, and without guidance; in training none is withheld.

Runs take turns: all entrants with one seed, then all with the next. Each leaves a file in --output_dir. The same
command goes on with those that are missing or failed, and makes results.json, table.md and scores.png of all that are
there. The clock runs in training alone: making the sampler, with the spectrum of 512 images, and scoring are outside.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flow_entrants import Entrant, all_entrants, loss_of, sample_by_euler

from comparison.entrants import check_stops
from comparison.options import ComparisonOptions, Ladders
from comparison.plots import plot_scores
from comparison.results import NO_SETTINGS, RESULTS_FILE, check_same, check_same_extractor, join
from comparison.runs import Run, is_at_an_end, next_stops, stops_left, stops_passed
from comparison.summary import summarise, table
from images import check_output_outside_data, normalize
from pipelines import Network, choose_kernels, null_label
from pipelines.noise import image_generators, noise_maps
from progress import progress_bar
from recipes import one_line_errors, parse_options, plain_values
from samplers import __version__, make_timestep_sampler
from training.clock import PhaseClock
from training.data import labels_of, open_training_data
from training.ema import WeightAverage
from training.evaluation import Evaluator
from training.folder_lock import folder_lock
from training.machine import code_commit, device_name, library_versions, this_command
from training.network import build_network
from training.nonfinite import check_finite
from training.optimizer import build_optimizer
from training.options import HubOptions, LogOptions, MethodOptions, TrainingOptions, ValidationOptions
from training.saving import read_json, replace_file, write_json
from training.state import build_average

OWN = "own schedule"
SAMPLERS = {OWN: None, "shift 3": 3.0}  # the shift of the schedule; None for that of training
# Of training, and without a meaning here
NOT_OURS = (
    *(option.name for group in (MethodOptions, LogOptions, ValidationOptions, HubOptions) for option in fields(group)),
    *("seed", "dry_run", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps", "num_epochs"),
    *("vae", "latents_dir", "noise_scheduler", "prediction_type", "ddpm_num_steps", "ddpm_beta_schedule"),
    *("on_bad_image", "class_dropout", "gradient_accumulation_steps", "mixed_precision", "compile", "use_ema"),
)


@dataclass
class RaceOptions:
    """Who takes part, and where runs are scored. Of the flags of training, those are refused that the race decides."""

    _argument_group_name = "Race"

    entrants: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of {', '.join(all_entrants(1, class_conditional=True))}; default: all."},
    )
    seeds: list[int] = field(default_factory=lambda: [1000, 1001, 1002], metadata={"help": "Runs of each."})
    score_at: list[float] = field(default_factory=lambda: [0.5, 1.0], metadata={"help": "As in compare.py."})
    score_at_images: list[int] = field(
        default_factory=list,
        metadata={"help": "Required; as in compare.py. Curriculum's schedule is fitted to the last."},
    )
    stop_after: float | None = HfArg(default=None, help="Seconds after which to begin no run but the first.")


@dataclass
class FlowMatchingOptions(TrainingOptions, RaceOptions):
    """Those of training, and those of the race."""

    @property
    def ladders(self) -> Ladders:
        """Where each run stops to be scored. Raises ValueError where compare.py does."""
        names = ("output_dir", "seeds", "max_train_seconds", "score_at", "score_at_images", "stop_after")
        return ComparisonOptions(**{name: getattr(self, name) for name in names}).ladders


def main(options: FlowMatchingOptions) -> None:
    begun = time.monotonic()
    with one_line_errors(ValueError, OSError):
        entrants = entrants_of(options)
        check_output_outside_data(options.output_dir, options.dataset_name)
        dataset, _ = open_training_data(options)
        print(dataset.describe())
        evaluator = Evaluator(options, dataset, PartialState(), options.seed, options.train_batch_size)
        with folder_lock(options.output_dir):
            race(options, entrants, evaluator, begun)


def entrants_of(options: FlowMatchingOptions) -> dict[str, Entrant]:
    """{name: entrant} of those that take part.

    Raises:
        ValueError: an option that the race decides, an entrant that there is not, or no stop in images.
    """
    plain = TrainingOptions()
    for name in set(NOT_OURS) - {"prediction_type"}:  # recipes have one, for DDPM's process
        if getattr(options, name) not in (getattr(plain, name), None):
            raise ValueError(f"--{name} {getattr(options, name)}: is not for this race")
    if not options.score_at_images:
        raise ValueError("--score_at_images is required (--help lists the flags)")
    if not options.lr_scheduler.startswith("constant"):
        raise ValueError(f"--lr_scheduler {options.lr_scheduler}: must be constant in this race")
    check_stops(options, options)
    known = all_entrants(options.score_at_images[-1] // options.train_batch_size, options.class_conditional)
    for name in options.entrants:
        if name not in known:
            raise ValueError(f"--entrants {name}: must be of {', '.join(known)}")
    return {name: known[name] for name in options.entrants or known}


def race(options: FlowMatchingOptions, entrants: dict[str, Entrant], evaluator: Evaluator, begun: float) -> None:
    """Make the runs that are missing in the folder, and report all."""
    folder, now = Path(options.output_dir), record_of(options, entrants, evaluator)
    done = set()
    for file, other in records_in(folder).items():
        check_same(f"--output_dir {file}", other, now)
        check_same_extractor(f"--output_dir {file}", other, now["feature_extractor"])
        if other["data"] != now["data"]:
            raise ValueError(f"--output_dir {file}: its data are {other['data']}, not {now['data']}")
        if other["commits"] != now["commits"]:
            print(
                f"{file}: by commit {', '.join(map(str, other['commits']))}, not {now['commits'][0]}", file=sys.stderr
            )
        done |= {(run["entrant"], run["seed"]) for run in other["runs"].values() if "failed" not in run}
    turns = [(name, seed) for seed in options.seeds for name in entrants]
    missing = [turn for turn in turns if turn not in done]
    data = None
    for number, (name, seed) in enumerate(progress_bar(missing, unit="run")):
        if number and options.stop_after is not None and time.monotonic() - begun > options.stop_after:
            return print(f"{len(missing) - number} of {len(turns)} runs are left; the same command goes on")
        data = data or (evaluator.dataset.decode_all(), labels_of(options, evaluator.dataset))  # once, for all runs
        run = run_of(name, entrants[name], seed, options, data, evaluator)
        write_json({**now, "runs": {f"{name}-seed{seed}": run}}, folder / file_of(name, seed))
    report(folder)


def file_of(name: str, seed: int) -> str:
    return f"{name}-seed{seed}.json"


def records_in(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: its record} of the runs that are finished, the first seed's first."""
    files = sorted(folder.glob("*-seed*.json"), key=lambda file: file.stem.rpartition("-seed")[::-1])
    return {str(file): read_json(file) for file in files}


def record_of(options: FlowMatchingOptions, entrants: dict[str, Entrant], evaluator: Evaluator) -> dict[str, Any]:
    """What a record has beside its run, as compare.py's results.json has it."""
    not_settings = (*NO_SETTINGS, *NOT_OURS, *(option.name for option in fields(RaceOptions)))
    return {
        "commands": [this_command()],
        "settings": {
            "ladders": options.ladders,
            "score_samplers": list(SAMPLERS),
            **plain_values(options, not_settings),
        },
        "device": device_name(evaluator.device),
        "versions": [{**library_versions(), "adaptive_timesteps": __version__}],
        "commits": [code_commit()],
        "entrants": {name: {"options": entrant._asdict(), "parts": {}} for name, entrant in entrants.items()},
        "baseline": "uniform",
        "score": evaluator.name,
        "feature_extractor": evaluator.feature_extractor,
        "data": evaluator.dataset.contents(),
    }


def run_of(
    name: str,
    entrant: Entrant,
    seed: int,
    options: FlowMatchingOptions,
    data: tuple[torch.Tensor, torch.Tensor],
    evaluator: Evaluator,
) -> Run:
    """Train a run, and score it at each stop of the ladders; it ends where weights or images are not finite.

    Args:
        data: uint8 [N, C, H, W] all images, and [N] their labels.
    """
    device, dataset, ladders = evaluator.device, evaluator.dataset, options.ladders
    torch.manual_seed(seed)
    classes = len(dataset.classes) if options.class_conditional else None
    network = build_network(options, dataset.channels, dataset.resolution, classes).to(device)
    choose_kernels(network, device, "no", compiled=False)
    ema = build_average(options, network)
    scheduler, sampler = FlowMatchEulerDiscreteScheduler(shift=entrant.shift), None
    if entrant.sampler:
        sampler = make_timestep_sampler(scheduler, images=dataset.sample(), seed=seed, device=device, **entrant.sampler)
    loss = partial(loss_of, network, scheduler, entrant, sampler)
    update = make_update(network, ema, loss, options, batches_of(*data, options.train_batch_size, seed))
    if device.type == "cuda":
        warm_up(network, options.train_batch_size)

    run, clock, images, clipped = {"entrant": name, "seed": seed, "scores": []}, PhaseClock(device), 0, 0
    while stops_left(run, ladders):
        seconds_stop, images_stop = (stop or math.inf for stop in next_stops(run, ladders).values())
        with clock.phase("train"):
            while clock.seconds("train") < seconds_stop and images < images_stop:
                clipped += update() > options.max_grad_norm
                images += options.train_batch_size
        steps = images // options.train_batch_size
        trained = {"seconds": round(clock.seconds("train"), 3), "steps": steps, "images": images}
        passed = stops_passed(run, ladders, trained)
        samplers = SAMPLERS if is_at_an_end(passed, ladders) else [OWN]
        try:
            check_finite(ema.shadow_params, "averaged weights")
            with clock.phase("score"):
                scores = {by: score(network, ema, SAMPLERS[by] or entrant.shift, evaluator) for by in samplers}
        except FloatingPointError as error:
            return {**run, "failed": str(error)}
        run["scores"].append({"reached": passed, **trained, "commit": code_commit(), "scores": scores})
    return {**run, "clipped": float(clipped) / steps, "seconds_of_scoring": clock.report()["score"]}


def batches_of(
    images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of images and their labels, in a random order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for indices in order[: len(order) // batch_size * batch_size].split(batch_size):
            yield images.index_select(0, indices), labels[indices]


def make_update(
    network: Network,
    ema: WeightAverage,
    loss: Callable[..., torch.Tensor],
    options: FlowMatchingOptions,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], torch.Tensor]:
    """A function that makes the next update, by a loss of (images, labels), and returns its gradient's norm."""
    device, knows_classes = network.device, null_label(network.config) is not None
    optimizer, lr_scheduler = build_optimizer(options, network)

    def update() -> torch.Tensor:
        images, labels = (part.to(device) for part in next(batches))
        flips = torch.rand(len(images), device=device) < 0.5 if options.random_flip else None
        loss(normalize(images, flips), labels if knows_classes else None).backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(network.parameters())
        return norm

    return update


def warm_up(network: Network, batch_size: int) -> None:
    """What a GPU takes longer for in a first step, over before the clock starts; random states stay as they are."""
    config, device = network.config, network.device
    with torch.random.fork_rng(devices=[device]):
        for _ in range(2):
            x = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, device=device)
            labels = None if null_label(config) is None else torch.zeros(batch_size, dtype=torch.long, device=device)
            network(x, x.new_zeros(batch_size), class_labels=labels).sample.mean().backward()
    network.zero_grad()


def score(network: Network, ema: WeightAverage, shift: float, evaluator: Evaluator) -> float:
    """The Fréchet distance of images by the averaged weights; their first noise is the same for all runs."""
    options, device, config = evaluator.options, evaluator.device, network.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    num_classes = len(evaluator.dataset.classes) if options.class_conditional else 1

    def draw(indices: range) -> torch.Tensor:
        noise = next(noise_maps(image_generators(evaluator.seed, indices, device), shape, 1, device))
        labels = None if null_label(config) is None else torch.tensor(indices, device=device) % num_classes
        return sample_by_euler(network, shift, options.eval_num_inference_steps or 50, noise, labels)

    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    network.eval()
    distance = evaluator.score_of(draw)
    network.train()
    ema.restore(network.parameters())
    return distance


def report(folder: Path) -> None:
    """Write results.json, table.md and scores.png of all records in a folder."""
    (_, results), *others = records_in(folder).items()
    join(results, dict(others))
    write_json(results, folder / RESULTS_FILE)
    entrants = summarise(results)
    text = table(results, entrants)
    replace_file(folder / "table.md", lambda path: path.write_text(text))
    replace_file(folder / "scores.png", lambda path: plot_scores(results["score"], entrants, path))
    print(text)


if __name__ == "__main__":
    main(parse_options(FlowMatchingOptions))
