"""Which timesteps the error of the samples comes from: two models of one run, weak and strong, swapped by segment.

    python benchmarks/swap_test.py --weak runs/a/at-50000 --strong runs/a/at-100000 --dataset_name uoft-cs/cifar10 \\
        --output_json swap.json

Samples are drawn with the weak model everywhere except in one segment of timesteps, where the strong one predicts; the
share of the Fréchet distance between the two that this gains says how much the segment matters at that stage of
training. Segments interact, so shares need not add up to one. Beside it, from the same images and noise for both
models, what became of the epsilon-loss in the segment: its relative fall, and its fall integrated over log sigma (the
share of the likelihood bound that was gained there).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMPipeline
from tqdm.auto import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from images import normalize, open_images
from recipes import one_line_errors
from samplers import NoiseSchedule, fold_seed
from training.denoiser import Denoiser
from training.evaluation import Evaluator
from training.machine import device_name, this_command
from training.saving import write_json


@dataclass
class SwapOptions:
    """Options of benchmarks/swap_test.py."""

    weak: str = field(metadata={"help": "DDPMPipeline of early in a run: folder or Hub id."})
    strong: str = field(metadata={"help": "DDPMPipeline of later in the run."})
    output_json: str = field(metadata={"help": "New file of the measurements."})
    dataset_name: str = field(default="digits", metadata={"help": "As in training."})
    boundaries: list[int] = field(
        default_factory=lambda: [0, 50, 150, 300, 500, 700, 1000], metadata={"help": "Of the segments of timesteps."}
    )
    probe_images: int = field(default=16, metadata={"help": "Images a timestep for the losses, at every tenth t."})
    # As in the training script
    eval_num_images: int = 1500
    eval_num_inference_steps: int = 50
    eval_feature_extractor: str | None = None
    eval_feature_extractor_weights: str | None = None
    train_batch_size: int = 64
    seed: int = 0


class SwappedUNet(torch.nn.Module):
    """Predicts as `strong` does at low <= t < high, and as `weak` does elsewhere."""

    def __init__(self, weak, strong, low, high):
        super().__init__()
        self.weak, self.strong, self.low, self.high = weak, strong, low, high
        self.config, self.dtype, self.device = weak.config, weak.dtype, weak.device

    def forward(self, x, timesteps, class_labels=None):
        is_strong = self.low <= timesteps[0] < self.high  # all of a batch are at the same
        return (self.strong if is_strong else self.weak)(x, timesteps, class_labels)


def main(options):
    with one_line_errors(ValueError):
        check_new_record(options.output_json)
    state = PartialState()
    weak, strong = (DDPMPipeline.from_pretrained(path).to(state.device) for path in (options.weak, options.strong))
    dataset = open_images(options.dataset_name, resolution=weak.unet.config.sample_size)
    evaluator = Evaluator(options, dataset, state, options.seed, options.train_batch_size)
    segments = list(zip(options.boundaries, options.boundaries[1:], strict=False))
    losses = {name: probe_losses(pipeline, dataset, options) for name, pipeline in (("weak", weak), ("strong", strong))}
    fall = losses["weak"] - losses["strong"]
    nats = fall * torch.gradient(NoiseSchedule.from_scheduler(weak.scheduler).sigma.log()[::10])[0]

    scores = {}
    for low, high in tqdm([(0, 0), (0, options.boundaries[-1]), *segments], unit="chain"):
        swapped = DDPMPipeline(SwappedUNet(weak.unet, strong.unet, low, high), weak.scheduler)
        scores[low, high] = evaluator.score(swapped)
    weak_score, strong_score = scores.pop((0, 0)), scores.pop((0, options.boundaries[-1]))
    rows = []
    for (low, high), score in scores.items():
        segment = slice(low // 10, high // 10)
        rows.append(
            {
                "segment": [low, high],
                "share_of_gain": (weak_score - score) / (weak_score - strong_score),
                "relative_fall_of_loss": (fall[segment].sum() / losses["weak"][segment].sum()).item(),
                "share_of_nats": (nats[segment].sum() / nats.sum()).item(),
            }
        )
    results = {"score": evaluator.name, "weak": weak_score, "strong": strong_score, "segments": rows}
    results |= {"seed": options.seed, "device": device_name(state.device), "command": this_command()}
    write_json(results, Path(options.output_json))
    print(f"{evaluator.name}: {weak_score:.3f} -> {strong_score:.3f}")
    for row in rows:
        print(row["segment"], *(f"{name} {value:.1%} " for name, value in row.items() if name != "segment"))


@torch.no_grad()
def probe_losses(pipeline, dataset, options):
    """[T / 10] mean epsilon-losses at every tenth timestep; the same images and noise for every model."""
    scheduler, device = pipeline.scheduler, pipeline.device
    denoiser, losses = Denoiser(pipeline.unet, scheduler, device), []
    for t in tqdm(range(0, scheduler.config.num_train_timesteps, 10), unit="t", leave=False):
        generator = torch.Generator().manual_seed(fold_seed(options.seed, t))
        chosen = torch.randint(len(dataset), (options.probe_images,), generator=generator).tolist()
        images = normalize(torch.stack([dataset[i] for i in chosen]))
        noise = torch.randn(images.shape, generator=generator).to(device)
        timesteps = torch.full((options.probe_images,), t, device=device)
        errors = denoiser.epsilon_errors(images.to(device), noise, timesteps)
        losses.append(errors.square().mean())
    return torch.stack(losses).cpu()


if __name__ == "__main__":
    main(HfArgumentParser(SwapOptions).parse_args_into_dataclasses()[0])
