"""Names and prompts for the text tower of a released CLIP: OpenAI's own for the classes of ImageNet.

OpenAI's names tell the bird crane from the machine, and their 80 templates give the published zero-shot accuracies. Both come
with open_clip, in the order of WordNet ids, which timm knows. Other classes keep their own names, in the seven templates that
OpenAI reports to be as good.
"""

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo

from milan.teacher.class_text import Wording


def wording_of(manifest: dict) -> Wording | None:
    """Return the wording for the classes of a manifest.json; None for images without labels."""
    imagenet_names = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    classes, wnids = manifest["classes"], manifest["wnids"]
    if not classes:
        return None
    if set(wnids) <= imagenet_names.keys():  # all thousand, or some of them
        return Wording([imagenet_names[wnid] for wnid in wnids], [template("{}") for template in OPENAI_IMAGENET_TEMPLATES])
    return Wording([name.replace("_", " ") for name in classes], [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES])
