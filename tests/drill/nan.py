"""NaN and infinity in weights, average or loss: no run ends well with them, and none overwrites good with bad."""

import functools
import re

import test_resuming
import torch
from harness import RESUME, Case, Failed, Starts, bound, check_refusal, check_same_run, scaled
from safetensors.torch import load_file

from training.checkpoints import checkpoint_damage, list_checkpoints
from training.denoiser import Denoiser

NUM = 20
LAST_STEPS = (24, 23, 22, 19)  # after the last, only the saving can still find out
KINDS = ("weights", "average", "loss", "all losses")


def cases(drill):
    """Kinds in turn; some begin anew, most go on from a run that is whole and has a pipeline."""
    count = scaled(NUM, drill.scale)
    steps = [*LAST_STEPS * 2, *(drill.rng.randint(1, 24) for _ in range(NUM))]
    trials = [(KINDS[i % 3 if i % 7 else 3], steps[i], "nan" if i % 3 else "inf") for i in range(count)]
    return [
        Case(f"{i}: {value} in the {kind} at step {step}", bound(train_poisoned, drill.references, kind, step, value))
        for i, (kind, step, value) in enumerate(trials)
    ]


def train_poisoned(folder, rng, references, kind, step, value):
    run = folder / "run"
    resumes = step > 12
    if resumes:
        references.copy("twelve", run)
    tamper = functools.partial(poison, kind=kind, call=step - 12 if resumes else step, value=float(value))
    with Starts() as starts:
        start = starts.train(run, *(RESUME if resumes else []), tamper=tamper).wait(None)
        check_all_finite(run)
        if start.process.exitcode == 0:
            if not (run / "model_index.json").exists():
                raise Failed("exit status 0 without a pipeline", start.output)
            return
        check_refusal(start)
        check_names_last_good(start, run)
        starts.train(run, *RESUME).wait()
    check_same_run(run, references.get("plain"))


def check_names_last_good(start, run):
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return
    good = checkpoints[-1][1].name
    if not re.search(rf"{good}\b", start.lines[-1]):
        raise Failed("the last good checkpoint is not named", f"{good} not in: {start.lines[-1]}")


def check_all_finite(run):
    """Pipeline and checkpoints are whole, and all their weights and averages finite; the pipeline of old is there."""
    for _, checkpoint in list_checkpoints(run):
        if damage := checkpoint_damage(checkpoint):
            raise Failed("a checkpoint is damaged", f"{checkpoint.name}: {damage}")
        for file in checkpoint.iterdir():
            if file.name == "model.safetensors" or file.name.startswith("custom_checkpoint"):
                check_finite(file, run)
    pipeline = run / "unet" / "diffusion_pytorch_model.safetensors"
    if pipeline.exists():
        check_finite(pipeline, run)


def check_finite(file, run):
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=False)
    if not all(torch.isfinite(tensor).all() for tensor in tensors_in(weights)):
        raise Failed(f"{'a pipeline' if file.parent.name == 'unet' else 'a checkpoint'} that is not finite",
                     file.relative_to(run))  # fmt: skip


def tensors_in(value):
    """All tensors in nested values."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


# Tampers


def poison(script, kind, call, value):
    """Put a value into the weights, or their average, in the `call`-th step of this start; or NaN into its loss (and
    into all later ones)."""
    if kind == "average":
        poison_average(call, value)
    elif kind == "weights":
        poison_weights(script, call, value)
    else:
        steps = {call - 1} if kind == "loss" else range(call - 1, 10**6)
        test_resuming.poison(script, steps)


def poison_average(call, value):
    from training.ema import WeightAverage

    original, calls = WeightAverage.step, iter(range(1, 10**6))

    def step(self, parameters):
        original(self, parameters)
        if next(calls) == call:
            self.shadow_params[0].fill_(value)

    WeightAverage.step = step


def poison_weights(script, call, value):
    """In the forward pass, behind its back: the step's own loss and gradient are still finite."""
    original, calls = Denoiser.epsilon_errors, iter(range(1, 10**6))

    def errors_of(self, *args):
        errors = original(self, *args)
        if next(calls) == call:
            next(self.network.parameters()).data[..., 0] = value
        return errors

    Denoiser.epsilon_errors = errors_of
