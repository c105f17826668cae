"""Recipes, flags, and what is said to someone who gets them wrong."""

import json

import pytest
import torch
from conftest import TINY_UNET
from diffusers import UNet2DModel
from PIL import Image

from generation.options import GenerationOptions
from recipes import parse_options
from samplers import resolve_method
from train_adaptive_ddpm import TrainingOptions, command_line
from training.network import build_network
from training.options import BudgetOptions
from training.plan import plan_run
from training.report import first_of_budgets


def refused(flags, capsys):
    """The line that a bad command line ends with."""
    with pytest.raises(SystemExit) as exit:
        command_line([str(flag) for flag in flags])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


BAD_FLAGS = [
    (["--train_batch_size", "0"], ["--train_batch_size 0", "[1, 2**24]"]),
    (["--train_batch_size", "many"], ["--train_batch_size", "many"]),
    (["--train_batch_size", "1.5"], ["--train_batch_size", "1.5"]),
    (["--train_batch_size", str(10**12)], ["--train_batch_size 1000000000000", "[1, 2**24]"]),
    (["--seed", "4294967296"], ["--seed 4294967296", "[0, 2**32)"]),
    (["--seed", "-1"], ["--seed -1", "[0, 2**32)"]),
    (["--learning_rate", "-1"], ["--learning_rate -1.0", "(0, inf)"]),
    (["--learning_rate", "nan"], ["--learning_rate nan", "(0, inf)"]),
    (["--learning_rate", "inf"], ["--learning_rate inf", "(0, inf)"]),
    (["--lr_warmup_steps", "-1"], ["--lr_warmup_steps -1", "[0, 2**53]"]),
    (["--adam_beta1", "1"], ["--adam_beta1 1.0", "[0, 1)"]),
    (["--max_grad_norm", "nan"], ["--max_grad_norm nan", "(0, inf]"]),
    (["--white_level", "0"], ["--white_level 0.0", "(0, inf)"]),
    (["--method", "magic"], ["--method", "magic", "adaptive", "min_snr"]),
    (["--timestep_sampler", "magic"], ["--timestep_sampler magic", "uniform", "log_normal"]),
    (["--loss_weighting", "magic"], ["--loss_weighting magic", "bell", "p2"]),
    (["--error_filter", "magic"], ["--error_filter magic", "none", "wiener"]),
    (["--prediction_type", "magic"], ["--prediction_type", "v_prediction"]),
    (["--ddpm_beta_schedule", "cosine"], ["--ddpm_beta_schedule", "cosine", "squaredcos_cap_v2"]),
    (["--batch_size", "8"], ["--batch_size", "'eval_batch_size' or 'train_batch_size'"]),
    (["--lr", "1"], ["unrecognized arguments: --lr"]),
    (["--resume_from_checkpoint", ""], ["--resume_from_checkpoint ''", "must not be empty"]),
    (["--mixed_precision", "fp8"], ["--mixed_precision", "bf16"]),
    (["--ddpm_num_steps", "1"], ["--ddpm_num_steps 1", "[2, 10**6]"]),
    (["--ddpm_num_inference_steps", "2000"], ["--ddpm_num_inference_steps 2000", "1000"]),
    (["--max_train_seconds", "0"], ["--max_train_seconds 0.0", "(0, inf)"]),
    (["--max_train_seconds", "inf"], ["--max_train_seconds inf", "(0, inf)"]),
    (["--unet", "{"], ["--unet", "{"]),
    (["--unet", "[1]"], ["--unet", "[1]"]),
    (["--no_such_flag", "1"], ["--no_such_flag"]),
    (["--config", "absent.yaml"], ["--config", "absent.yaml", "no such file"]),
    (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], ["--overwrite_output_dir", "--resume_from"]),
    (["--logging_dir", "/elsewhere"], ["--logging_dir '/elsewhere'", "inside --output_dir"]),
    (["--logging_dir", "logs/../.."], ["--logging_dir 'logs/../..'", "inside --output_dir"]),
    (["--logging_dir", "./"], ["--logging_dir './'", "inside --output_dir"]),
    (["--logging_dir", ""], ["--logging_dir ''", "inside --output_dir"]),
    (["--logging_dir", "samples/logs"], ["--logging_dir samples/logs", "choose another"]),
    (["--logging_dir", "checkpoint-5"], ["--logging_dir checkpoint-5", "choose another"]),
    (["--output_dir", ""], ["--output_dir ''", "must not be empty"]),
    (["--dataset_name", ""], ["--dataset_name ''", "must not be empty"]),
    (["--logger", "wandb"], ["--logger wandb", "pip install wandb"]),
    (["--on_bad_image", "ignore"], ["--on_bad_image", "skip"]),
]


