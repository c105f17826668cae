"""What the training loop does to weights that FSDP2 has sharded, on two CPU processes."""

import sys

import torch
import yaml
from conftest import REPOSITORY, forked, run_two_ranks
from diffusers import UNet2DModel

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

folder, sharded = sys.argv[1], sys.argv[2] == "sharded"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.SiLU(), torch.nn.Linear(10, 3))
if sharded:
    torch.distributed.init_process_group("gloo")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
guard = NonFiniteGuard(optimizer, "cpu", scaled=False, max_in_row=5)
ema = WeightAverage(model.parameters(), use_ema_warmup=True)


def train(steps):
    for step in range(steps):
        x = torch.ones(4, 6) * (float("nan") if step == 2 else step + 1)
        model(x).square().mean().backward()
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


def test_fsdp_wraps_blocks_that_the_network_has():
    config = yaml.safe_load((REPOSITORY / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    names = {type(module).__name__ for module in unet.modules()}
    assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= names


def test_sharded_weights_train_average_and_save_as_whole_ones(tmp_path):
    run_two_ranks(tmp_path, WORKER, tmp_path, "sharded")
    whole = forked([sys.executable, tmp_path / "worker.py", tmp_path, "whole"])
    assert whole.returncode == 0, whole.stderr
    whole, sharded = (torch.load(tmp_path / f"{kind}.pt") for kind in ("whole", "sharded"))
    assert whole["skipped"] == sharded["skipped"] == 2
    torch.testing.assert_close(sharded, whole)
    torch.testing.assert_close(sharded["restored"], sharded["saved"], rtol=0, atol=0)
