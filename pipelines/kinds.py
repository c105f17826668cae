"""Which of the pipelines fits a network, with or without a VAE and classes."""

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
)

from pipelines.class_conditional import ClassConditionalPipeline

Network = UNet2DModel | DiTTransformer2DModel
Pipeline = DDPMPipeline | LDMPipeline | DiTPipeline | ClassConditionalPipeline


def pipeline_class(network_class: type[Network], has_vae: bool, has_classes: bool) -> type[Pipeline]:
    """diffusers' own pipeline for these parts; where it has none, `ClassConditionalPipeline`."""
    if network_class is DiTTransformer2DModel:
        return DiTPipeline if has_vae else ClassConditionalPipeline
    if has_classes:
        return ClassConditionalPipeline
    return LDMPipeline if has_vae else DDPMPipeline


def make_pipeline(
    network: Network,
    scheduler: DDPMScheduler | DDIMScheduler,
    id2label: dict[int, str] | None = None,
    vae: AutoencoderKL | None = None,
) -> Pipeline:
    """The `pipeline_class` of these parts.

    Args:
        id2label: {0: "airplane", ...} the classes; None for an unconditional network.
    """
    kind = pipeline_class(type(network), vae is not None, id2label is not None)
    if kind is DDPMPipeline:
        return DDPMPipeline(network, scheduler)
    if kind is LDMPipeline:
        return LDMPipeline(vae, network, scheduler)
    if kind is DiTPipeline:
        pipeline = DiTPipeline(network, vae, scheduler, id2label)
        pipeline.register_to_config(id2label=id2label)  # or it would not be saved
        return pipeline
    name = "transformer" if isinstance(network, DiTTransformer2DModel) else "unet"
    return ClassConditionalPipeline(scheduler, vae=vae, id2label=id2label, **{name: network})


def vae_of(pipeline: Pipeline) -> AutoencoderKL | None:
    """What decodes the network's latents; None where it makes images."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
