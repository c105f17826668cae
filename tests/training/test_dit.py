"""The transformer that is trained: the paper's, where diffusers' class is not."""

import json
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny_networks import tiny_dit

from pipelines import choose_kernels
from pipelines.checks import check_forward
from training.dit import NUM_LABELS, PRESETS, dit_config, make_dit
from training.memory import activation_memory, training_memory, warn_of_memory
from training.network import build_network, network_on_meta
from training.options import ModelOptions

SMALL = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return make_dit(dit_config({}, SMALL, channels=4, resolution=8))


@pytest.mark.parametrize(
    ("preset", "millions"),  # table 1 of the paper, and DiT-XL/2's 675 M
    [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)],
)
def test_sizes_are_the_papers(preset, millions):
    dit = network_on_meta(dit_config({}, PRESETS[preset], channels=4, resolution=32, num_classes=1000))
    assert sum(parameter.numel() for parameter in dit.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    check_forward(dit, (4, 32, 32))
    assert dit.config.patch_size == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_makes_what_it_is_shown(preset):
    dit = network_on_meta(dit_config({}, PRESETS[preset], channels=4, resolution=32))
    check_forward(dit, (4, 32, 32))
    assert f"/{dit.config.patch_size}" in preset


def test_without_a_shared_embedding_it_is_much_larger():
    """What diffusers' class has, and the paper has not: an embedding in each of XL's 28 blocks."""
    config = dit_config({}, PRESETS["DiT-XL/2"], channels=4, resolution=32)
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(**config)
    ours = network_on_meta(config)
    width = 28 * 27 / 28 * 1152  # of 27 embeddings that are shared
    extra = width * (NUM_LABELS + 1) + width * (256 + 1) + width * (1152 + 1)
    counts = [sum(p.numel() for p in network.parameters()) for network in (theirs, ours)]
    assert counts[0] - counts[1] == extra


def test_blocks_share_one_embedding_and_withhold_no_label(dit):
    embeddings = {id(block.norm1.emb) for block in dit.transformer_blocks}
    assert len(embeddings) == 1
    dit.train()
    dropped = dit.transformer_blocks[0].norm1.emb.class_embedder
    labels = torch.arange(NUM_LABELS + 1)
    assert torch.equal(dropped(labels), dropped.embedding_table(labels))
    assert dropped.embedding_table.weight.shape == (NUM_LABELS + 1, 32)


def test_at_first_blocks_are_the_identity_and_the_output_is_zero(dit):
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1000])
    tokens = dit.pos_embed(x)
    for block in dit.transformer_blocks:
        assert torch.equal(block(tokens, timestep=t, class_labels=labels), tokens)
    assert not dit(x, t, labels).sample.any()


def test_initial_weights_are_the_papers(dit):
    """Bounds of Xavier's uniform distribution: sqrt(6 / (inputs + outputs)) of the layer as the paper has it."""
    width = 32
    block = dit.transformer_blocks[1]
    bounds = {
        block.attn1.to_q: math.sqrt(6 / (width + 3 * width)),  # one layer for queries, keys and values
        block.attn1.to_v: math.sqrt(6 / (width + 3 * width)),
        block.attn1.to_out[0]: math.sqrt(6 / (2 * width)),
        block.ff.net[0].proj: math.sqrt(6 / (width + 4 * width)),
        dit.pos_embed.proj: math.sqrt(6 / (4 * 2 * 2 + width)),
    }
    for layer, bound in bounds.items():
        assert layer.weight.detach().abs().max() == pytest.approx(bound, rel=0.05)
        assert layer.weight.detach().std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not layer.bias.any()
    embedding = block.norm1.emb
    for table in (embedding.class_embedder.embedding_table, embedding.timestep_embedder.linear_1):
        assert table.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    for layer in (block.norm1.linear, dit.proj_out_1, dit.proj_out_2):
        assert not layer.weight.any()
        assert not layer.bias.any()


