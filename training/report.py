"""What a run leaves for people to read: its summary and its model card."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from images import counted
from pipelines import ClassConditionalPipeline, pipeline_class

from .dit import NUM_LABELS
from .log import TrainingLog
from .machine import device_name, library_versions
from .methods import flags_of_parts, method_of
from .network import network_class
from .options import BudgetOptions, TrainingOptions
from .output import SUMMARY_FILE, OutputDir
from .saving import replace_file, write_json
from .state import TrainingState

MOST_CLASSES = 1000  # that a card lists


def write_summary(
    state: TrainingState, log: TrainingLog, stop_reason: str, data: dict[str, Any], skipped_images: int
) -> dict[str, Any]:
    """Write `training_summary.json`, and return it.

    Args:
        stop_reason: why the run ended.
        data: what `ImageDataset.contents` says of the images.
        skipped_images: of them, found unreadable.
    """
    summary = {
        "steps": state.step,
        "images": state.images,
        "parameters": state.num_parameters,
        "stopped_by": stop_reason,
        "seconds": state.clock.report(),
        "loss": log.last_record.get("loss"),
        "skipped_updates": log.last_record.get("skipped_updates"),
        "skipped_images": skipped_images,
        "data": data,
        "processes": state.accelerator.num_processes,
        "device": device_name(state.accelerator.device),
        "mixed_precision": state.accelerator.mixed_precision,
        "versions": library_versions(),
    }
    write_json(summary, log.output.path(SUMMARY_FILE))
    return summary


def write_model_card(
    options: TrainingOptions, output: OutputDir, summary: dict[str, Any], repository: str | None = None
) -> None:
    """Write `README.md`: what the model was trained on and how, a sample grid, and how to load it.

    Args:
        options: the run's resolved options.
        output: the run's `OutputDir`.
        summary: of `write_summary`.
        repository: on the Hub, where the card is going; by default, it tells how to load the folder.
    """
    name = repository or str(output.folder)
    kind = "A class-conditional" if options.class_conditional else "An unconditional"
    text = f"""---
{card_metadata(options).to_yaml()}
---

# {Path(name).name}

{kind} diffusion model, trained with adaptive-ddpm on `{options.dataset_name}`.

{picture(output, "samples", "samples/final.png")}
{card_usage(options, summary, name)}

| | |
|---|---|
{card_table(options, summary)}

