"""Feature extractors: how they pool, which are refused, what they are named, and their use in a training loop."""

from urllib.error import URLError

import pytest
import torch
import transformers
from scoring_helpers import TINY_VIT, noise, save_model, tiny_vit

import feature_extractors
from feature_extractors import load_extractor, make_frechet_metric
from images import open_images

pytest_plugins = ["scoring_fixtures"]


def test_features_are_pooled_as_the_model_was_trained(tmp_path):
    vit = transformers.ViTModel(tiny_vit())
    headless = transformers.ViTModel(tiny_vit(), add_pooling_layer=False)
    segformer = transformers.SegformerModel(
        transformers.SegformerConfig(hidden_sizes=[8] * 4, num_attention_heads=[2] * 4)
    )
    for model, expected, pool in [
        (vit, "pooler_output", lambda outputs: outputs.pooler_output),
        (headless, "class token", lambda outputs: outputs.last_hidden_state[:, 0]),
        (segformer, "mean of last_hidden_state", lambda outputs: outputs.last_hidden_state.mean((2, 3))),
    ]:
        images = noise(3, 64)
        extractor = load_extractor(save_model(model.eval(), tmp_path / expected))
        assert extractor.description["features"] == expected
        assert extractor.num_features == 8
        with torch.no_grad():
            by_hand = pool(model((images / 255 - 0.5) / 0.5)).double()
        features = feature_extractors.FeatureVectors(extractor)(images)
        torch.testing.assert_close(features, by_hand, rtol=1e-4, atol=1e-5)


def test_models_that_cannot_serve_are_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**TINY_VIT, image_size=64, patch_size=8, initializer_range=0.5)
    mae = transformers.ViTMAEModel(config)
    with pytest.raises(ValueError, match="different features each time"):
        load_extractor(save_model(mae, tmp_path / "mae"))
    broken = transformers.ViTModel(tiny_vit())
    state = {name: value for name, value in broken.state_dict().items() if "embeddings" not in name}
    broken.save_pretrained(tmp_path / "broken", state_dict=state)
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="without trained weights for embeddings"):
        load_extractor(str(tmp_path / "broken"))


def test_other_weights_or_preprocessing_have_another_name(tmp_path):
    def name(folder, seed, **preprocessing):
        torch.manual_seed(seed)
        model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / folder)
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}, **preprocessing).save_pretrained(model)
        return load_extractor(model).name

    assert name("a", seed=0) == name("b", seed=0)
    assert len({name("a", seed=0), name("a", seed=1), name("a", seed=0, resample=0)}) == 3


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def fail(*_):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match="pass the file by --feature_extractor_weights"):
        load_extractor()


def test_the_metric_of_the_training_loop_gives_the_same_value(regnet, photos, score):
    expected = score(
        "--input1", photos / "a", "--input2", photos / "b", "--metrics", "fid", "--feature_extractor", regnet
    )["values"]["fd"]
    generated, real = (open_images(str(photos / name)).decode_all(show_progress=False) for name in "ab")
    metric = make_frechet_metric(regnet).train()
    for batch in real.split(100):
        metric.update(batch, real=True)
    for _ in range(2):  # the second time without the real images
        for batch in generated.split(150):
            with torch.autocast("cpu", torch.bfloat16):
                metric.update(batch, real=False)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
        metric.reset()


def test_grey_images_are_compared_as_rgb(regnet):
    grey = noise(4, 32, channels=1)
    metric = make_frechet_metric(regnet)
    metric.update(grey, real=True)
    metric.update(grey.expand(-1, 3, -1, -1), real=False)
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_inception_in_the_training_loop(random_inception):
    metric = make_frechet_metric(weights=random_inception)
    assert metric.inception(noise(2)).shape == (2, 2048)
