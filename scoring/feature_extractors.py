"""What turns images into the features whose distributions are compared.

extractor = load_extractor()                             # Inception, with which the distance is called FID
extractor = load_extractor("facebook/dinov2-large")      # any vision model of `transformers`
torch_fidelity.calculate_metrics(feature_extractor=extractor.name, ...)
"""

import hashlib
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
import torch_fidelity.registry
import transformers
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from pipelines.weights import hash_weights

INCEPTION = "inception"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the file at URL_INCEPTION_V3


@dataclass(frozen=True)
class Extractor:
    """A feature extractor that is registered with torch-fidelity.

    Attributes:
        name: under which it is registered; it holds a hash of all that decides the features, because
            torch-fidelity names its cached statistics after it.
        layer: the layer of torch-fidelity's that holds the features.
        num_features: their number, d.
        weights_path: what torch-fidelity's `feature_extractor_weights_path` has to be.
        description: the same for people: model, weights, preprocessing and pooling, as JSON has it.
    """

    name: str
    layer: str
    num_features: int
    weights_path: str
    description: dict[str, Any]

    @property
    def is_standard_inception(self) -> bool:
        """Whether these are the features with which a Fréchet distance may be called FID."""
        return self.description["weights_sha256"] == INCEPTION_SHA256


def load_extractor(name_or_path: str | None = INCEPTION, weights: str | None = None) -> Extractor:
    """Register a feature extractor with torch-fidelity, and return what is known of it, an `Extractor`.

    Args:
        name_or_path: "inception" or None; or a vision model of `transformers`, on the Hub or in a local folder.
        weights: a file with Inception's weights as torch-fidelity has them; None downloads its own.

    Raises:
        ValueError: the model or the weights cannot be found or do not fit.
    """
    if name_or_path in (None, INCEPTION):
        return _load_inception(weights)
    if weights is not None:
        raise ValueError(f"--feature_extractor_weights {weights}: only for {INCEPTION}; {name_or_path} has its own")
    return _load_transformers_model(name_or_path)


def _register(
    prefix: str, extractor_class: type[FeatureExtractorBase], identity: list[Any], **attributes: Any
) -> Extractor:
    """Make an `Extractor` named after the hash of `identity`, and register the class by that name."""
    name = f"{prefix}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]}"
    if name not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor(name, extractor_class)
    return Extractor(name, **attributes)


# ------------------------------------------------------------------------------------------------- Inception


def _load_inception(weights: str | None) -> Extractor:
    path = Path(weights).expanduser() if weights else _download_inception_weights()
    if not path.is_file():
        raise ValueError(f"--feature_extractor_weights {path}: no such file")
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run a pickle's code
        FeatureExtractorInceptionV3("check", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--feature_extractor_weights {path} is no state dict of torch-fidelity's InceptionV3: {reason}"
        ) from error
    description = {
        "model": INCEPTION,
        "features": "2048, the last average pool; logits_unbiased for the Inception Score",
        "num_features": 2048,
        "preprocessing": "resized to 299x299 as TensorFlow 1 does, then (x - 128) / 128",
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "weights_file": path.name,
    }
    identity = [description["weights_sha256"], torch_fidelity.__version__]
    return _register(
        "inception-v3",
        FeatureExtractorInceptionV3,
        identity,
        layer="2048",
        num_features=2048,
        weights_path=str(path),
        description=description,
    )