@pytest.mark.parametrize(("flags", "parts"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_a_bad_flag_is_named_with_its_value_and_what_is_allowed(flags, parts, capsys):
    data = [] if "--config" in flags else ["--dataset_name", "digits"]
    line = refused([*data, *flags], capsys)
    for part in parts:
        assert part in line


def test_a_misspelt_flag_is_not_said_to_be_missing(capsys):
    with pytest.raises(SystemExit):
        parse_options(GenerationOptions, ["--pipelin", "runs/digits", "--output_dir", "samples"])
    assert "unrecognized arguments: --pipelin; did you mean 'pipeline'?" in capsys.readouterr().err


def test_help_tells_of_single_keys_where_an_option_has_them(capsys):
    for options, has_keys in ((TrainingOptions, True), (GenerationOptions, False)):
        with pytest.raises(SystemExit):
            parse_options(options, ["--help"])
        assert ("unet.dropout=0.2" in capsys.readouterr().out) == has_keys


def test_that_a_command_without_a_recipe_has_that_of_the_digits_is_said(capsys):
    note = "without --config, and with no other data than digits: --config"
    assert command_line(["--seed", "7"]).output_dir == "runs/digits"
    assert note in capsys.readouterr().err
    assert command_line(["--dataset_name", "a/b", "--resolution", "8"]).output_dir == "ddpm-model"
    assert note not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budgets", "reason", "steps", "line"),
    [
        ({"max_train_steps": 9}, "steps", 9, None),
        ({"max_train_steps": 9, "num_epochs": 2}, "signal", 3, None),
        ({"max_train_seconds": 6, "num_epochs": 2}, "seconds", 3, "--max_train_seconds 6; given too: --num_epochs 2"),
        (
            {"max_train_seconds": 6, "max_train_steps": 9},
            "steps",
            12,
            "--max_train_steps 9; given too: --max_train_seconds 6",
        ),
        (
            {"max_train_seconds": 6, "max_train_steps": 10**6},
            "seconds",
            9,
            "--max_train_seconds 6; given too: --max_train_steps 1,000,000",
        ),
        ({"max_train_steps": 9, "num_epochs": 2}, "steps", 9, "--max_train_steps 9; given too: --num_epochs 2"),
        ({"max_train_steps": 9, "num_epochs": 2}, "steps", 7, "--num_epochs 2; given too: --max_train_steps 9"),
    ],
)
def test_which_of_several_budgets_came_first_is_said(budgets, reason, steps, line):
    summary = {"stopped_by": reason, "steps": steps}
    assert first_of_budgets(BudgetOptions(**budgets), summary) == (line and f"ended by {line}")


def test_help_says_of_a_negated_flag_that_it_is_one(capsys):
    with pytest.raises(SystemExit):
        command_line(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--no_use_ema, --no-use-ema The same as --use_ema false. --ema" in said
    assert "Save an exponential moving average of the weights. (default: True)" in said


BAD_STARTS = [
    (["--dataset_name", "no/such-data"], ["no/such-data"]),
    (["--dataset_name", "/no/such/folder"], ["/no/such/folder"]),
    (["--resolution", "9"], ["--resolution 9", "multiple of 2"]),
    (["--unet", '{"no_such_setting": 1}'], ["--unet", "no_such_setting"]),
    (["--unet", '{"block_out_channels": [8, 16, 32]}'], ["--unet"]),
    (["--unet", '{"block_out_channels": 8}'], ["--unet", '"block_out_channels": 8']),
    (["--unet", '{"block_out_channels": []}'], ["--unet", '"block_out_channels": []']),
    (["--unet", '{"norm_num_groups": 7}'], ["--unet"]),
    (["--unet", '{"norm_num_groups": 0}'], ["--unet", '"norm_num_groups": 0']),
    (["--unet", '{"layers_per_block": "1"}'], ["--unet", '"layers_per_block": "1"']),
    (["--unet", '{"norm_eps": "small"}'], ["--unet", '"norm_eps": "small"']),
    (["--unet", '{"act_fn": "magic"}'], ["--unet", "magic"]),
    (["--unet", '{"num_class_embeds": 10}'], ["--unet", "needs --class_conditional"]),
    (["--unet", '{"in_channels": 7}'], ["--unet in_channels 7", "images"]),
    (["--noise_scheduler", '{"no_such_setting": 1}'], ["--noise_scheduler", "no_such_setting"]),
    (["--noise_scheduler", '{"rescale_betas_zero_snr": true}'], ["--noise_scheduler", "zero terminal SNR"]),
    (["--noise_scheduler", '{"steps_offset": 1}'], ["--noise_scheduler", "steps_offset=1"]),
    (["--noise_scheduler", '{"thresholding": true}'], ["--noise_scheduler", "thresholding"]),
    (["--noise_scheduler", '{"variance_type": "learned"}'], ["--noise_scheduler", "variance_type", "learned"]),
    (["--noise_scheduler", '{"trained_betas": [0.1, 0.2]}'], ["--noise_scheduler", "2 values", "1000"]),
    (["--noise_scheduler", '{"beta_start": "low"}'], ["--noise_scheduler", '"beta_start": "low"']),
    (["--noise_scheduler", '{"beta_end": 1.5}'], ["--noise_scheduler", "(0, 1]"]),
    (["--noise_scheduler", '{"num_train_timesteps": 10}'], ["--noise_scheduler", "--ddpm_num_steps"]),
    (["--mixed_precision", "fp16"], ["--mixed_precision fp16", "bf16"]),
    (["--method", "speed", "--ddpm_num_steps", "50", "--ddpm_num_inference_steps", "5"], ["SpeeD", "noise schedule"]),
    (["--timestep_sampler_options", '{"horizons": 3}'], ["timestep_sampler_options", "horizons"]),
    (["--timestep_sampler_options", '{"uniform_fraction": 0}'], ["uniform_fraction", "(0, 1]"]),
    (["--timestep_sampler_options", '{"uniform_fraction": "x"}'], ["--timestep_sampler_options", "uniform_fraction"]),
    (["--timestep_sampler_options", '{"refresh_every": "x"}'], ["--timestep_sampler_options", "refresh_every"]),
    (["--method", "immiscible", "--timestep_sampler_options", '{"num_candidates": 0}'], ["num_candidates"]),
    (
        ["--loss_weighting_options", '{"gamma": 1}'],
        ["--loss_weighting_options", "scaled_logit_normal", "no option 'gamma'"],
    ),
    (["--error_filter_options", '{"plain_fraction": "x"}'], ["--error_filter_options", "plain_fraction"]),
    (["--timestep_sampler_options", '{"seed": 3}'], ["--timestep_sampler_options", "seed"]),
    (["--resume_from_checkpoint", "/no/checkpoint"], ["--resume_from_checkpoint /no/checkpoint", "must be latest, or"]),
    (["--model_config_name_or_path", "/no/config"], ["--model_config_name_or_path /no/config"]),
    (["--train_batch_size", 2**24, "--gradient_accumulation_steps", 2**24], ["--train_batch_size 16777216", "GB"]),
    (["--push_to_hub"], ["--push_to_hub", "run"]),
    (["--push_to_hub", "--hub_model_id", "a/b/c"], ["--push_to_hub", "a/b/c"]),
]


@pytest.mark.parametrize(("flags", "parts"), BAD_STARTS, ids=[" ".join(map(str, flags)) for flags, _ in BAD_STARTS])
def test_what_cannot_work_ends_in_one_line_before_training(train, flags, parts):
    run = train("run", *flags).wait(1)
    *_, line = run.output.splitlines()
    assert line.startswith("train_adaptive_ddpm.py: error: ")
    assert "Traceback" not in run.output
    for part in parts:
        assert part in line
    assert not run.folder.exists()


ALLOWED_BY_THE_IMAGES = [
    {"in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4},
    {"sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4},
    {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},  # as many as 8x8 images have levels
]


@pytest.mark.parametrize("unet", ALLOWED_BY_THE_IMAGES)
def test_stand_ins_refuse_nothing_that_the_images_allow(unet):
    """Before they are read, grey 8x8 images may be of any size and colour."""
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 1}
    options = command_line(["--dataset_name", "x", "--unet", json.dumps(blocks | unet)])
    plan_run(options)
    build_network(options, channels=1, resolution=8)


BAD_MODEL_CONFIGS = {
    "a list": "[1, 2]",
    "no JSON": "{",
    "empty": "{}",
    "of another class": '{"_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16]}',
    "wrong types": '{"block_out_channels": [8, 16], "time_embedding_type": 3}',
}


@pytest.mark.parametrize("config", BAD_MODEL_CONFIGS)
def test_a_model_config_that_is_none_is_named(train, tmp_path, config):
    (tmp_path / "config.json").write_text(BAD_MODEL_CONFIGS[config])
    run = train("run", "--model_config_name_or_path", tmp_path / "config.json").wait(1)
    assert "Traceback" not in run.output
    assert f"--model_config_name_or_path {tmp_path / 'config.json'}" in run.output.splitlines()[-1]


def test_a_pipelines_folder_is_a_model_config(train, tmp_path):
    UNet2DModel(**TINY_UNET, sample_size=64, in_channels=3).save_config(tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    options = command_line(["--dataset_name", "x", "--model_config_name_or_path", str(tmp_path / "pipeline")])
    unet = build_network(options, channels=1, resolution=8)
    assert (unet.config.block_out_channels, unet.config.sample_size) == ([8, 16], 8)


# The output folder


def test_results_are_never_overwritten_unasked(train, finished_run, tmp_path):
    first = finished_run(tmp_path / "run", "--max_train_steps", 6)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    again = train("run", "--max_train_steps", 6).wait(1)
    assert "--overwrite_output_dir" in again.output.splitlines()[-1]
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_is_not_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    run = train("run", "--overwrite_output_dir").wait(1)
    assert "is not the folder of a run" in run.output.splitlines()[-1]
    assert (tmp_path / "run" / "README.md").read_text() == "mine"


def test_a_folder_that_is_no_run_is_not_resumed_into(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    run = train("run", "--resume_from_checkpoint", "latest").wait(1)
    assert "no checkpoint" in run.output.splitlines()[-1]
    assert (tmp_path / "run" / "README.md").read_text() == "mine"


def full_disk_from_the_second_checkpoint(script):
    from training import checkpoints

    original = torch.save

    def save(content, file, **options):
        if "checkpoint-12" in str(file):
            raise OSError(28, "No space left on device")
        original(content, file, **options)

    checkpoints.torch.save = save


def test_a_full_disk_is_named_and_the_checkpoint_before_it_kept(train):
    run = train("run", tamper=full_disk_from_the_second_checkpoint).wait(1)
    *_, line = run.output.splitlines()
    assert "No space left on device" in line
    assert "checkpoint-12" in line
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-6"]
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    assert (resumed.folder / "model_index.json").exists()


def no_space_at_all(script):
    import shutil
    from types import SimpleNamespace

    shutil.disk_usage = lambda path: SimpleNamespace(free=1000)


def test_too_little_space_is_found_out_before_training(train):
    run = train("run", tamper=no_space_at_all).wait(1)
    assert "--output_dir" in run.output.splitlines()[-1]
    assert "are free" in run.output.splitlines()[-1]
    assert not (run.folder / "metrics.jsonl").exists()


# Images that cannot be read


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve small pictures, one of them cut short."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    content = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize("placement", ["memory", "stream"])
def test_a_bad_image_is_named_or_skipped_with_a_count(train, pictures, tmp_path, placement):
    flags = ("--train_data_dir", pictures, "--cache_dir", tmp_path / "cache", "--data_placement", placement)
    run = train("run", *flags, "--max_train_steps", 4).wait(1)
    assert "index 5" in run.output
    assert "--on_bad_image skip" in run.output
    run = train("skip", *flags, "--max_train_steps", 4, "--on_bad_image", "skip").wait()
    assert json.loads((run.folder / "training_summary.json").read_text())["skipped_images"] == 1


# What the options mean together


def test_without_data_the_embedded_digits_are_trained_on():
    for flags in ([], ["--dataset_name", "digits"]):
        options = command_line(["--max_train_steps", "5", *flags])
        assert (options.dataset_name, options.resolution, options.max_train_steps) == ("digits", 8, 5)
    assert command_line(["--dataset_name", "x"]).resolution is None


def test_fewer_timesteps_need_no_other_flags():
    options = command_line(["--dataset_name", "x", "--ddpm_num_steps", "40"])
    assert (options.ddpm_num_inference_steps, options.eval_num_inference_steps) == (40, 40)


def test_methods_name_published_parts():
    assert resolve_method("speed") == ("speed", "change_aware", "none", "independent")
    assert resolve_method("p2", timestep_sampler="adaptive") == ("adaptive", "p2", "none", "independent")
    assert resolve_method("adaptive", error_filter="none") == ("adaptive", "scaled_logit_normal", "none", "antithetic")


def test_flags_are_those_of_diffusers():
    """Every flag of train_unconditional.py but those listed here, with reasons."""
    diffusers_flags = """dataset_name dataset_config_name model_config_name_or_path output_dir overwrite_output_dir
        cache_dir resolution random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs
        save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps
        adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub
        hub_token hub_model_id hub_private_repo logger logging_dir mixed_precision prediction_type ddpm_num_steps
        ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit
        resume_from_checkpoint"""
    # Not there: center_crop (always done), local_rank (the launcher's), enable_xformers_memory_efficient_attention
    # (torch's own attention is as fast), preserve_input_precision (images are kept as decoded to 8 bits).
    assert set(diffusers_flags.split()) <= set(vars(TrainingOptions()))
