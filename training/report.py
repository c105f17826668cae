"""What a run leaves for people to look at: the plot of its timestep density, and its model card."""

import glob
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder, whoami
from huggingface_hub.utils import validate_repo_id
from matplotlib.colors import Normalize

from samplers import resolve_method

from .metrics import NUM_BINS, read_metrics
from .models import method_parts
from .saving import replace_file

matplotlib.use("agg")


def plot_timestep_density(metrics_path, image_path, num_train_timesteps):
    """Draw p_t, w_t and their product over training, from the records of `metrics.jsonl` that have them."""
    num_bins = min(NUM_BINS, num_train_timesteps)
    records = [record for record in read_metrics(metrics_path) if has_tables(record, num_bins)]
    if not records:
        return
    panels = [
        ("$T p_t$: how often, against uniform", lambda r: [p * num_train_timesteps for p in r["density"]]),
        ("$w_t$: how much each counts", lambda r: r["weight"]),
        (
            "$T p_t w_t$: the objective",
            lambda r: [num_train_timesteps * p * w for p, w in zip(r["density"], r["weight"], strict=True)],
        ),
    ]
    middles = [(i + 0.5) * num_train_timesteps / num_bins for i in range(num_bins)]
    colors = plt.get_cmap("viridis")
    scale = Normalize(records[0]["step"], max(records[-1]["step"], records[0]["step"] + 1))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        for record in records[:: max(1, len(records) // 60)]:
            axis.plot(middles, values(record), color=colors(scale(record["step"])), linewidth=1.2)
        axis.set(title=title, xlabel="timestep $t$", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.colorbar(plt.cm.ScalarMappable(scale, colors), ax=axes, label="training step", pad=0.01)
    figure.savefig(image_path, dpi=110)
    plt.close(figure)


def has_tables(record, num_bins):
    """Whether a record has the sampler's tables, whole: a line of the log may be damaged and still be JSON."""
    tables = record.get("density"), record.get("weight")
    return all(isinstance(table, list) and len(table) == num_bins for table in tables)


def write_model_card(options, output, summary, repository=None):
    """Write `README.md`: what the model was trained on and how, a sample grid, and how to load it.

    Args:
        options: the run's resolved options.
        output: the run's `OutputDir`.
        summary: of `TrainingLog.summary`.
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
    parts = resolve_method(options.method, **method_parts(options))
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

`training_options.yaml` repeats the run, into another folder:
`accelerate launch train_adaptive_ddpm.py --config training_options.yaml --output_dir OTHER_FOLDER`.
"""
    replace_file(output.path("README.md"), ModelCard(text).save)


def describe_data(summary):
    """How many images there were, from how many files, and what was left out: a phrase."""
    data = summary["data"]
    phrase = f"{data['images']:,} images" + (f" of {data['files']:,} files" if data["files"] is not None else "")
    left_out = [f"{count:,} {reason}" for reason, count in data["left_out"].items()]
    return phrase + (f"; left out: {', '.join(left_out)}" if left_out else "")


def print_summary(options, summary):
    """Where the time went, what there is now, and how to go on."""
    seconds = ", ".join(f"{phase.replace('_', '-')} {value:,.1f} s" for phase, value in summary["seconds"].items())
    print(f"{summary['steps']:,} steps, {summary['images']:,} images; {seconds}")
    print(f"data: {describe_data(summary)}")
    print(f'DDPMPipeline.from_pretrained("{options.output_dir}") loads the result')
    if summary["stopped_by"] == "signal":
        print(f"stopped by a signal; go on with --output_dir {options.output_dir} --resume_from_checkpoint latest")
    elif options.eval_batch_size:
        print(f"samples: {options.output_dir}/samples/final.png")


def hub_name(options):
    """The name to upload under."""
    return options.hub_model_id or Path(options.output_dir).resolve().name


def check_hub_repository(options):
    """Find out before any work whether there is a valid token and name. Raises ValueError."""
    with named_hub_errors(options):
        validate_repo_id(hub_name(options))
        whoami(token=options.hub_token)


def create_hub_repository(options):
    """Create the Hub repository when training begins. Returns its id."""
    with named_hub_errors(options):
        name, private = hub_name(options), options.hub_private_repo
        return create_repo(name, private=private, token=options.hub_token, exist_ok=True).repo_id


def upload_to_hub(repo_id, output, options):
    """Upload the results, without checkpoints and logs; files of others in the folder stay private."""
    with named_hub_errors(options):
        upload_folder(
            repo_id=repo_id,
            folder_path=options.output_dir,
            token=options.hub_token,
            commit_message="End of training",
            allow_patterns=sorted(glob.escape(name) for name in output.written),
            ignore_patterns=["checkpoint-*", ".checkpoint-*", f"{options.logging_dir}/*", ".*"],
        )


@contextmanager
def named_hub_errors(options):
    """Whatever the Hub's library raises (of the network, HTTP, tokens) becomes a ValueError that names the flag."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"--push_to_hub as {hub_name(options)}: {type(error).__name__}: {error}") from error
