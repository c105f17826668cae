"""Which weights are finite, and which weights they are."""

import torch
from tiny_networks import tiny_unet

from pipelines.weights import are_finite, hash_weights, nonfinite_weights


def test_weights_that_are_not_finite_are_named():
    unet = tiny_unet()
    assert nonfinite_weights(unet) == []
    with torch.no_grad():
        unet.conv_out.bias[0] = torch.inf
        unet.conv_in.weight[0] = torch.nan
    assert sorted(nonfinite_weights(unet)) == ["conv_in.weight", "conv_out.bias"]
    assert are_finite([torch.ones(2), torch.tensor([1.0, -torch.inf]), torch.arange(3)]).tolist() == [True, False, True]


def test_a_hash_is_of_names_and_values_and_what_is_put_before_them():
    assert hash_weights(tiny_unet()) == hash_weights(tiny_unet())
    others = [tiny_unet(seed=1), tiny_unet(channels=3), torch.nn.Sequential(tiny_unet())]
    hashes = {hash_weights(module) for module in [tiny_unet(), *others]} | {hash_weights(tiny_unet(), "config")}
    assert len(hashes) == 5
