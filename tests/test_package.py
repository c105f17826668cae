"""`pip install .` gives one package, `adaptive_timesteps`, that needs PyTorch alone."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

import samplers

MODULES = sorted(path.stem for path in (REPOSITORY / "samplers").glob("*.py") if path.stem != "__init__")

USE_IT = """
import sys

wheel, torch_alone = sys.argv[1:]
sys.path += [wheel, torch_alone]  # after the standard library, which is all there is
import importlib.util
import json
import types

import torch
import adaptive_timesteps

noise_scheduler = types.SimpleNamespace(alphas_cumprod=torch.linspace(0.9999, 0.01, 100))  # nobody's class
images = torch.rand(16, 1, 8, 8) * 2 - 1
drawn = {}
for method in adaptive_timesteps.METHODS:
    # SpeeD's boundary does not exist on this schedule
    options = {"timestep_sampler": "uniform", "loss_weighting": "none"} if method == "speed" else {}
    sampler = adaptive_timesteps.make_timestep_sampler(noise_scheduler, method, images=images, **options)
    timesteps, weights = sampler.sample(16)
    noise = sampler.noise(images)
    losses = sampler.losses(noise, timesteps)
    sampler.update(timesteps, losses)
    drawn[method] = [float(timesteps.min()), float(timesteps.max()), float((weights * losses).mean())]
others = "samplers training images pipelines diffusers accelerate transformers datasets torchvision numpy".split()
print(json.dumps({
    "file": adaptive_timesteps.__file__,
    "version": adaptive_timesteps.__version__,
    "drawn": drawn,
    "also there": [name for name in others if importlib.util.find_spec(name)],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `pip install .` would install, of a copy: a build leaves folders beside what it builds."""
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools, to build without the network")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools >= 77 to build, and here is {setuptools.__version__}")
    checkout, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, checkout)
    for file in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py")]:  # all packages that could get into it
        (checkout / file.relative_to(REPOSITORY)).parent.mkdir(exist_ok=True)
        shutil.copy(file, checkout / file.relative_to(REPOSITORY))
    for name in ("py.typed", "README.md"):
        shutil.copy(REPOSITORY / "samplers" / name, checkout / "samplers")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", built]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    if "No module named pip" in run.stderr:
        pytest.skip("needs pip, to build a wheel")
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    """The wheel's files, as an installation has them."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    """A folder with links to what `pip install torch` brings, and to nothing else of this environment."""
    folder, seen, todo = tmp_path_factory.mktemp("torch_alone"), set(), ["torch"]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform's
            continue
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return folder


def test_the_wheel_holds_the_samplers_and_nothing_else(unpacked):
    package = unpacked / "adaptive_timesteps"
    (information,) = (path for path in unpacked.iterdir() if path != package)
    assert information.name == f"adaptive_timesteps-{samplers.__version__}.dist-info"
    names = {path.name for path in package.rglob("*")}
    assert names == {"py.typed", "__init__.py", *(f"{name}.py" for name in MODULES)}
    assert list(information.rglob("LICENSE"))


def test_its_metadata_names_torch_alone(unpacked):
    (information,) = unpacked.glob("*.dist-info")
    about = metadata.Distribution.at(information).metadata
    assert about["Name"] == "adaptive-timesteps"
    assert about["Version"] == samplers.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert [Requirement(line).name for line in about.get_all("Requires-Dist")] == ["torch"]
    assert "from adaptive_timesteps import" in about.get_payload()  # samplers/README.md, with the snippet


def test_torch_is_asked_for_as_in_the_requirements(unpacked):
    (information,) = unpacked.glob("*.dist-info")
    (needed,) = metadata.Distribution.at(information).requires
    assert needed in (REPOSITORY / "requirements.txt").read_text().splitlines()


def test_it_draws_timesteps_where_there_is_nothing_but_torch(unpacked, torch_alone, tmp_path):
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", USE_IT, unpacked, torch_alone]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert Path(told["file"]).parent == unpacked / "adaptive_timesteps"
    assert told["version"] == samplers.__version__
    assert told["also there"] == []
    assert set(told["drawn"]) == set(samplers.METHODS)
    for first, last, loss in told["drawn"].values():
        assert 0 <= first < last < 100
        assert 0 < loss < float("inf")


def test_it_trains_the_networks_of_trainers_in_use_by_their_lines(unpacked, monkeypatch):
    """SD3's, Flux's, Stable Diffusion's and Wan's at toy size, in the loops of docs/integrations.md."""
    monkeypatch.syspath_prepend(unpacked)
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "integrations")
    package, loops = importlib.import_module("adaptive_timesteps"), importlib.import_module("test_trainers")
    assert Path(package.__file__).parent == unpacked / "adaptive_timesteps"
    for name in ("train_dreambooth_lora_sd3", "train_dreambooth_lora_flux", "train_text_to_image, v", "Wan"):
        trainer = loops.TRAINERS[name]
        own = {"loss_weighting": trainer.plain_weighting, "error_filter": "none", "gradient_accumulation_steps": 2}
        sampler = package.make_timestep_sampler(trainer.noise_scheduler, "adaptive", **own)
        network = trainer.make_network()
        before = [p.detach().clone() for p in network.parameters()]
        assert all(loss.isfinite() for loss, _ in loops.update(trainer, network, sampler))
        assert sum(loops.moved(before, network)) > len(before) / 2


def public_functions(module):
    """(name, function) of what a module defines without a leading underscore, and the constructors."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for attribute, member in vars(value).items():
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                public = not attribute.startswith("_") or attribute in ("__init__", "__call__")
                if public and inspect.isfunction(member) and member.__module__ == module.__name__:
                    yield f"{name}.{attribute}", member


@pytest.mark.parametrize("name", ["__init__", *MODULES])
def test_all_that_is_public_is_annotated(name):
    """py.typed says so: a type checker then takes what has no annotation for unknown."""
    module = importlib.import_module("samplers" if name == "__init__" else f"samplers.{name}")
    for function_name, function in public_functions(module):
        named = {each for each in inspect.signature(function).parameters if each not in ("self", "cls")}
        assert named | {"return"} <= get_type_hints(function).keys(), f"{name}.{function_name}"


def test_every_part_can_be_imported_from_the_package():
    parts = [*samplers.TIMESTEP_SAMPLERS.values(), *samplers.NOISE_COUPLINGS.values(), samplers.frequency]
    assert {part.__name__ for part in parts} <= set(samplers.__all__)
    assert all(hasattr(samplers, name) for name in samplers.__all__)
