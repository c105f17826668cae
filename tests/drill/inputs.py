"""Bad inputs: one line that names what is at fault, and nothing on the disk is changed.

Values of the wrong type or out of range are generated from the option lists; the rest is made by kind. All of them
are surely bad but those marked `sure=False`, which may turn out to be valid on a machine with memory enough.
"""

import dataclasses
import importlib
import json
import resource
import string
import typing

import hypothesis
import yaml
from conftest import TINY_UNET
from harness import (
    COMPARE,
    COMPARING,
    EVALUATE,
    GENERATE,
    GENERATING,
    TRAIN,
    TRAINING,
    Case,
    Skipped,
    Starts,
    bound,
    check_refusal,
    check_unchanged,
    need_extractor,
    scaled,
    snapshot,
)
from hypothesis import strategies as st

from recipes import JsonDict

NUM = 200
SHARE_TYPED = 0.45  # of them, generated from the types
MEMORY = 16 << 30  # bytes of address space: a huge number must not take the machine's memory
OPTIONS = {
    TRAIN: "TrainingOptions",
    GENERATE: "GenerationOptions",
    EVALUATE: "EvaluationOptions",
    COMPARE: "ComparisonOptions",
}
BASE = {
    TRAIN: [*TRAINING, "--max_train_steps", "2", "--cache_dir", "{cache}"],
    GENERATE: ["--pipeline", "{plain}", *GENERATING],
    EVALUATE: ["--input1", "digits", "--input2", "digits"],
    COMPARE: COMPARING,
}
# What --output_dir may hold before: kind of reference (None: there is no such folder; "": an empty one), and flags
OUTPUTS = {
    TRAIN: [
        (None, []),
        ("", []),
        ("twelve", ["--overwrite_output_dir"]),
        ("twelve", ["--resume_from_checkpoint", "latest"]),
    ],
    GENERATE: [(None, []), ("", []), ("png", ["--overwrite_output_dir"])],
    EVALUATE: [(None, []), ("", [])],
    COMPARE: [(None, []), ("", [])],
}


@dataclasses.dataclass
class Bad:
    """One bad input.

    Attributes:
        script: which it is given to.
        flags: over those of `BASE`. {world} is the folder where `files` are and the output goes, {cache} one beside
            it; {plain}, {twelve} and {png} are references.
        names: of which the error line must have one.
        files: {path in {world}: bytes; None for a folder; the kind of a reference to copy}.
        output: as in `OUTPUTS`, where not one of those.
        left_out: flags of `BASE` that would hide the fault.
        sure: whether it cannot be valid.
    """

    script: str
    flags: list
    names: tuple
    files: dict = dataclasses.field(default_factory=dict)
    output: tuple | None = None
    left_out: tuple = ()
    sure: bool = True


def cases(drill):
    """A sample of the kinds, and generated ones."""
    made = by_kind(drill.rng)
    count = scaled(NUM, drill.scale)
    num_typed = max(round(SHARE_TYPED * count), count - len(made))
    bad = [*generated(num_typed, drill.rng), *drill.rng.sample(made, count - num_typed)]
    for trial in bad:
        trial.output = trial.output or drill.rng.choice(OUTPUTS[trial.script])
    return [Case(f"{i}: {title(trial)}", bound(refused, drill.references, trial)) for i, trial in enumerate(bad)]


def title(bad):
    held = {None: "absent", "": "empty"}.get(bad.output[0], bad.output[0])
    return f"{bad.script} {' '.join(bad.flags)}"[:160] + f" into {held} {' '.join(bad.output[1])}"


def refused(folder, rng, references, bad):
    """One start, which must be refused and change nothing."""
    if bad.script == COMPARE:
        need_extractor()
    world, cache = folder / "world", folder / "cache"
    world.mkdir()
    places = {"world": world, "cache": cache, **{kind: references.get(kind) for kind in ("plain", "twelve", "png")}}
    held, overriding = bad.output
    for name, content in {**bad.files, **({} if held is None else {"out": held or None})}.items():
        put(world / name, content, references)
    before = snapshot(world)
    flags = [*without(BASE[bad.script], bad.left_out), *overriding, *bad.flags]
    with Starts() as starts:
        start = starts(
            bad.script,
            world / "out",
            [fill(flag, places) for flag in flags],
            log_path=folder / "log",
            environment={"HF_DATASETS_CACHE": str(cache)},
            tamper=limit_memory,
        ).wait(None)
    if start.process.exitcode == 0 and not bad.sure:
        raise Skipped("valid after all")
    check_refusal(start, any_of=[fill(name, places) for name in bad.names])
    check_unchanged(world, before)


