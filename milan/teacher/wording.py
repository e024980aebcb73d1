"""What a released CLIP is asked about the classes of a set of records: for ImageNet's, what OpenAI asked.

OpenAI's names tell a crane from a crane, and their 80 templates give the zero-shot accuracies that are published; both come
with open_clip, in the order of WordNet ids, which timm knows. Any other class is asked by its own name in the seven
templates that OpenAI found to do as well.
"""

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo

from milan.teacher.class_text import Wording


def wording_of(manifest: dict) -> Wording | None:
    """Of the classes of a manifest.json; None for images without labels."""
    known = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    classes, wnids = manifest["classes"], manifest["wnids"]
    if not classes:
        return None
    if set(wnids) <= known.keys():  # all thousand, or some of them
        return Wording([known[wnid] for wnid in wnids], [template("{}") for template in OPENAI_IMAGENET_TEMPLATES])
    return Wording([name.replace("_", " ") for name in classes], [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES])
