"""The documents hold: links lead somewhere, commands are understood, snippets run, tables are those of the records."""

import ast
import json
import re
import shlex
import sys
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import torch
from conftest import REPOSITORY
from diffusers import DDPMScheduler
from transformers import HfArgumentParser

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import cached_latents
import density_learning
import feature_extractor
import flow_matching
import gradient_probe
import method_pictures
import race_pictures
import rivals_behaviour
import run_costs
import sampler_cost
import swap_test
import throughput
import train_autoencoder
import training_memory

import samplers
from comparison.entrants import check_training_flags
from comparison.options import ComparisonOptions, read_command_line
from generation.options import GenerationOptions
from recipes import load_recipes, parse_options
from scoring.options import EvaluationOptions
from train_adaptive_ddpm import command_line
from training.options import TrainingOptions

README = REPOSITORY / "README.md"
FOLDERS = ("", "docs", "samplers", "benchmarks", "benchmarks/results", "tests", "configs", "accelerate_configs")
DOCUMENTS = sorted(
    {*(file for folder in FOLDERS for file in (REPOSITORY / folder).glob("*.md")), *REPOSITORY.glob("docs/**/*.md")}
)
GUIDES = [file for file in DOCUMENTS if "results" not in file.parts]  # records quote commands of their day
RACES = {  # the columns of the README's table
    "race_cifar10_unet": ("FD at 60 s", "FD at 120 s", "FD by DDIM at 120 s"),
    "race_cifar10_dit": ("FD at 120 s",),
    "race_cifar10_latents": ("FD at 150 s",),
    "race_digits_dit": ("FD at 32 s", "FD at 64 s"),
}
OTHER_RACES = (
    "race_long_cifar10_unet",
    "race_three_tenths_cifar10_unet",
    "race_three_tenths_digits_dit",
    "race_strongest_cifar10_16x16",
    "race_strongest_digits_dit",
    "race_methods_digits_dit",
    "race_cifar10_16x16",
    "race_digits",
)
FLOWS = ("race_flow_cifar10_unet", "race_flow_digits_dit")
ABLATIONS = ("ablation_cifar10_unet", "ablation_digits_dit", "ablation_cifar10_16x16", "ablation_digits")
COMPARISONS = ("race_first_cifar10_16x16", "race_first_digits", "comparison_cifar10_16x16", "comparison_digits")
TEST_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt pytest pytest-xdist hypothesis ruff "
    "&& .venv/bin/ruff check . && .venv/bin/python -m pytest -n 2"
)

# What a script's flags are understood by; "--" and what follows it is the training script's
OPTIONS = {
    "train_adaptive_ddpm.py": TrainingOptions,
    "generate.py": GenerationOptions,
    "evaluate.py": EvaluationOptions,
    "compare.py": ComparisonOptions,
    "density_learning.py": density_learning.LearningOptions,
    "gradient_probe.py": gradient_probe.ProbeOptions,
    "method_pictures.py": method_pictures.PictureOptions,
    "race_pictures.py": race_pictures.RacePictureOptions,
    "rivals_behaviour.py": rivals_behaviour.BehaviourArguments,
    "run_costs.py": run_costs.RunCostOptions,
    "swap_test.py": swap_test.SwapOptions,
    "throughput.py": throughput.ThroughputOptions,
    "cached_latents.py": cached_latents.CachedLatentsOptions,
    "flow_matching.py": flow_matching.FlowMatchingOptions,
    "sampler_cost.py": sampler_cost.SamplerCostOptions,
    "feature_extractor.py": feature_extractor.ExtractorOptions,
    "train_autoencoder.py": train_autoencoder.AutoencoderOptions,
    "training_memory.py": training_memory.MemoryOptions,
}
OF_ACCELERATE = {"--config_file", "--num_processes", "--machine_rank", "--main_process_ip", "--cpu"}
OF_OTHERS = {"--help", "--check"}  # argparse's; ruff's
OF_THE_DRILL = set(re.findall(r'add_argument\("(--\w+)"', (REPOSITORY / "tests/drill/run.py").read_text()))


def name(document):
    return str(document.relative_to(REPOSITORY))


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name)
every_guide = pytest.mark.parametrize("document", GUIDES, ids=name)


