"""The diffusers pipelines that training saves and previews with, and that generation loads."""

from pipelines.checks import image_shape, sample_shape
from pipelines.class_conditional import ClassConditionalPipeline, find_label_ids, is_transformer, network_of, null_label
from pipelines.denoising import SCHEDULERS, denoising_steps
from pipelines.kernels import choose_kernels
from pipelines.kinds import Network, Pipeline, make_pipeline, pipeline_class, vae_of
from pipelines.loading import check_variant, load_configs, load_pipeline
from pipelines.pictures import make_grid_image, to_pil
from pipelines.sampling import EVERYWHERE, sample_images

__all__ = [
    "EVERYWHERE",
    "SCHEDULERS",
    "ClassConditionalPipeline",
    "Network",
    "Pipeline",
    "check_variant",
    "choose_kernels",
    "denoising_steps",
    "find_label_ids",
    "image_shape",
    "is_transformer",
    "load_configs",
    "load_pipeline",
    "make_grid_image",
    "make_pipeline",
    "network_of",
    "null_label",
    "pipeline_class",
    "sample_images",
    "sample_shape",
    "to_pil",
    "vae_of",
]