def put(path, content, references):
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, str):
        references.copy(content, path)
    else:
        path.write_bytes(content)


def fill(text, places):
    """Put folders in place of {their names}; other braces, of JSON, stay."""
    for name, place in places.items():
        text = text.replace("{" + name + "}", str(place))
    return text


def without(flags, names):
    """Flags (each with one value) but those named."""
    kept, skip = [], False
    for flag in flags:
        skip = flag[2:] in names if flag.startswith("--") else skip
        kept += [] if skip else [flag]
    return kept


def limit_memory(script):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


# Generated from the types

WORDS = st.text(string.ascii_lowercase, min_size=4, max_size=9).filter(
    lambda word: word not in {"true", "false", "none", "null", "infinity"}
)
NEGATIVE = st.integers(-(2**70), -1).map(str)
NEGATIVE_FLOAT = st.floats(-1e30, -1e-3).map(repr)
BAD_INT = st.one_of(WORDS, NEGATIVE, st.sampled_from(["1.5", "nan", "inf", "-inf", "0x10", "1e3x", ""]))
BAD_FLOAT = st.one_of(WORDS, NEGATIVE_FLOAT, st.sampled_from(["nan", "-inf", "1,5", ""]))
BAD_BOOL = st.one_of(WORDS, st.sampled_from(["2", "-1", "maybe"]))
BAD_JSON = st.one_of(
    st.recursive(st.integers() | st.text(max_size=5) | st.booleans(), st.lists, max_leaves=4).map(json.dumps),
    st.sampled_from(["", "{", '{"a": }', '{"a": 1', "{'a': 1}", "{a: 1}", '{"a": 1}}', '{1: "a"}']),
)
# Infinity is fine for a time, for clipping and for a decay's constants; for these it is not
NEVER_INFINITE = ("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "ema_max_decay", "eta")


def generated(count, rng):
    """So many distinct bad values, of any option of any script, by flag or by recipe."""
    fields = [(script, name, values) for script in OPTIONS for name, values in bad_values(script).items()]
    trial = st.sampled_from(fields).flatmap(
        lambda field: st.tuples(st.just(field[:2]), field[2], st.booleans() if field[0] != COMPARE else st.just(False))
    )
    found = {}

    @hypothesis.seed(rng.randrange(2**32))
    @hypothesis.settings(
        max_examples=4 * count + 20,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(trial)
    def collect(example):
        found[example] = None

    collect()
    return [typed(*example) for example in rng.sample(list(found), count)]


def typed(field, value, by_recipe):
    """The bad value of an option."""
    script, name = field
    if not by_recipe:
        return Bad(script, [f"--{name}={value}"], (name,))
    recipe = yaml.safe_dump({name: value}).encode()
    flags = ["--config", "{world}/recipe.yaml"]
    return Bad(script, flags, (name, "recipe.yaml"), {"recipe.yaml": recipe}, left_out=(name,))


def bad_values(script):
    """{option: strategy of texts that it cannot take}; without options that take any text."""
    options = getattr(importlib.import_module(script), OPTIONS[script])
    found = {name: of_type(name, kind) for name, kind in typing.get_type_hints(options).items()}
    return {name: values for name, values in found.items() if values is not None}


def of_type(name, kind):
    kinds = {kind, *typing.get_args(kind)} if typing.get_origin(kind) is not typing.Literal else {kind}
    if bool in kinds:
        return BAD_BOOL
    if int in kinds:
        return BAD_INT
    if float in kinds:
        return st.one_of(BAD_FLOAT, st.just("inf")) if name in NEVER_INFINITE else BAD_FLOAT
    if JsonDict in kinds:
        return BAD_JSON
    is_choice = any(typing.get_origin(k) is typing.Literal for k in kinds)
    return WORDS if is_choice or name in ("metrics", "methods") else None


# By kind

UNET = [
    {"no_such_setting": 1}, {"layers_per_block": "two"}, {"layers_per_block": 1.5}, {"layers_per_block": -1},
    {"block_out_channels": 8}, {"block_out_channels": []}, {"block_out_channels": ["8", 16]},
    {"block_out_channels": [8, 16, 32]}, {"block_out_channels": [-8, 16]}, {"block_out_channels": [0, 0]},
    {"norm_num_groups": 0}, {"norm_num_groups": 7}, {"norm_num_groups": "4"}, {"dropout": 2}, {"dropout": "x"},
    {"dropout": -1}, {"act_fn": "magic"}, {"act_fn": 3}, {"down_block_types": ["MagicBlock", "DownBlock2D"]},
    {"down_block_types": "DownBlock2D"}, {"num_class_embeds": 10}, {"class_embed_type": "timestep"},
    {"time_embedding_type": "magic"}, {"norm_eps": "x"}, {"attention_head_dim": 0}, {"freq_shift": "x"},
]  # fmt: skip
NOISE_SCHEDULER = [
    {"no_such_setting": 1}, {"beta_start": "x"}, {"beta_start": -1}, {"beta_end": 2}, {"beta_start": float("nan")},
    {"trained_betas": "x"}, {"trained_betas": [0.1, 0.2]}, {"num_train_timesteps": 0}, {"num_train_timesteps": "many"},
    {"num_train_timesteps": -5}, {"num_train_timesteps": 1.5}, {"prediction_type": "magic"},
    {"variance_type": "learned"}, {"variance_type": "learned_range"},
    {"thresholding": True}, {"steps_offset": 1}, {"timestep_spacing": "magic"}, {"rescale_betas_zero_snr": True},
    {"beta_schedule": "magic"}, {"clip_sample_range": "x"},
]  # fmt: skip
SAMPLER = [
    {"no_such_setting": 1}, {"refresh_every": 0}, {"refresh_every": -3}, {"refresh_every": "x"},
    {"uniform_fraction": 0}, {"uniform_fraction": 2}, {"uniform_fraction": "x"}, {"uniform_fraction": float("nan")},
    {"seed": 3}, {"device": "magic"}, {"images": 1},
]  # fmt: skip
TRAINING_VALUES = [  # flags, and what the line may name beside the first of them
    (["--seed", "4294967296"], ()),
    (["--learning_rate", "inf"], ()),
    (["--ddpm_beta_schedule", "magic"], ()),
    (["--resolution", "9"], ("unet",)),
    (["--resolution", "7"], ("unet",)),
    (["--mixed_precision", "fp16"], ()),
    (["--timestep_sampler", "magic"], ()),
    (["--loss_weighting", "magic"], ()),
    (["--error_filter", "magic"], ()),
    (["--method", "speed", "--timestep_sampler_options", "{}"], ("SpeeD", "ddpm_num_steps")),
    (["--ddpm_num_inference_steps", "21"], ()),
    (["--ddpm_num_steps", "1"], ()),
    (["--logging_dir", ".."], ()),
    (["--logging_dir", "/elsewhere"], ()),
    (["--no_such_flag", "1"], ()),
    (["stray"], ()),
    (["--eval_feature_extractor", "/no/such", "--eval_steps", "2"], ("/no/such",)),
    (["--eval_feature_extractor_weights", "/no/such", "--eval_steps", "2"], ("/no/such",)),
    (["--image_column", "nope"], ()),
    (["--dataset_name", "no/such-data"], ()),
    (["--dataset_name", "/no/such/folder"], ()),
    (["--config", "/no/recipe.yaml"], ()),
    (["--config", "{world}"], ()),
]
HUGE = [["--ddpm_num_steps", str(10**15)], ["--train_batch_size", str(10**15)], ["--resolution", str(10**7)]]
RECIPES = {
    "twice": b"seed: 1\nlogging_steps: 3\nseed: 2\n",
    "tabs": b"unet:\n\tdropout: 0.1\n",
    "binary": bytes(range(256)),
    "latin1": "output_dir: caf\u00e9\n".encode("latin-1"),
    "list": b"- seed\n- 1\n",
    "text": b"seed\n",
    "open": b"unet: {dropout: 0.1\n",
    "unknown": b"sead: 1\n",
    "nested": b"seed: {value: 1}\n",
    "several": b"seed: [1, 2]\n",
    "object": b"seed: !!python/object/apply:os.getpid []\n",
    "number": b"1: 2\n",
    "recipe": b"config: other.yaml\n",
    "alias": b"seed: *nobody\n",
    "flag": b"--seed: 1\n",
}
MODEL_CONFIGS = {  # a JSON file, or a folder with a config.json
    "list.json": b"[1, 2]",
    "number.json": b"3",
    "open.json": b'{"block_out_channels": [8, 16]',
    "binary.json": bytes(range(256)),
    "empty.json": b"",
    "no_blocks.json": b'{"block_out_channels": [8, 16], "norm_num_groups": 4}',  # of the four default blocks' widths
    "other_class.json": b'{"_class_name": "AutoencoderKL", "block_out_channels": 8}',
    "wrong_type.json": b'{"block_out_channels": "wide"}',
    "null.json": b'{"block_out_channels": null}',
    "folder/config.json": b"[1, 2]",
    "nothing/notes.txt": b"no config here",
}


def by_kind(rng):
    """All inputs that are made by hand."""
    noise = rng.randbytes(200)
    return [
        *(as_json("unet", value | TINY_UNET | value) for value in UNET),
        *(as_json("noise_scheduler", value) for value in NOISE_SCHEDULER),
        *(as_json("timestep_sampler_options", value) for value in SAMPLER),
        *(Bad(TRAIN, flags, (flags[0].lstrip("-"), *names)) for flags, names in TRAINING_VALUES),
        *(Bad(TRAIN, flags, (flags[0][2:],), sure=False) for flags in HUGE),
        *(recipe(TRAIN, name, content) for name, content in RECIPES.items()),
        *(recipe(GENERATE, name, RECIPES[name]) for name in ("twice", "tabs", "binary", "list")),
        *(model_config(name, content) for name, content in MODEL_CONFIGS.items()),
        *data_folders(noise),
        *other_folders(),
        *pipelines(noise),
        *comparisons_and_scores(),
    ]


def as_json(option, value):
    """A setting within an option that is a JSON object."""
    return Bad(TRAIN, [f"--{option}", json.dumps(value)], (option,), left_out=(option,))


def recipe(script, name, content):
    # `--seed` is in no `BASE`, so no flag hides what a recipe says of it
    return Bad(script, ["--config", f"{{world}}/{name}.yaml"], (f"{name}.yaml", "--seed"), {f"{name}.yaml": content})


def model_config(name, content):
    path = name if name.endswith(".json") and "/" not in name else name.split("/")[0]
    # An empty recipe, as the one of the digits that is taken without any has a --unet over the model's config
    flags = ["--config", "{world}/bare.yaml", "--model_config_name_or_path", f"{{world}}/{path}"]
    files = {name: content, "bare.yaml": b""}
    return Bad(TRAIN, flags, ("model_config_name_or_path", path), files, left_out=("unet",))


def data_folders(noise):
    """Folders that are no images: refused before training, by the flag or the file."""
    corrupt = {f"data/{i}.png": b"\x89PNG\r\n\x1a\n" + noise for i in range(12)}
    contents = {
        "empty": {"data": None},
        "a file": {"data": b"pixels"},
        "only text": {"data/a.txt": b"words", "data/b.txt": b"more"},
        "corrupt": corrupt,
        "corrupt, skipped": corrupt,
        "empty files": {f"data/{i}.png": b"" for i in range(12)},
        "corrupt parquet": {"data/train.parquet": b"PAR1" + noise + b"PAR1"},
        "corrupt numbers": {"data/train.csv": b"image\n1\n2\n"},
        "a broken dataset": {"data/state.json": b"{}", "data/dataset_info.json": b"{}"},
    }
    for kind, files in contents.items():
        flags = ["--dataset_name", "{world}/data"] + (["--on_bad_image", "skip"] if "skipped" in kind else [])
        yield Bad(TRAIN, flags, ("dataset_name", "train_data_dir", "{world}/data"), files)


def other_folders():
    """--output_dir and --resume_from_checkpoint where something else is."""
    resume = "--resume_from_checkpoint"
    out = ("output_dir", "{world}/out")
    yield Bad(TRAIN, [], out, output=("twelve", []))
    yield Bad(TRAIN, [], out, output=("png", []))
    yield Bad(TRAIN, ["--overwrite_output_dir"], out, output=("png", []))
    yield Bad(TRAIN, [resume, "latest"], out, output=("png", []))
    yield Bad(TRAIN, [], out, {"out": b"a file"}, output=(None, []))
    yield Bad(TRAIN, [], out, {"out/notes.txt": b"mine"}, output=(None, []))
    yield Bad(TRAIN, ["--overwrite_output_dir"], out, {"out/notes.txt": b"mine"}, output=(None, []))
    yield Bad(TRAIN, [resume, "latest"], out, {"out/notes.txt": b"mine"}, output=(None, []))
    for path in ("{plain}", "{png}", "{plain}/unet", "{plain}/checkpoint-24/model.safetensors", "{world}", "", "/"):
        yield Bad(TRAIN, [resume, path], (resume[2:],))
    yield Bad(TRAIN, [resume, "latest", "--overwrite_output_dir"], (resume[2:], "overwrite_output_dir"))
    checkpoint = [resume, "{plain}/checkpoint-24"]
    for flags in (
        ["--ddpm_num_steps", "30"],
        ["--method", "ddpm", "--timestep_sampler_options", "{}"],
        ["--unet", json.dumps({"block_out_channels": [16, 32]})],
    ):
        names = (resume[2:], flags[0][2:], "sampler")
        yield Bad(TRAIN, [*checkpoint, *flags], names, output=(None, []))
    for kind, flags in (("twelve", []), ("png", ["--seed", "1"])):
        yield Bad(GENERATE, flags, out, output=(kind, []))
    yield Bad(GENERATE, ["--num_images", "3"], ("num_images", *out), output=("png", []))
    yield Bad(GENERATE, [], out, {"out": b"a file"}, output=(None, []))


def pipelines(noise):
    """--pipeline that is none."""
    index, weights = "pipeline/model_index.json", "pipeline/unet/diffusion_pytorch_model.safetensors"
    for path in ("/no/such/pipeline", "no/such-pipeline", "{png}", "{plain}/checkpoint-24", "{plain}/model_index.json"):
        yield Bad(GENERATE, ["--pipeline", path], ("--pipeline",))
    yield Bad(GENERATE, ["--pipeline", "{world}/pipeline"], ("pipeline",), {"pipeline": None})
    for name, content in (
        (index, b"{"),
        (index, b"[]"),
        (index, noise),
        (weights, noise),
        (weights, b""),
        ("pipeline/unet/config.json", b"[]"),
        ("pipeline/scheduler/scheduler_config.json", b"{"),
    ):
        # A dict keeps its order: the pipeline is copied, then one of its files replaced
        yield Bad(GENERATE, ["--pipeline", "{world}/pipeline"], ("pipeline",), {"pipeline": "plain", name: content})
    for flags in (
        ["--num_inference_steps", "21"],
        ["--num_inference_steps", "0"],
        ["--seed", "4294967296"],
        ["--eta", "0.5"],
        ["--mixed_precision", "fp16"],
    ):
        yield Bad(GENERATE, flags, (flags[0][2:],))


def comparisons_and_scores():
    """compare.py and evaluate.py with the wrong folders and lists."""
    out = ("output_dir", "{world}/out")
    yield Bad(COMPARE, [], out, output=("twelve", []))
    yield Bad(COMPARE, [], out, {"out/results.json": b"[]"}, output=(None, []))
    yield Bad(COMPARE, [], (*out, "results.json"), {"out/results.json": b"{"}, output=(None, []))
    yield Bad(COMPARE, [], out, {"out": b"a file"}, output=(None, []))
    for flags in (
        ["--join", "{world}"],
        ["--score_at", "0.5"],
        ["--score_at", "0.5", "0.2", "1"],
        ["--score_at", "nan", "1"],
        ["--seeds", "one"],
        ["--seeds", "4294967296"],
        ["--methods", "magic"],
        ["--methods"],
        ["--variants", '{"magic": {}}'],
        ["--variants", '{"ddpm": 3}'],
        ["--score_at_images", "12"],
        ["--score_samplers", "magic"],
        ["--eval_num_images", "10"],
        ["--eval_feature_extractor", "/no/such"],
        ["--dataset_name", "/no/such"],
        ["--unet", '{"no_such_setting": 1}'],
    ):
        yield Bad(COMPARE, flags, (flags[0][2:],))
    for flags in (["--input1", "/no/such"], ["--input2", "/no/such"], ["--input1", "{world}"], ["--metrics", "magic"]):
        yield Bad(EVALUATE, flags, (flags[0][2:],))
    for flags in (["--kid_subset_size", "5000"], ["--split1", "nope"], ["--num_images1", "5000"]):
        yield Bad(EVALUATE, flags, (flags[0][2:], "input1"))
    yield Bad(EVALUATE, ["--feature_extractor", "/no/such", "--metrics", "fid"], ("feature_extractor",))
    yield Bad(EVALUATE, [], out, {"out": b"a file"}, output=(None, []))
    yield Bad(EVALUATE, [], ("metrics.json",), {"out/metrics.json": b"{}"}, output=(None, []))
