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


def make_pipeline(
    network: Network,
    scheduler: DDPMScheduler | DDIMScheduler,
    id2label: dict[int, str] | None = None,
    vae: AutoencoderKL | None = None,
) -> Pipeline:
    """diffusers' own pipeline for these parts; where it has none, a `ClassConditionalPipeline`.

    Args:
        id2label: {0: "airplane", ...} the classes; None for an unconditional network.
    """
    if isinstance(network, DiTTransformer2DModel):
        if vae is None:
            return ClassConditionalPipeline(scheduler, transformer=network, id2label=id2label)
        pipeline = DiTPipeline(network, vae, scheduler, id2label)
        pipeline.register_to_config(id2label=id2label)  # or it would not be saved
        return pipeline
    if id2label is not None:
        return ClassConditionalPipeline(scheduler, unet=network, vae=vae, id2label=id2label)
    return DDPMPipeline(network, scheduler) if vae is None else LDMPipeline(vae, network, scheduler)


def vae_of(pipeline: Pipeline) -> AutoencoderKL | None:
    """What decodes the network's latents; None where it makes images."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