def test_a_label_and_none_make_a_difference():
    dit, x, t = tiny_dit(), torch.randn(1, 1, 8, 8), torch.tensor([5])
    outputs = [dit(x, t, torch.tensor([label])).sample for label in (0, 1, NUM_LABELS)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def options(model="dit", **dit):
    options = ModelOptions(model=model)
    options.dit.update(dit)
    return options


def test_settings_go_over_the_preset():
    assert build_network(options(num_layers=1), 1, 8).config.num_layers == 1
    with torch.device("meta"):
        network = build_network(options("DiT-B/4", dropout=0.2), 3, 16, num_classes=7)
    assert (network.config.num_layers, network.config.patch_size, network.config.dropout) == (12, 4, 0.2)
    assert (network.config.num_embeds_ada_norm, network.config.out_channels) == (1000, 3)


@pytest.mark.parametrize(
    ("settings", "classes", "message"),
    [
        ({"num_embeds_ada_norm": 10}, 10, "--dit num_embeds_ada_norm 10: DiTPipeline needs 1000"),
        ({"sample_size": 9}, None, "--dit sample_size 9: the images decide that, which have 8"),
        ({"patch_size": 3}, None, "--dit patch_size 3: does not divide .* 8"),
        ({"num_layers": "a"}, None, '--dit {"num_layers": "a"}: DiTTransformer2DModel cannot use it'),
        ({"depth": 3}, None, '--dit {"depth": 3}: DiTTransformer2DModel cannot use it: TypeError'),
        ({"attention_head_dim": 7, "num_attention_heads": 1}, None, "DiTTransformer2DModel cannot use it"),
        ({}, 1001, "--class_conditional: 1,001 classes, and a DiT has 1,000 at most"),
    ],
)
def test_what_cannot_work_is_refused(settings, classes, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_network(options(**settings), 1, 8, classes)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for is_on in (False, True):
        given = options(**SMALL, dropout=0.1)
        given.gradient_checkpointing = is_on
        torch.manual_seed(0)
        network = build_network(given, 1, 8)
        network.proj_out_2.weight.data.normal_()
        for block in network.transformer_blocks:
            block.norm1.linear.weight.data.normal_(std=0.1)
        torch.manual_seed(1)
        network(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 1000])).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert any(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_saved_settings_go_on_at_another_size(tmp_path):
    """Also those of facebook/DiT-XL-2-256: of diffusers' former class, with a learned variance."""
    tiny_dit(channels=3).save_pretrained(tmp_path / "saved")
    given = options(num_layers=3)
    given.model_config_name_or_path = str(tmp_path / "saved")
    network = build_network(given, channels=1, resolution=16)
    assert (network.config.num_layers, network.config.attention_head_dim, network.config.sample_size) == (3, 8, 16)
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "out_channels": 6}
    path.write_text(json.dumps(config | {"cross_attention_dim": None, "num_vector_embeds": None}))
    assert build_network(given, channels=1, resolution=16).config.out_channels == 1


def test_the_settings_of_another_network_are_refused_with_the_flag_for_them(tmp_path):
    given = ModelOptions(model_config_name_or_path=str(tmp_path))
    tiny_dit().save_pretrained(tmp_path / "transformer")  # as in a pipeline's folder
    with pytest.raises(ValueError, match=r"no UNet2DModel's config, but a DiTTransformer2DModel's \(--model dit\)"):
        build_network(given, 1, 8)


def test_what_is_compiled_need_not_be_a_unet(monkeypatch):
    """Group normalisation is fused where there is any."""
    dit, x, t, labels = tiny_dit(), torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])
    expected, compiled = dit(x, t, labels).sample, []
    monkeypatch.setattr(dit, "compile", lambda mode: compiled.append(mode))
    choose_kernels(dit, torch.device("cpu"), "bf16", compiled=True)
    assert compiled == [None]
    torch.testing.assert_close(dit(x, t, labels).sample, expected)


# Memory


@pytest.mark.parametrize("is_on", [False, True])
def test_what_a_step_keeps_is_counted_without_computing_it(is_on):
    """The same on the meta device and with real tensors; and much less where blocks are computed again."""
    config = dit_config({"num_layers": 8}, SMALL, channels=4, resolution=8)
    found = []
    for network in (network_on_meta(config), make_dit(config)):
        if is_on:
            network.enable_gradient_checkpointing()
        found.append(activation_memory(network.train(), (4, 8, 8), batch_size=2))
    assert found[0] == pytest.approx(found[1], rel=0.1)  # devices differ in what attention keeps
    assert found[0] > 2 * 16 * 32 * 4  # tokens of a block
    whole = activation_memory(network_on_meta(config).train(), (4, 8, 8), batch_size=2)
    assert (found[0] < whole / 4) == is_on


def test_xl_takes_the_memory_that_its_sizes_say(caplog):
    network = network_on_meta(dit_config({}, PRESETS["DiT-XL/2"], channels=4, resolution=32)).train()
    weights = 20 * 674.8e6  # weights, gradients, average and Adam's moments
    tokens = 32 * 256 * 1152 * 4  # of a block
    needed = training_memory(network, (4, 32, 32), batch_size=32, is_half=False)
    assert 28 * 15 * tokens < needed - weights < 28 * 35 * tokens
    network.enable_gradient_checkpointing()
    assert 28 * tokens < training_memory(network, (4, 32, 32), 32, is_half=False) - weights < 28 * 2 * tokens
    warn_of_memory(network, (4, 32, 32), 32, False, available=80 * 10**9)
    assert not caplog.messages
    warn_of_memory(network, (4, 32, 32), 32, False, available=10**10)
    assert "--train_batch_size 32: training takes about 14.7 GB, and the device has 10.0 GB" in caplog.messages[0]
