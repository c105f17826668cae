"""`samplers/` alone, copied into somebody else's training script, works with a few changed lines."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLERS = Path(__file__).resolve().parents[1] / "samplers"

FOREIGN_SCRIPT = """
import json
import pathlib
import torch
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
import samplers
from samplers import make_timestep_sampler

torch.manual_seed(0)
torch.set_num_threads(1)
images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
noise_scheduler = DDPMScheduler()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleList(torch.nn.Conv2d(i, 24, 3, padding=1) for i in (1, 24, 24))
        self.time = torch.nn.ModuleList(torch.nn.Linear(16, 24) for _ in range(3))
        self.out = torch.nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, x, t):
        phases = t[:, None] / 1000 * 2.0 ** torch.arange(8)
        code = torch.cat([phases.sin(), phases.cos()], 1)
        for conv, time in zip(self.body, self.time):
            x = torch.nn.functional.silu(conv(x) + time(code)[:, :, None, None])
        return self.out(x)


net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
sampler = make_timestep_sampler(noise_scheduler, "adaptive", images=images[:64])  # (1)


@torch.no_grad()
def validate():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator)
    t = torch.randint(1000, (len(images),), generator=generator)
    return float((net(noise_scheduler.add_noise(images, noise, t), t) - noise).square().mean())


before = validate()
for step in range(240):
    clean = images[torch.randint(len(images), (64,))]
    noise = sampler.noise(clean)
    timesteps, weights = sampler.sample(len(clean))  # (2) was: torch.randint(1000, (64,))
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    losses = sampler.losses(net(noisy, timesteps) - noise, timesteps)  # (3) was: (...).square().mean((1, 2, 3))
    sampler.update(timesteps, losses.detach())  # (4), and the weights in the next line
    (weights * losses).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

json.dump({
    "before": before,
    "after": validate(),
    "moved": float((sampler.probabilities - 1e-3).abs().sum() / 2),
    "samplers": str(pathlib.Path(samplers.__file__).parent),
}, open("result.json", "w"))
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """What a training script found that has nothing of this repository but a copy of `samplers/`."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(SAMPLERS, folder / "samplers", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "train.py").write_text(FOREIGN_SCRIPT)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "train.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return folder, json.loads((folder / "result.json").read_text())


def test_a_foreign_loop_uses_the_copy_and_nothing_else_of_ours(foreign):
    folder, result = foreign
    assert Path(result["samplers"]) == folder / "samplers"


def test_a_foreign_loop_learns(foreign):
    _, result = foreign
    assert result["after"] < 0.4 * result["before"]


def test_a_foreign_loops_density_moves_off_uniform(foreign):
    _, result = foreign
    assert 0.05 < result["moved"] < 1


def imported_modules(file):
    """Top-level modules that a file imports; "." for its own package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot stays inside the folder; two would leave it.
            yield node.module.split(".")[0] if not node.level else "." * node.level


@pytest.mark.parametrize("file", sorted(SAMPLERS.rglob("*.py")), ids=lambda file: file.name)
def test_samplers_import_torch_and_themselves_alone(file):
    assert set(imported_modules(file)) <= {"torch", ".", *sys.stdlib_module_names}
