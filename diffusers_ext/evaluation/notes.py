"""What has to be said beside numbers that would mislead alone."""

from .images import ImageSet

FEW = 3  # times the dimension; below, the covariance that the Fréchet distance compares is mostly its own error
LEFT_OUT = "the local outlier factor (lof) is left out: it needs scikit-learn, pip install scikit-learn"


def few_images(count: int, dimensions: int, which: str = "") -> str | None:
    """A note on a Fréchet distance of so few images; None where there are enough.

    Args:
        count: of the images.
        dimensions: of the features.
        which: of whom, such as "real ".
    """
    if count >= FEW * dimensions:
        return None
    return (
        f"{count:,} {which}images for {dimensions:,} features: the Fréchet distance is far too high, and falls as"
        f" images are added; take at least {FEW * dimensions:,}"
    )


def compression(generated: set[str], real: set[str]) -> str | None:
    """A note on sets of which one alone went through a lossy format.

    Args:
        generated: see `formats` of image sets.
        real: see `formats` of image sets.
    """
    lossy = {"JPEG", "WebP"}
    if generated & lossy == real & lossy:
        return None
    kinds = " and ".join(sorted(generated)), " and ".join(sorted(real))
    return (
        f"the generated images are {kinds[0]}, the real ones {kinds[1]}: what the compression left counts as a"
        " difference between them; save both sets in one way"
    )


def notes_on(images: ImageSet, real: ImageSet | None, dimensions: int, distance: bool, without_lof: bool) -> list[str]:
    """All that has to be said of an evaluation.

    Args:
        images: the generated set.
        real: None for statistics.
        dimensions: of the features.
        distance: whether a Fréchet distance is among the metrics.
        without_lof: whether it is left out for want of a package.
    """
    notes = [few_images(len(images), dimensions, "generated ") if distance else None]
    if real is not None:
        notes.append(few_images(len(real), dimensions, "real ") if distance else None)
        notes.append(compression(images.formats, real.formats))
    notes.append(LEFT_OUT if without_lof else None)
    return [note for note in notes if note is not None]