def blocks(document, language):
    """The fenced blocks of a language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def prose(document):
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- links


def anchors(document):
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    plain = (re.sub(r"<[^>]*>|[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@every_document
def test_links_lead_to_files_and_headings_that_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{name(document)}: {target}"
        assert file.is_relative_to(REPOSITORY), f"{name(document)}: {target} leads out of the repository"
        assert not anchor or anchor in anchors(file), f"{name(document)}: {target}: there are {sorted(anchors(file))}"


def test_every_page_of_docs_can_be_found_from_the_readme():
    linked = {(README.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", prose(README))}
    assert set(REPOSITORY.glob("docs/*.md")) | {REPOSITORY / "CONTRIBUTING.md"} <= linked


# ---------------------------------------------------------------------------------------------------------- commands


def commands(document):
    """The command lines of a document that start a script of ours: (script, words before it, words after it)."""
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:accelerate launch|python) [^`]*)`", prose(document).replace("\n", " "))
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            for i, word in enumerate(words):
                if word.endswith(".py") and (word.startswith("tests/drill") or Path(word).name in OPTIONS):
                    yield word, words[:i], words[i + 1 :]
                    break


def understand(script, words):
    """Parse a script's flags as the script does: whatever it would refuse without data ends in SystemExit."""
    options = OPTIONS[Path(script).name]
    own, _, of_training = " ".join(words).partition(" -- ")
    if script == "train_adaptive_ddpm.py":
        command_line(words)
    elif script == "compare.py":
        _, rest = read_command_line(words)
        check_training_flags(rest)
        command_line(rest)
    elif "config" in {field.name for field in fields(options)}:
        parse_options(options, words)
    else:
        HfArgumentParser(options, allow_abbrev=False).parse_args_into_dataclasses(shlex.split(own))
        command_line(shlex.split(of_training))


@every_guide
def test_commands_are_understood(document, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    for script, launcher, words in commands(document):
        said = f"{name(document)}: {script} {shlex.join(words)}"
        assert (REPOSITORY / script).is_file(), said
        if script.startswith("tests/drill"):
            assert {word for word in words if word.startswith("--")} <= OF_THE_DRILL | {"--help"}, said
            continue
        assert {word for word in launcher if word.startswith("--")} <= OF_ACCELERATE, said
        for flag, value in pairwise(launcher):
            assert flag != "--config_file" or (REPOSITORY / value).is_file(), said
        words = [word if "training_options.yaml" not in word else "configs/digits.yaml" for word in words]  # of a run
        if words != ["--help"]:
            try:
                understand(script, words)
            except (SystemExit, ValueError) as error:
                pytest.fail(f"{said}\n{error}\n{capsys.readouterr().err}")


@cache
def flags_of_all_scripts():
    own = {f"--{field.name}" for options in OPTIONS.values() for field in fields(options)}
    return own | OF_ACCELERATE | OF_OTHERS | OF_THE_DRILL


@every_guide
def test_flags_exist(document):
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*", document.read_text()))
    assert named <= flags_of_all_scripts(), name(document)


@every_guide
def test_flags_have_values_that_they_take(document):
    """Of `--flag value` in the running text, for the options of the training script."""
    parser = HfArgumentParser(TrainingOptions, allow_abbrev=False)
    for quoted in re.findall(r"`(--[a-z]\w* [^`]*)`", prose(document).replace("\n", " ")):
        words = shlex.split(quoted)
        if words[0] in parser._option_string_actions and not {"FOLDER", "NAME"} & set(words):
            known = [word for word in words if word.startswith("--")]
            if all(flag in parser._option_string_actions for flag in known):
                parser.parse_args_into_dataclasses(words)  # which checks more than argparse does


@every_guide
def test_recipes_are_understood(document, tmp_path):
    parser = HfArgumentParser(TrainingOptions, allow_abbrev=False)
    flags = {field.name: parser._option_string_actions[f"--{field.name}"] for field in fields(TrainingOptions)}
    for i, block in enumerate(blocks(document, "yaml")):
        (tmp_path / f"{i}.yaml").write_text(block)
        assert load_recipes([tmp_path / f"{i}.yaml"], flags, "train")


@every_guide
def test_files_named_in_the_text_exist(document):
    """What is quoted and has a folder of ours in front of it; what ends in * stands for several."""
    ours = r"`((?:samplers|training|images|pipelines|configs|accelerate_configs|benchmarks|tests)/[\w./]+)(?:::\w+)?`"
    for path in re.findall(ours, prose(document)):
        assert (REPOSITORY / path).exists(), f"{name(document)}: {path}"


# ---------------------------------------------------------------------------------------------------------- snippets


@every_document
def test_python_snippets_are_python(document):
    for block in blocks(document, "python"):
        ast.parse(block)


@pytest.mark.parametrize("document", [README, REPOSITORY / "samplers" / "README.md"], ids=name)
def test_the_loop_of_five_lines_runs(document, monkeypatch):
    """As it stands there, on two batches and a network of one convolution; in it the sampler draws and learns."""
    (snippet,) = (block for block in blocks(document, "python") if "make_timestep_sampler" in block)
    monkeypatch.setitem(sys.modules, "adaptive_timesteps", samplers)  # which it is, once installed
    assert "adaptive_timesteps" in snippet
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    names = {
        "noise_scheduler": DDPMScheduler(),
        "dataloader": list(torch.rand(2, 16, 1, 8, 8) * 2 - 1),
        "device": "cpu",
        "unet": lambda images, timesteps: SimpleNamespace(sample=network(images)),
    }
    exec(snippet, names)
    names["loss"].backward()
    assert names["loss"].isfinite()
    assert network.weight.grad.isfinite().all()
    assert names["sampler"].updates == 2
    assert torch.equal(names["noise"][8:], -names["noise"][:8])


# ---------------------------------------------------------------------------------------------- what else they promise


def test_the_readme_is_short_and_has_the_test_command():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if "python -m pytest" in line] == [TEST_COMMAND]  # .ci/run takes the first


