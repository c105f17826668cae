"""What a run leaves for people to read: its summary and its model card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .log import TrainingLog
from .machine import device_name, library_versions
from .models import method_of
from .options import TrainingOptions
from .output import SUMMARY_FILE, OutputDir
from .saving import replace_file, write_json
from .state import TrainingState


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
    folder = output.folder
    dataset = options.dataset_name
    on_hub = dataset != "digits" and not Path(dataset).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        datasets=[dataset] if on_hub else None,
        tags=["pytorch", "diffusers", "unconditional-image-generation", "adaptive-ddpm"],
    )
    name = repository or str(folder)
    parts = method_of(options)
    budget = ", ".join(
        f"{flag} {value}"
        for flag in ("max_train_seconds", "max_train_steps", "num_epochs")
        if (value := getattr(options, flag)) is not None
    )
    rows = {
        "data set": f"`{dataset}`, {options.resolution}×{options.resolution}: {describe_data(summary)}",
        "method": f"`{options.method}`: timesteps `{parts.timestep_sampler}`, loss weighting `{parts.loss_weighting}`, "
        f"error filter `{parts.error_filter}`",
        "budget": budget,
        "trained": f"{summary['steps']:,} steps, {summary['images']:,} images, {summary['seconds']['train']:,.0f} s",
        "parameters": f"{summary['parameters'] / 1e6:.1f} M",
        "weights": "exponential moving average" if options.use_ema else "last step",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    picture = "![samples](samples/final.png)\n" if (folder / "samples" / "final.png").exists() else ""
    has_validation = (folder / "validation_loss.png").exists()
    validation = "\n![validation loss by timestep](validation_loss.png)\n" if has_validation else ""
    text = f"""---
{data.to_yaml()}
---

# {Path(name).name}

An unconditional diffusion model, trained with adaptive-ddpm on `{dataset}`.

{picture}
```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{name}")
image = pipeline().images[0]
```

| | |
|---|---|
{table}

![timestep density](timestep_density.png)
{validation}
`training_options.yaml` repeats the run, into another folder:
`accelerate launch train_adaptive_ddpm.py --config training_options.yaml --output_dir OTHER_FOLDER`.
"""
    replace_file(output.path("README.md"), ModelCard(text).save)


def describe_data(summary: dict[str, Any]) -> str:
    """How many images there were, from how many files, and what was left out: a phrase."""
    data = summary["data"]
    phrase = f"{data['images']:,} images" + (f" of {data['files']:,} files" if data["files"] is not None else "")
    left_out = [f"{count:,} {reason}" for reason, count in data["left_out"].items()]
    return phrase + (f"; left out: {', '.join(left_out)}" if left_out else "")


def print_summary(options: TrainingOptions, summary: dict[str, Any]) -> None:
    """Where the time went, what there is now, and how to go on."""
    seconds = ", ".join(f"{phase.replace('_', '-')} {value:,.1f} s" for phase, value in summary["seconds"].items())
    print(f"{summary['steps']:,} steps, {summary['images']:,} images; {seconds}")
    print(f"data: {describe_data(summary)}")
    print(f'DDPMPipeline.from_pretrained("{options.output_dir}") loads the result')
    if summary["stopped_by"] == "signal":
        print(f"stopped by a signal; go on with --output_dir {options.output_dir} --resume_from_checkpoint latest")
    elif options.eval_batch_size:
        print(f"samples: {options.output_dir}/samples/final.png")
