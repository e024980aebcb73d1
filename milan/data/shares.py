"""A share of the labelled images."""


def images_of_share(images: int, share: float) -> int:
    """Return how many of a class's images a share of its labels takes: one at least."""
    return max(1, round(share * images))
