"""The corruptions of ImageNet-C, and how its splits are named in records.

The errors of AlexNet are those that hendrycks/robustness publishes, as quoted in google-research/augmix (imagenet.py)."""

ALEXNET_ERROR = {  # of the 15 corruptions that count in mCE, each the mean over its five severities
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published beside them, for validation
CORRUPTIONS = (*ALEXNET_ERROR, *EXTRA)
SEVERITIES = ("1", "2", "3", "4", "5")
IMAGENET_CLASSES = 1000  # of AlexNet, and of the sets as published


def split_name(corruption: str, severity: str) -> str:
    """Return the name of the split of one corruption in one severity."""
    return f"imagenet_c-{corruption}-{severity}"


def parts_of(split: str) -> tuple[str, str]:
    """Return (set, corruption) of a split's name; the corruption is "" in sets that are not corrupted."""
    name, _, rest = split.partition("-")
    return name, rest.partition("-")[0]