def _download_inception_weights() -> Path:
    """Path of torch-fidelity's weights, in the file where torch-fidelity itself looks for them."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # no network, no space; another file than expected
            raise ValueError(
                f"the weights of Inception cannot be downloaded ({error}): fetch {URL_INCEPTION_V3} where there is "
                "a network, and pass the file by --feature_extractor_weights"
            ) from error
    return path


# ---------------------------------------------------------------------------------------------- transformers


class TransformersExtractor(FeatureExtractorBase):
    """uint8 [N, 3, H, W] -> ([N, d] float64,), by a vision model of `transformers` and its own preprocessing.

    The features are `pooler_output`; where the model has none, or none that was trained, the class token; where
    there is none either, the mean of `last_hidden_state`. They are float64 so that all statistics of them are.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ):
        super().__init__(name, features_list)
        self.processor, self.model, missing = _read_vision_model(feature_extractor_weights_path)
        self.pooling = self._choose_pooling(missing)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        outputs = self._outputs(images)
        if self.pooling == "pooler_output":
            features = outputs.pooler_output.flatten(1)  # convolutional models have [N, d, 1, 1]
        elif self.pooling == "class token":
            features = outputs.last_hidden_state[:, 0]
        else:
            hidden = outputs.last_hidden_state
            features = hidden.mean(dim=(2, 3) if hidden.dim() == 4 else 1)
        return (features.double(),)

    def _outputs(self, images: torch.Tensor) -> ModelOutput:
        pixels = self.processor(images=images, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        pixels = pixels.to(images.device, memory_format=torch.channels_last)  # twice as fast on a CPU
        return self.model(pixel_values=pixels)

    @torch.no_grad()
    def _choose_pooling(self, missing: Iterable[str]) -> str:
        outputs = self._outputs(_example_images())
        has_trained_pooler = not any("pooler" in key for key in missing)
        if outputs.get("pooler_output") is not None and has_trained_pooler:
            return "pooler_output"
        if any(key.endswith(("cls_token", "class_embedding")) for key, _ in self.model.named_parameters()):
            return "class token"
        return "mean of last_hidden_state"

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def _read_vision_model(name_or_path: str) -> tuple[Any, PreTrainedModel, Iterable[str]]:
    """Read a model and its preprocessing: (processor, model in float32, names of the weights it came without)."""
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        model, loading = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # from the network, the Hub, the file system, or any model's reader
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--feature_extractor {name_or_path} is neither {INCEPTION!r} nor a vision model of `transformers` in a "
            f"local folder or on the Hub: {reason}"
        ) from error
    model = getattr(model, "vision_model", model)  # of a model of images and text, such as CLIP
    if model.main_input_name != "pixel_values":
        raise ValueError(f"--feature_extractor {name_or_path} takes {model.main_input_name}, not images")
    if untrained := sorted(key for key in loading["missing_keys"] if "pooler" not in key):
        raise ValueError(f"--feature_extractor {name_or_path} comes without trained weights for {untrained[0]}")
    return processor, model.eval().to(memory_format=torch.channels_last), loading["missing_keys"]


def _load_transformers_model(name_or_path: str) -> Extractor:
    try:
        extractor = TransformersExtractor("check", ["features"], name_or_path).eval()
        features, again = (extractor(_example_images())[0] for _ in range(2))
    except (RuntimeError, TypeError, AttributeError) as error:  # of a model made for anything else
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--feature_extractor {name_or_path} gives no features of images: {reason}") from error
    if not torch.allclose(features, again):  # ViT-MAE, for one, hides patches at random
        raise ValueError(f"--feature_extractor {name_or_path} gives one image different features each time")
    config = getattr(extractor.model, "config", None)
    description = {
        "model": str(name_or_path),
        "class": type(extractor.model).__name__,
        "features": extractor.pooling,
        "num_features": features.shape[1],
        "preprocessing": json.loads(extractor.processor.to_json_string()),
        "weights_sha256": hash_weights(extractor.model),
    }
    identity = [*(description[key] for key in ("class", "features", "preprocessing", "weights_sha256"))]
    identity += [config.to_json_string() if config else None, transformers.__version__]
    return _register(
        "transformers",
        TransformersExtractor,
        identity,
        layer="features",
        num_features=features.shape[1],
        weights_path=str(name_or_path),
        description=description,
    )


def _example_images() -> torch.Tensor:
    """Two images of noise, uint8 [2, 3, 64, 64], to try an extractor on."""
    return torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