def test_every_method_has_its_row_and_every_part_is_named():
    text = (REPOSITORY / "docs" / "rivals.md").read_text()
    rows = {method: line for line, method in re.findall(r"^(\| `(\w+)` .*)$", text, re.MULTILINE)}
    assert set(rows) == set(samplers.METHODS)
    for method, parts in samplers.METHODS.items():
        for part in set(parts) - {"none", "independent"}:
            flags = (f"--{kind} {part}`" for kind in samplers.PARTS)
            assert any(name in rows[method] for name in (f"`{part}`", *flags)), (method, part)
    for part in {name for registry in samplers.PARTS.values() for name in registry}:
        assert any(name in text for name in (f"`{part}`", *(f"--{kind} {part}`" for kind in samplers.PARTS))), part


def test_where_every_method_departs_is_said_in_full():
    text = (REPOSITORY / "docs" / "rivals.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(#.*?\) \| (.*) \|$", text, re.MULTILINE)
    assert [method for method, _ in rows] == list(samplers.METHODS)
    for method, cells in rows:
        assert len(cells.split(" | ")) == 5, method  # paper, its authors' code, ours, why, what that costs
        assert all(cell.strip() for cell in cells.split(" | ")), method


def test_the_shares_of_draws_that_count_are_those_of_the_samplers():
    text = (REPOSITORY / "docs" / "rivals.md").read_text()
    rows = re.findall(r"^\| `--method (\w+)`(.*?) \| (0\.\d.*) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    for method, after, cells in rows:
        options = {"num_updates": 0} if "60,000" in after else {}
        settings = ((p, s) for p in ("epsilon", "v_prediction") for s in ("linear", "squaredcos_cap_v2"))
        for (prediction_type, schedule), cell in zip(settings, cells.split(" | "), strict=True):
            noise_scheduler = DDPMScheduler(beta_schedule=schedule)
            sampler = samplers.make_timestep_sampler(noise_scheduler, method, **options)
            sampler.sample(1)
            scale = samplers.epsilon_loss_scale(samplers.NoiseSchedule.from_scheduler(noise_scheduler), prediction_type)
            weights, p = sampler.weights * scale, sampler.probabilities
            share = float((p * weights).sum() ** 2 / (p * weights**2).sum())
            assert f"{share:.2g}" == cell, (method, prediction_type, schedule)


def recorded_tables(name):
    """[[header, *rows], ...] of the tables that compare.py has left: of equal time and of equal images, or of one."""
    record = (REPOSITORY / "benchmarks" / "results" / name / "table.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", record, re.MULTILINE)
    return [[line for line in table.splitlines() if line.startswith("| ")] for table in tables]


@pytest.mark.parametrize("name", [*COMPARISONS, *RACES, *OTHER_RACES, *FLOWS, *ABLATIONS])
def test_the_tables_of_results_are_those_of_the_records(name):
    text = "".join((REPOSITORY / "docs" / page).read_text() for page in ("results.md", "earlier_races.md"))
    for header, *rows in recorded_tables(name):
        assert "\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows]) in text


def test_the_readmes_table_is_that_of_the_records_and_leaves_out_none_of_the_best():
    columns = [(race, title) for race, titles in RACES.items() for title in titles]
    recorded = {}
    for number, (race, title) in enumerate(columns):
        header, *rows = ([cell.strip(" `") for cell in row.strip("|").split("|")] for row in recorded_tables(race)[0])
        for cells in rows:
            recorded.setdefault(cells[0], ["–"] * len(columns))[number] = cells[header.index(title)]
    rows = re.findall(r"^\| \**`(\w+)`\** \| (.*) \|$", README.read_text(), re.MULTILINE)
    shown = {method: cells.split(" | ") for method, cells in rows}
    assert {"adaptive", "ddpm"} < shown.keys()
    assert shown == {method: recorded[method] for method in shown}
    rivals = {method for method in recorded if not method.startswith("adaptive")}
    for entrants in (recorded.keys(), rivals):
        for column in range(len(columns)):
            scores = {method: float(recorded[method][column].split()[0].replace("–", "inf")) for method in entrants}
            assert min(scores.values()) == min(scores[method] for method in shown.keys() & entrants), column


def test_parameters_and_memory_are_those_of_the_record():
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "training_memory.json").read_text())
    for name, numbers in record["networks"].items():
        parameters, *gigabytes = (number / 1e9 for number in numbers.values())
        if name.startswith("U-Net"):
            assert f"{1000 * parameters:.0f} million parameters" in README.read_text()
        else:
            row = " | ".join([name.partition(",")[0], *(f"{number:.1f} GB" for number in gigabytes)])
            assert f"| {row} |" in (REPOSITORY / "docs" / "training.md").read_text()