{picture(output, "timestep density", "timestep_density.png")}
{picture(output, "validation loss by timestep", "validation_loss.png")}
`training_options.yaml` repeats the run, into another folder:
`accelerate launch train_adaptive_ddpm.py --config training_options.yaml --output_dir OTHER_FOLDER`.
"""
    replace_file(output.path("README.md"), ModelCard(text).save)


def card_metadata(options: TrainingOptions) -> ModelCardData:
    """What the Hub files a model under."""
    on_hub = options.dataset_name != "digits" and not Path(options.dataset_name).exists()
    kind = "class-conditional-image-generation" if options.class_conditional else "unconditional-image-generation"
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=None if options.class_conditional else kind,  # the Hub has none for classes
        datasets=[options.dataset_name] if on_hub else None,
        tags=["pytorch", "diffusers", kind, "adaptive-ddpm"],
    )


def loading_call(options: TrainingOptions, name: str) -> tuple[str, str]:
    """(Class, call) by which diffusers loads the pipeline of that name."""
    kind = pipeline_class(network_class(options), bool(options.vae), options.class_conditional)
    if kind is ClassConditionalPipeline:
        return "DiffusionPipeline", f'DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)'
    return kind.__name__, f'{kind.__name__}.from_pretrained("{name}")'


def card_usage(options: TrainingOptions, summary: dict[str, Any], name: str) -> str:
    """How to load the model, and what may be asked of it, in Markdown."""
    kind, call = loading_call(options, name)
    comment = "  # runs pipeline.py" if kind == "DiffusionPipeline" else ""
    classes = summary["data"]["classes"] if options.class_conditional else None
    if classes:
        label = json.dumps(classes[0].split(",")[0].strip(), ensure_ascii=False)
        arguments = f"pipeline.get_label_ids([{label}]), guidance_scale=1.5"
    elif options.is_dit:
        arguments = f"[{NUM_LABELS}], guidance_scale=1"  # its null class alone
    else:
        arguments = ""
    usage = f"""```python
from diffusers import {kind}

pipeline = {call}{comment}
image = pipeline({arguments}).images[0]
```"""
    if not options.vae and kind == "DDPMPipeline":
        usage += "\n\nIn a `DDIMPipeline` it needs `use_clipped_model_output=True`."
    if not classes:
        return usage
    return f"{usage}\n\nClasses: {', '.join(classes[:MOST_CLASSES])}{', ...' if len(classes) > MOST_CLASSES else '.'}"


def card_table(options: TrainingOptions, summary: dict[str, Any]) -> str:
    """How a model was trained: rows of a table in Markdown."""
    method = method_of(options)
    budgets = {name: getattr(options, name) for name in ("max_train_seconds", "max_train_steps", "num_epochs")}
    rows = {
        "data set": f"`{options.dataset_name}`, {options.resolution}×{options.resolution}: {describe_data(summary)}",
        "method": f"`{options.method}`: timesteps `{method.timestep_sampler}`, "
        f"loss weighting `{method.loss_weighting}`, error filter `{method.error_filter}`, "
        f"noise `{method.noise_coupling}`" + "".join(f"; `{flag}`" for flag in flags_of_parts(options)),
        "budget": ", ".join(f"{name} {value}" for name, value in budgets.items() if value is not None),
        "trained": f"{summary['steps']:,} steps, {summary['images']:,} images, {summary['seconds']['train']:,.0f} s",
        "network": f"{network_class(options).__name__}, {summary['parameters'] / 1e6:.1f} M parameters"
        + (f", in the latents of `{options.vae}`" if options.vae else ""),
        "weights": "exponential moving average" if options.use_ema else "last step",
    }
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def picture(output: OutputDir, title: str, name: str) -> str:
    """A picture of the run in Markdown, and an empty line; nothing where it has none of that name."""
    return f"![{title}]({name})\n" if (output.folder / name).exists() else ""


def describe_data(summary: dict[str, Any]) -> str:
    """How many images there were, from how many files, and what was left out: a phrase."""
    data = summary["data"]
    phrase = counted(data["images"], "image")
    if data["files"] is not None:
        phrase += f" of {counted(data['files'], 'file')}"
    left_out = [counted(count, reason) for reason, count in data["left_out"].items()]
    return phrase + (f"; left out: {', '.join(left_out)}" if left_out else "")


def print_summary(options: TrainingOptions, summary: dict[str, Any]) -> None:
    """Where the time went, what there is now, and how to go on."""
    seconds = ", ".join(f"{phase.replace('_', '-')} {value:,.1f} s" for phase, value in summary["seconds"].items())
    print(f"{summary['steps']:,} steps, {summary['images']:,} images; {seconds}")
    print(f"data: {describe_data(summary)}")
    if ended_by := first_of_budgets(options, summary):
        print(ended_by)
    print(f"{loading_call(options, options.output_dir)[1]} loads the result")
    if summary["stopped_by"] == "signal":
        without = " in place of --overwrite_output_dir" if options.overwrite_output_dir else ""
        print(f"stopped by a signal; the same command with --resume_from_checkpoint latest{without} goes on")
    elif options.eval_batch_size:
        print(f"samples: {options.output_dir}/samples/final.png")


def first_of_budgets(options: BudgetOptions, summary: dict[str, Any]) -> str | None:
    """Which of several budgets has ended a run, of those of its last start; None of one budget, and of a signal."""
    reason, steps = summary["stopped_by"], options.max_train_steps
    budgets = ("max_train_seconds", "max_train_steps", "num_epochs")
    given = {name: f"--{name} {value:,.10g}" for name in budgets if (value := getattr(options, name))}
    by_steps = "max_train_steps" if steps and summary["steps"] >= steps else "num_epochs"
    first = {"seconds": "max_train_seconds", "steps": by_steps}.get(reason)
    if len(given) < 2 or first not in given:
        return None
    return f"ended by {given.pop(first)}; given too: {', '.join(given.values())}"
