"""The images of a run."""

from images import ImageDataset, open_images


def open_training_data(options) -> ImageDataset:
    """Open what the options of a run say to train on.

    Raises:
        ValueError: it cannot be found or used; naming the flag.
    """
    return open_images(
        options.dataset_name,
        dataset_config_name=options.dataset_config_name,
        cache_dir=options.cache_dir,
        image_column=options.image_column,
        resolution=options.resolution,
        image_mode=options.image_mode,
        on_bad_image=options.on_bad_image,
        white_level=options.white_level,
    )
