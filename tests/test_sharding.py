"""What the training loop does to weights that FSDP2 has sharded, on two CPU processes."""

import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY, forked, run_two_ranks
from diffusers import UNet2DModel
from tiny_networks import tiny_dit

WORKER = """
import copy
import os
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.ema import WeightAverage
from training.nonfinite import NonFiniteGuard
from training.sharding import full_tensor
from tiny_networks import tiny_dit

folder, sharded = sys.argv[1], sys.argv[2] == "sharded"
torch.manual_seed(0)
if sys.argv[3] == "transformer":
    model = tiny_dit(is_shared=True)
    timesteps, labels = torch.arange(4), torch.tensor([0, 1, 1000, 3])
    run = lambda x: model(x[:, :1, None, None].expand(4, 1, 8, 8), timesteps, labels).sample
else:
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.SiLU(), torch.nn.Linear(10, 3))
    run = model
if sharded:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in ("Attention", "FeedForward"):  # as accelerate_configs/fsdp_dit.yaml
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, fused=True)  # or rounding would decide signs
guard = NonFiniteGuard(optimizer, "cpu", scaled=False, max_in_row=5)
ema = WeightAverage(model.parameters(), use_ema_warmup=True)


def train(steps):
    for step in range(steps):
        x = torch.ones(4, 6) * (float("nan") if step == 2 else step + 1)
        run(x).square().mean().backward()
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        guard.observe(norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())


train(4)
state = copy.deepcopy(ema.state_dict())  # a state dict shares memory with what it is the state of
train(3)
fresh = WeightAverage(model.parameters(), use_ema_warmup=True)
fresh.load_state_dict(state)
restored = [full_tensor(p).clone() for p in fresh.shadow_params]
fresh.step(model.parameters())
out = {
    "weights": [full_tensor(p.detach()) for p in model.parameters()],
    "average": [full_tensor(p) for p in ema.shadow_params],
    "saved": state["shadow_params"], "restored": restored, "stepped": [full_tensor(p) for p in fresh.shadow_params],
    "skipped": guard.check(),
}
if not sharded or torch.distributed.get_rank() == 0:
    torch.save(out, f"{folder}/{sys.argv[2]}.pt")
if sharded:
    torch.distributed.barrier()
    os._exit(0)  # PyTorch's threads may outlive the interpreter's end, which then aborts: in up to one run of ten
"""


@pytest.mark.parametrize(("config", "network"), [("fsdp", "unet"), ("fsdp_dit", "dit")])
def test_fsdp_wraps_blocks_that_the_network_has(config, network):
    config = yaml.safe_load((REPOSITORY / "accelerate_configs" / f"{config}.yaml").read_text())["fsdp_config"]
    if network == "unet":
        attention = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D",) * 2}
        network = UNet2DModel(sample_size=8, block_out_channels=(32, 64), **attention)
    else:
        network = tiny_dit()
    names = {type(module).__name__ for module in network.modules()}
    assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= names


@pytest.mark.parametrize("network", ["linear", "transformer"])
def test_sharded_weights_train_average_and_save_as_whole_ones(tmp_path, network):
    run_two_ranks(tmp_path, WORKER, tmp_path, "sharded", network)
    whole = forked([sys.executable, tmp_path / "worker.py", tmp_path, "whole", network])
    assert whole.returncode == 0, whole.stderr
    whole, sharded = (torch.load(tmp_path / f"{kind}.pt") for kind in ("whole", "sharded"))
    assert whole["skipped"] == sharded["skipped"] == 2
    torch.testing.assert_close(sharded, whole)
    torch.testing.assert_close(sharded["restored"], sharded["saved"], rtol=0, atol=0)
