"""Loads a pipeline from a folder or the Hub, or says in one line what is wrong with it.

A folder may come from anyone: none of the code in it is run, whatever its model_index.json names.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel, UNet2DModel

from pipelines.checks import check_forward, check_scheduler, check_vae_config, image_shape, sample_shape
from pipelines.class_conditional import MODULE, ClassConditionalPipeline, is_transformer, null_label, read_id2label
from pipelines.denoising import SCHEDULERS
from pipelines.kinds import Pipeline, make_pipeline
from pipelines.weights import nonfinite_weights

SCHEDULER_NAMES = [scheduler.__name__ for scheduler in SCHEDULERS.values()]
CLASS_CONDITIONAL = [MODULE, ClassConditionalPipeline.__name__]
COMPONENTS = {  # {class in model_index.json: class}; facebook/DiT-XL-2-256 has diffusers' former name
    "UNet2DModel": UNet2DModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
    "Transformer2DModel": DiTTransformer2DModel,
    "AutoencoderKL": AutoencoderKL,
}
NETWORKS, VAES = {"unet", "transformer"}, {"vae", "vqvae"}  # names of components
COMPONENT_CLASSES = {
    "unet": UNet2DModel,
    "transformer": DiTTransformer2DModel,
    "vae": AutoencoderKL,
    "vqvae": AutoencoderKL,  # of an LDMPipeline
}

MAX_TRAIN_TIMESTEPS = 10**6  # more is a typing error, and its tables could exhaust the memory
# diffusers' names: diffusion_pytorch_model[.VARIANT][-00001-of-00002].safetensors; older shards had the variant last
WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<new>\w+))?(-\d+-of-\d+)?(\.(?P<old>\w+))?\.(?P<format>safetensors|bin)", re.ASCII
)


class PipelineConfigs(NamedTuple):
    """What there is to know of a pipeline without its weights.

    Attributes:
        networks: {subfolder: (class, config)} of its network, and of its VAE if it has one.
        scheduler: made of its config.
        id2label: {0: "airplane", ...} the classes; None of an unconditional pipeline.
    """

    networks: dict[str, tuple[type, dict[str, Any]]]
    scheduler: DDPMScheduler | DDIMScheduler
    id2label: dict[int, str] | None

    @property
    def network(self) -> dict[str, Any]:
        """The config of the network that denoises."""
        return next(config for name, (_, config) in self.networks.items() if name in NETWORKS)

    @property
    def vae(self) -> dict[str, Any] | None:
        """The VAE's config; None of a pipeline whose network makes images."""
        return next((config for name, (_, config) in self.networks.items() if name in VAES), None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return image_shape(self.network, self.vae)


def load_pipeline(name_or_path: str, variant: str | None = None) -> Pipeline:
    """The pipeline of a folder or Hub id, in float32, whatever precision its files have.

    Args:
        variant: which of several files of weights, as in diffusers: "fp16" for diffusion_pytorch_model.fp16.*.

    Raises:
        ValueError: weights that are absent, cannot be read, do not fit the network's config or are not finite.
        ValueError, NotImplementedError, OSError: see `load_configs`.
    """
    configs = load_configs(name_or_path)
    check_variant(name_or_path, variant)
    loaded = {
        name: load_network(component, name_or_path, name, variant) for name, (component, _) in configs.networks.items()
    }
    vae = next((module for name, module in loaded.items() if name in VAES), None)
    network = next(module for name, module in loaded.items() if name in NETWORKS)
    return make_pipeline(network, configs.scheduler, configs.id2label, vae)


def load_network(component: type, name_or_path: str, name: str, variant: str | None = None) -> torch.nn.Module:
    """A component of a pipeline, with its weights in float32.

    Raises:
        ValueError: weights that are absent, cannot be read, do not fit its config or are not finite.
    """
    subfolder = load_component_config(component, name_or_path, name)[1]
    formats = weight_variants(name_or_path, name).get(variant, set()) if os.path.isdir(name_or_path) else set()
    with one_kind_of_error(f"{name_or_path}: its weights cannot be loaded"):
        module = component.from_pretrained(
            name_or_path,
            subfolder=subfolder,
            variant=variant,
            use_safetensors=False if formats == {"bin"} else None,  # on its own, diffusers does not find .bin shards
        )
    # diffusers leaves what the file lacks without any memory
    if missing := [name for name, tensor in module.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"{name_or_path}: its weights lack {shortened(missing)}, which its config asks for")
    if names := nonfinite_weights(module):
        raise ValueError(f"{name_or_path}: its weights are not finite (NaN or infinity): {shortened(names)}")
    return module.float()


def check_variant(name_or_path: str, variant: str | None) -> None:
    """Refuse a folder without the weights asked for, naming those that it has; a Hub id is left to diffusers."""
    if not os.path.isdir(name_or_path):
        return
    for name in load_configs(name_or_path).networks:
        found = weight_variants(name_or_path, name)
        if not found:
            raise ValueError(f"{name_or_path} has no weights ({name}/diffusion_pytorch_model.safetensors or .bin)")
        if variant not in found:
            asked = "weights without a variant" if variant is None else f"weights of variant {variant!r}"
            alternatives = (f"--variant {other}" if other else "no --variant" for other in sorted(found, key=str))
            raise ValueError(f"{name_or_path} has no {asked}, but those for {' or '.join(alternatives)}")


def weight_variants(folder: str, name: str) -> dict[str | None, set[str]]:
    """{variant, or None for weights without one: formats, of safetensors and bin} of a component of a pipeline."""
    subfolder = os.path.join(folder, name)
    names = os.listdir(subfolder if os.path.isdir(subfolder) else folder)
    variants = {}
    for match in filter(None, map(WEIGHTS.fullmatch, names)):
        variants.setdefault(match["new"] or match["old"], set()).add(match["format"])
    return variants


def load_configs(name_or_path: str) -> PipelineConfigs:
    """The configs of a pipeline folder or Hub id; reads no weights.

    Raises:
        ValueError: other components than a network, a DDPM or DDIM scheduler and perhaps an AutoencoderKL, classes
            other than the network's, or a config with which no image can be made.
        NotImplementedError: a scheduler of a kind that is not implemented here.
        OSError: no such folder, or no such id on the Hub.
    """
    index, components = load_index(name_or_path)
    networks = {}
    for name, component in components.items():
        with one_kind_of_error(f"{name_or_path}/{name}"):
            config, _ = load_component_config(component, name_or_path, name)
            if name in VAES:
                config = complete_vae_config(config)
            else:
                check_network_config(component, config)
            networks[name] = component, config
    configs = PipelineConfigs(networks, None, None)
    with one_kind_of_error(f"{name_or_path}/vae"):
        configs.image_shape  # noqa: B018  which refuses a VAE of other latents than the network's
    with one_kind_of_error(f"{name_or_path}/model_index.json"):
        id2label = read_classes(index, configs.network)
    with one_kind_of_error(f"{name_or_path}/scheduler"):
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        config, _ = load_component_config(scheduler_class, name_or_path, "scheduler")
        check_train_timesteps(config)
        scheduler = scheduler_class.from_config(config)
        check_scheduler(scheduler)
    return configs._replace(scheduler=scheduler, id2label=id2label)


def load_index(name_or_path: str) -> tuple[dict[str, Any], dict[str, type]]:
    """The content of model_index.json, of a pipeline of a kind that is known here, and {name: class} of its network
    and VAE."""
    with one_kind_of_error(f"{name_or_path}/model_index.json"):
        index = DiffusionPipeline.load_config(name_or_path)
        kind = index["_class_name"]
        lists = {name: value for name, value in index.items() if isinstance(value, list | tuple)}
        found = {name: value[1] for name, value in lists.items() if name != "_class_name" and value[1] is not None}
    has_own_code = "_class_name" in lists and kind != CLASS_CONDITIONAL
    components = {name: COMPONENTS.get(value) for name, value in found.items() if name != "scheduler"}
    is_known = all(component and component is COMPONENT_CLASSES.get(name) for name, component in components.items())
    one_of_each = len(NETWORKS & components.keys()) == 1 and len(VAES & components.keys()) <= 1
    if has_own_code or found.get("scheduler") not in SCHEDULER_NAMES or not is_known or not one_of_each:
        listed = ", ".join(f"{name}={kind}" for name, kind in sorted(found.items())) or "nothing"
        raise ValueError(
            f"{name_or_path} is a {kind} of {listed}; the pipelines loaded here are diffusers' own and "
            f"{CLASS_CONDITIONAL[1]}, and have unet=UNet2DModel or transformer=DiTTransformer2DModel, perhaps "
            f"vae=AutoencoderKL, and scheduler={' or '.join(SCHEDULER_NAMES)}"
        )
    return index, components


def read_classes(index: dict[str, Any], network_config: dict[str, Any]) -> dict[int, str] | None:
    """{number: name} of the classes of a pipeline, which must be those of its network; None if it is unconditional."""
    kind, id2label = index["_class_name"], index.get("id2label")
    is_dit = is_transformer(network_config)
    if kind != CLASS_CONDITIONAL and not is_dit:
        if null_label(network_config) is not None:
            raise ValueError(f"the UNet2DModel is class-conditional, and a {kind} does not name the classes")
        return None
    if id2label is None and not is_dit:
        raise ValueError(f"a {kind[1]} must have id2label, the names of the classes")
    return read_id2label(id2label, network_config)


def load_component_config(component: type, name_or_path: str, subfolder: str) -> tuple[dict[str, Any], str | None]:
    """A component's config, and the subfolder that its files are in: None for the folder itself, where the first DDPMs
    on the Hub (google/ddpm-cifar10-32, ...) keep all."""
    try:
        config = component.load_config(name_or_path, subfolder=subfolder)
    except OSError as error:
        try:
            config, subfolder = component.load_config(name_or_path), None
        except OSError:
            raise error from None
    if not isinstance(config, dict):
        raise ValueError(f"its config must be a JSON object, not {config!r}")
    return config, subfolder


def check_train_timesteps(scheduler_config: dict[str, Any]) -> None:
    """Before the scheduler is made, with tables of this length."""
    trained = scheduler_config.get("num_train_timesteps", 1000)
    if type(trained) is not int or not 1 <= trained <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"num_train_timesteps={trained!r} must be a whole number in [1, {MAX_TRAIN_TIMESTEPS}]")


def check_network_config(component: type, config: dict[str, Any]) -> None:
    """Build the network and run it once, without any memory: it must make samples of its own shape."""
    shape = sample_shape(config)
    with torch.device("meta"):
        network = component.from_config(config)
    check_forward(network, shape)


def complete_vae_config(config: dict[str, Any]) -> dict[str, Any]:
    """A VAE's config with diffusers' defaults for what it leaves out, as those of the first ones on the Hub do the
    scaling factor. Raises ValueError, see `check_vae_config`."""
    with torch.device("meta"):
        complete = dict(AutoencoderKL.from_config(config).config)
    check_vae_config(complete)
    return complete


@contextmanager
def one_kind_of_error(what: str) -> Iterator[None]:
    """ValueError for whatever diffusers, which checks neither configs nor weights, trips over in the block.

    What is not there, or not implemented, stays an error of its kind; `what` comes first in each message."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:
        kind = next(kind for kind in (NotImplementedError, OSError, ValueError) if isinstance(error, kind))
        raise kind(f"{what}: {error}") from error
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def shortened(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
