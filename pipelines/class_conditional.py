"""Classes on request from a class-conditional diffusion model, with classifier-free guidance.

The source of this file is saved beside model_index.json, as pipeline.py: that is how stock diffusers loads the folder
where this project is not installed. So it needs torch, diffusers and the standard library, and nothing else.
"""

import difflib
import inspect
import json
import math
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

MODULE = "pipeline"  # the name under which diffusers looks for a folder's code
SOURCE = Path(__file__).read_text(encoding="utf-8")  # now: diffusers loads a folder's code from a file that it reuses


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples from a class-conditional network, as `DiTPipeline` does: where that will not do, which is for a
    transformer and a VAE alone.

    Any diffusers loads what it saves, by the code that lies in the folder:

    Example:
        >>> pipeline = DiffusionPipeline.from_pretrained("ddpm-model", trust_remote_code=True).to("cuda")
        >>> images = pipeline(["cat", "dog", 0], guidance_scale=1.5).images

    Args:
        scheduler: any of diffusers' that samples with the noise schedule of training.
        unet: of `num_class_embeds` N + 1: embedding N is the null class, which stands for no label in training.
        transformer: in place of `unet`; its null class is number `num_embeds_ada_norm`, however few classes there are.
        vae: decodes what the network makes, which are images where there is none.
        id2label: {0: "airplane", ...} the names of the classes; None for their numbers, or, of a transformer, for
            none: it can be called for its null class alone.

    Attributes:
        labels: {name: number}; of "tench, Tinca tinca", each of the two names and both together.

    Raises:
        ValueError: an unconditional U-Net, none or two networks, or `id2label` does not name the network's classes.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012  as in all of diffusers' pipelines

    # diffusers 0.35 looks at these types, and knows no X | None
    def __init__(
        self,
        scheduler: KarrasDiffusionSchedulers,
        *,
        unet: Optional[UNet2DModel] = None,  # noqa: UP045
        transformer: Optional[DiTTransformer2DModel] = None,  # noqa: UP045
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045
        id2label: Optional[dict] = None,  # noqa: UP045
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("a ClassConditionalPipeline has either a unet or a transformer")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        id2label = read_id2label(id2label, network_of(self).config)
        self.register_to_config(id2label=id2label)
        self.labels = label_names(id2label or {})

    def get_label_ids(self, label: int | str | Sequence[int | str]) -> list[int]:
        """The numbers of classes, given by name or by number; see `find_label_ids`."""
        null = null_label(network_of(self).config)
        return find_label_ids(label, self.config.id2label or {null: "the null class"})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image for each of B class labels.

        Args:
            class_labels: names, or numbers in [0, N).
            guidance_scale: w of `predict_with_guidance`, finite, 0 or more. 1 samples from the model as it was trained,
                at half the cost of any other.
            generator: one, or B, which make the images reproducible.
            num_inference_steps: of the scheduler.
            output_type: "pil", "np" (float32 [B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).
            return_dict: an `ImagePipelineOutput`, or a tuple of the images alone.

        Raises:
            ValueError: no label, one that there is not, or a guidance scale out of range.
        """
        check_guidance_scale(guidance_scale)
        network, device = network_of(self), self._execution_device
        labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        size = network.config.sample_size
        shape = (len(labels), network.config.in_channels, *((size, size) if isinstance(size, int) else size))
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = randn_tensor(shape, generator, device, network.dtype) * self.scheduler.init_noise_sigma
        known = inspect.signature(self.scheduler.step).parameters
        # By default DDIM steps along the network's own noise, which does not belong to the clipped x_0
        options = {"generator": generator, "use_clipped_model_output": True}
        options = {name: value for name, value in options.items() if name in known}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t)
            output = predict_with_guidance(network, scaled, t, labels, guidance_scale).to(x.dtype)
            x = self.scheduler.step(output, t, x, **options).prev_sample
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to_json_string(self) -> str:
        """model_index.json, whose `_class_name` says in which file of the folder the class is."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [MODULE, ClassConditionalPipeline.__name__]
        return json.dumps(index, indent=2) + "\n"

    def save_config(self, save_directory, **kwargs) -> None:
        """Write model_index.json, and beside it this file, as pipeline.py; a part of `save_pretrained`."""
        super().save_config(save_directory, **kwargs)
        Path(save_directory, f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")


def network_of(pipeline: DiffusionPipeline) -> UNet2DModel | DiTTransformer2DModel:
    """The network that denoises, by either of its names."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def is_transformer(network_config: dict[str, Any]) -> bool:
    """Whether the settings are a `DiTTransformer2DModel`'s, and not a `UNet2DModel`'s."""
    return "num_embeds_ada_norm" in network_config


def null_label(network_config: dict[str, Any]) -> int | None:
    """The number of the null class, which stands for no label; None of a U-Net that knows no classes."""
    if is_transformer(network_config):  # which has one always
        return network_config["num_embeds_ada_norm"]
    num_class_embeds = network_config.get("num_class_embeds")
    return num_class_embeds - 1 if num_class_embeds else None


def predict_with_guidance(
    network: UNet2DModel | DiTTransformer2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor | None,
    guidance_scale: float,
    guidance_channels: int | None = None,
) -> torch.Tensor:
    """The network's output for x_t, float32 [B, C, H, W], by classifier-free guidance (Ho & Salimans 2022):

    ε̂ = ε_null + w (ε_label - ε_null)

    w is diffusers' `guidance_scale`, the paper's w + 1: at 1 this is ε_label, for one pass of the network over B images
    instead of over 2B. A predicted v or x_0 is an affine function of ε, and guided by the same formula. A variance that
    the network has learned, which are the channels beyond C, is left out.

    Args:
        x: [B, C, H, W], in the network's type.
        t: the timestep.
        labels: int64 [B]; None for an unconditional network, which cannot be guided.
        guidance_channels: how many of the first channels are guided, the others being ε_label: 3 of 4 latent ones in
            the code of DiT (Peebles & Xie 2023). None for all.
    """
    timesteps = t.expand(len(x))  # a transformer wants one for each image
    if guidance_scale == 1:
        return network(x, timesteps, class_labels=labels).sample[:, : x.shape[1]].float()
    null = torch.full_like(labels, null_label(network.config))
    output = network(torch.cat([x, x]), timesteps.repeat(2), class_labels=torch.cat([labels, null])).sample
    of_label, of_null = output[:, : x.shape[1]].float().chunk(2)
    guided = of_null + guidance_scale * (of_label - of_null)
    if guidance_channels is None:
        return guided
    return torch.cat([guided[:, :guidance_channels], of_label[:, guidance_channels:]], dim=1)


def check_guidance_scale(guidance_scale: float) -> None:
    """Refuse what is no finite number from 0 on."""
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale={guidance_scale} must be in [0, inf)")


def find_label_ids(labels: int | str | Sequence[int | str], id2label: dict[int, str]) -> list[int]:
    """The numbers of classes, given by name or by number, one or several.

    Raises:
        ValueError: none at all, a name that no class has, with the nearest that one has, or a number that is none.
    """
    labels = [labels] if isinstance(labels, int | str) else list(labels)
    if not labels:
        raise ValueError("no class asked for: class_labels is empty")
    names = label_names(id2label)
    return [
        named_label(label, names) if isinstance(label, str) else numbered_label(label, id2label) for label in labels
    ]


def named_label(name: str, names: dict[str, int]) -> int:
    """The number of the class of this name."""
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, cutoff=0)
        raise ValueError(f"there is no class {name!r}; the nearest name is {nearest[0]!r}")
    return names[name]


def numbered_label(label: Any, id2label: dict[int, str]) -> int:
    """A class's number, also of a type of NumPy or PyTorch, as an int."""
    try:
        number = operator.index(label)
    except TypeError:
        raise ValueError(f"a class label must be a name or a number, not {label!r}") from None
    if number not in id2label:
        raise ValueError(f"there is no class {number}: the numbers are [{min(id2label)}, {max(id2label) + 1})")
    return number


def label_names(id2label: dict[int, str]) -> dict[str, int]:
    """{name: number}, sorted by name: names as they are and, as ImageNet has it, each of those between commas, but for
    one that several classes share ("crane", the bird and the machine)."""
    parts = [(part, number) for number, name in id2label.items() for part in {name, *map(str.strip, name.split(","))}]
    counts = Counter(part for part, _ in parts)
    whole_names = Counter(id2label.values())
    parts.sort(key=lambda part: id2label[part[1]] == part[0])  # a whole name comes last, and so before a part of one
    names = {part: number for part, number in parts if counts[part] == 1 or whole_names[part] == 1}
    return dict(sorted(names.items()))


def read_id2label(id2label: dict[Any, str] | None, network_config: dict[str, Any]) -> dict[int, str] | None:
    """{0: name, 1: name, ...} of a network's classes, whose numbers JSON turns into strings. None stands for a U-Net's
    classes named as numbered, and for no classes in a transformer.

    Raises:
        ValueError: these are not the network's classes.
    """
    null, is_dit = null_label(network_config), is_transformer(network_config)
    if type(null) is not int or null < 1:
        name = "num_embeds_ada_norm" if is_dit else "num_class_embeds"
        raise ValueError(
            f"the network has {name}={network_config.get(name)!r}: a class-conditional one has an embedding for each "
            "class and one for the null class"
        )
    if id2label is None:
        return None if is_dit else {number: str(number) for number in range(null)}
    if not isinstance(id2label, dict) or not all(isinstance(name, str) for name in id2label.values()):
        raise ValueError('id2label must name the classes, {"0": "airplane", ...}')
    count, is_number_right = len(id2label), 0 < len(id2label) <= null if is_dit else len(id2label) == null
    if not is_number_right or {str(number) for number in id2label} != {str(number) for number in range(count)}:
        classes = f"at most {null}, from 0 on" if is_dit else f"0 to {null - 1}"
        raise ValueError(
            f"id2label has {count} names, and must name the classes that the network has embeddings for, {classes}; "
            f"embedding {null} is the null class"
        )
    return dict(sorted((int(number), name) for number, name in id2label.items()))
