"""Whether two sets of images can be compared: of one size, and enough of them for each metric."""

from images import ImageDataset
from scoring.feature_extractors import Extractor
from scoring.options import EvaluationOptions


def check_sizes(options: EvaluationOptions, images1: ImageDataset, images2: ImageDataset) -> None:
    """Raise ValueError unless both inputs have images of one size."""
    size1, size2 = images1.resolution, images2.resolution
    if size1 != size2:
        raise ValueError(
            f"--input1 {options.input1} has images of {size1}x{size1} and --input2 {options.input2} of "
            f"{size2}x{size2}: --resolution {min(size1, size2)} would resize both"
        )


def check_counts(options: EvaluationOptions, count1: int, count2: int) -> None:
    """Raise ValueError if a metric needs more images than there are."""
    for flag, count in (("--input1", count1), ("--input2", count2)):
        if count < 2:
            raise ValueError(f"{flag} gives {count} images: at least 2 are needed")
        if "kid" in options.metrics and options.kid_subset_size > count:
            raise ValueError(
                f"--kid_subset_size {options.kid_subset_size}: {flag} gives {count} images only, and a subset must "
                "not be larger (or leave kid out of --metrics)"
            )
        if "prc" in options.metrics and options.prc_neighborhood >= count:
            raise ValueError(
                f"--prc_neighborhood {options.prc_neighborhood}: {flag} gives {count} images only, of which one has "
                f"{count - 1} neighbours"
            )
    if "isc" in options.metrics and options.isc_splits > count1:
        raise ValueError(f"--isc_splits {options.isc_splits}: --input1 gives {count1} images only")


def check_rank(options: EvaluationOptions, extractor: Extractor, count1: int, count2: int) -> None:
    """Raise ValueError if the covariance of the features cannot have full rank."""
    for flag, count in (("--input1", count1), ("--input2", count2)):
        if "fid" in options.metrics and count <= extractor.num_features and not options.allow_few_images:
            raise ValueError(
                f"{flag} gives {count} images, but a Fréchet distance of {extractor.num_features} features needs more "
                f"than {extractor.num_features}, else the covariance is singular: --metrics without fid, or "
                "--allow_few_images"
            )
