"""The recipe: what is committed is the composition, and every mistake is named with its mend."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from timm.data.auto_augment import rand_augment_transform

from milan.core.errors import UserError
from milan.core.validation import arithmetic, validate
from milan.params import Model, Params, changed_settings, compose_recipe, read_params, say_settings
from tests.conftest import ROOT, change, composed

SCALES = sorted(path.stem for path in (ROOT / "conf" / "scale").glob("*.yaml"))


def refusal(tree) -> str:
    with pytest.raises(UserError) as error:
        validate(Params, tree, "params.yaml")
    return str(error.value)


def test_the_committed_recipe_is_the_demo(committed_tree):
    assert committed_tree == composed("demo")


def test_the_scales_that_the_design_names_are_there():
    assert {"smoke", "demo", "paper"} <= set(SCALES)


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_builds(scale):
    assert validate(Params, composed(scale), scale).scale == scale


@pytest.mark.parametrize(
    "given, name",
    [
        ([], "smoke"),
        (["data.imagenet=/data/flowers"], "flowers"),
        (["data.imagenet='/data/my photos (2024)/'"], "my-photos-2024"),
        (["data.imagenet=../.hidden/v1.2"], "v1.2"),
        ([f"data.imagenet=/{'a' * 60}"], "a" * 50),
        (["data.imagenet=/"], "smoke"),
        (["data.ade20k=/data/ADEChallengeData2016.zip"], "ADEChallengeData2016"),
        (["data.imagenet=/data/flowers", "data.ade20k=/data/rooms"], "flowers"),
        (["data.imagenet=/data/flowers", "data.name=fashion"], "fashion"),
    ],
)
def test_data_is_named_by_its_folder(given, name):
    """Hydra composes the name with the project's resolver; letters that neither a path nor MLflow takes are replaced."""
    assert validate(Params, composed("smoke", *given), "smoke").data.name == name


def test_the_recipe_of_the_released_checkpoint_changes_no_evaluation():
    """It is the paper's but for what has no effect on the probes on images."""
    released, paper = composed("released"), composed("paper")
    differing = {key for key in paper if released[key] != paper[key]}
    assert differing == {"scale", "data", "runtime", "pretrain", "prepare_ade20k"}
    assert {**released["data"], "name": "paper"} == paper["data"] and released["runtime"] == {**paper["runtime"], "processes": 1}
    assert released["pretrain"] == {**paper["pretrain"], "weights": "milan_vit_base.pth"}
    assert released["prepare_ade20k"] == {**paper["prepare_ade20k"], "size": 512}


def test_the_paper_s_derived_numbers():
    paper = validate(Params, composed("paper"), "paper")
    assert paper.pretrain.lr == pytest.approx(2.4e-3, rel=1e-12)
    assert paper.linear_eval.lr == pytest.approx(3.2, rel=1e-12)
    assert paper.finetune.lr == pytest.approx(4e-4, rel=1e-12)
    assert paper.segment.epochs * 1263 == pytest.approx(160_000)
    assert (paper.model.grid, paper.model.n_patches) == (14, 196)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (["paper"], (5e-5, 0.9, 0.1, [3, 5, 7, 11])),  # DeepMIM-CLIP
        (["paper", "segment=mae"], (1e-4, 0.65, 0.1, [3, 5, 7, 11])),
        (["paper_dino"], (5e-5, 0.9, 0.1, [3, 5, 7, 11])),
        (["paper_large"], (3e-5, 0.95, 0.2, [7, 11, 15, 23])),  # dBOT
        (["paper_large", "segment=deepmim_clip"], (5e-5, 0.9, 0.1, [7, 11, 15, 23])),
        (["paper", "segment=mae", "segment.lr=7e-5"], (7e-5, 0.65, 0.1, [3, 5, 7, 11])),
    ],
)
def test_the_ade20k_recipes_by_one_word(settings, expected):
    segment = validate(Params, composed(*settings), "paper").segment
    assert (segment.lr, segment.layer_decay, segment.drop_path, segment.out_blocks) == expected


def test_the_paper_expects_the_whole_sets():
    paper, demo = (validate(Params, composed(scale), scale) for scale in ("paper", "demo"))
    assert vars(paper.prepare_imagenet.expect) == {"train": 1281167, "val": 50000, "classes": 1000}
    assert vars(paper.prepare_ade20k.expect) == {"train": 20210, "val": 2000}
    assert demo.prepare_imagenet.expect is demo.prepare_ade20k.expect is None


PRETRAINED = {"library": "open_clip", "model": "m", "tag": "openai", "file": None, "sha256": None}
TINY = {"embed_dim": 64, "layers": 4, "conv_stem": True, "text_width": 96, "text_heads": 3, "text_layers": 1, "context_length": 20}
WRONG = {
    "unknown key at the top": ("pretrian", {}, ["unknown key 'pretrian'", "did you mean 'pretrain'"]),
    "unknown key in a section": ("pretrain.epoch", 3, ["pretrain: unknown key 'epoch'", "did you mean 'epochs'"]),
    "unknown key deep down": ("model.encoder.dept", 3, ["model.encoder: unknown key 'dept'", "did you mean 'depth'"]),
    "unknown key in a recipe": (
        "pretrain.ablation.milan.mask",
        "none",
        ["pretrain.ablation.milan: unknown key 'mask'", "did you mean 'masking'"],
    ),
    "negative epochs": ("pretrain.epochs", -1, ["pretrain.epochs", "-1", "above 0"]),
    "no epochs": ("finetune.epochs", 0, ["finetune.epochs", "above 0"]),
    "negative count": ("extract_targets.views", -1, ["extract_targets.views", "-1", "at least 0"]),
    "everything masked": ("pretrain.mask_ratio", 1.0, ["pretrain.mask_ratio", "1.0", "below 1"]),
    "share above one": ("finetune.labels", 1.5, ["finetune.labels", "1.5", "at most 1"]),
    "image size no multiple": ("model.image_size", 50, ["image_size 50", "patch_size 8", "48 and 56"]),
    "image smaller than a patch": ("model.image_size", 5, ["image_size 5", "8 and 16"]),
    "crop size no multiple": ("segment.crop_size", 50, ["segment.crop_size 50"]),
    "heads that do not divide": ("model.encoder.num_heads", 3, ["embed_dim 128", "num_heads 3"]),
    "word for a number": ("pretrain.epochs", "many", ["pretrain.epochs", "'many' is no number"]),
    "list for a number": ("pretrain.epochs", [1], ["pretrain.epochs", "expected float", "[1]"]),
    "fraction for an int": ("pretrain.batch_size", 64.5, ["pretrain.batch_size", "expected int", "64.5"]),
    "processes that share no batch": (
        "runtime.processes",
        3,
        ["pretrain.batch_size 32 makes 2 micro-batches of 16", "3 processes", "change pretrain.micro_batch or runtime.processes"],
    ),
    "bool for an int": ("runtime.processes", True, ["runtime.processes", "expected int", "True"]),
    "bool for a float": ("pretrain.lr", True, ["pretrain.lr", "expected float", "True"]),
    "number for a bool": ("compute.deterministic", 1, ["compute.deterministic", "expected bool", "1"]),
    "number for a list": ("pretrain.betas", 0.9, ["pretrain.betas", "0.9"]),
    "one of two numbers": ("pretrain.betas", [0.9], ["pretrain.betas", "expected 2 numbers", "[0.9]"]),
    "beta of one": ("finetune.betas", [0.9, 1.0], ["finetune.betas[1]", "1.0 must be below 1"]),
    "crop from large to small": ("pretrain.crop_scale", [1.0, 0.5], ["pretrain.crop_scale", "[1.0, 0.5]", "smallest comes first"]),
    "crop of nothing": ("teacher.crop_scale", [0, 1], ["teacher.crop_scale[0]", "above 0"]),
    "crop of more than all": ("linear_eval.crop_scale", [0.5, 1.5], ["linear_eval.crop_scale[1]", "at most 1"]),
    "one side": ("segment.resize", [48], ["segment.resize", "expected 2 numbers"]),
    "ratio of nothing": ("segment.resize_ratio", [0, 1], ["segment.resize_ratio[0]", "above 0"]),
    "word in a list": ("seeds", [0, "x"], ["seeds[1]", "'x'"]),
    "number for a section": ("model", 3, ["model", "expected a section", "image_size"]),
    "null where it is needed": ("pretrain.epochs", None, ["pretrain.epochs", "None"]),
    "not a number": ("pretrain.lr", float("nan"), ["pretrain.lr", "no finite number"]),
    "infinity": ("pretrain.lr", "1e300 * 1e300", ["pretrain.lr", "no finite number"]),
    "whole number beyond all floats": ("pretrain.lr", 10**400, ["pretrain.lr", "a whole number of 1329 bits"]),
    "unknown word": ("compute.precision", "bf61", ["compute.precision", "'bf61'", "fp32", "did you mean 'bf16'"]),
    "a scale that is a program": ("scale", "a; touch x", ["scale: 'a; touch x' names folders", "letters, digits"]),
    "a name of data that is a path": ("data.name", "my/photos", ["data.name: 'my/photos' names folders", "letters, digits"]),
    "a name of data that is null": ("data.name", None, ["data.name"]),
    "a scale that leads out": ("scale", "../x", ["scale: '../x' names folders"]),
    "unknown variant": ("variants", ["milan", "milano"], ["'milano' is no row", "did you mean 'milan'"]),
    "batch no multiple of the micro-batch": ("pretrain.micro_batch", 48, ["batch_size 32", "micro_batch 48"]),
    "warm-up longer than training": ("pretrain.warmup_epochs", 99, ["warmup_epochs 99", "fewer than epochs"]),
    "prompting decoder on pixels": ("pretrain.ablation.milan.target", "pixels", ["ablation.milan", "prompting decoder"]),
    "half a recipe": ("pretrain.ablation.milan.target", "none", ["ablation.milan", "all `none`"]),
    "block that is not there": ("segment.out_blocks", [0, 4], ["segment.out_blocks [0, 4]"]),
    "no seeds": ("seeds", [], ["seeds", "an empty list"]),
    "no variants": ("variants", [], ["variants", "an empty list"]),
    "a seed twice": ("seeds", [0, 1, 0], ["seeds", "[0, 1, 0] names one of them twice"]),
    "a variant twice": ("variants", ["mae", "mae"], ["variants", "twice"]),
    "negative seed": ("seeds", [-1], ["seeds[0]", "at least 0"]),
    "seed beyond all generators": ("seeds", [1e30], ["seeds[0]", "at most 2147483647"]),
    "threads beyond all machines": ("compute.threads", 10**12, ["compute.threads", "at most 65536"]),
    "width beyond all memory": ("model.encoder.embed_dim", 10**12, ["model.encoder.embed_dim", "at most 65536"]),
    "recipe that is a path": ("pretrain.ablation", {"a/b": {"target": "none", "decoder": "none", "masking": "none"}}, ["'a/b' names folders"]),
    **{
        f"recipe that MLflow refuses as {name[:12]}": ("pretrain.ablation", {name: {"target": "none", "decoder": "none", "masking": "none"}}, [name, "MLflow"])
        for name in ("milan_0.9", "v2", "V10", "latest", "Latest", "a b", "a%", "a" * 51)
    },
    "recipe whose name is a number": ("pretrain.ablation", {2022: {"target": "none", "decoder": "none", "masking": "none"}}, ["name 2022", "quotation"]),
    "recipe whose name is nothing": ("pretrain.ablation", {None: {}}, ["name None", "quotation"]),
    "a world that there is not": ("prepare_imagenet.world", "medium", ["prepare_imagenet.world", "small", "large"]),
    "more classes than a mask's byte holds": ("prepare_ade20k.classes", 300, ["prepare_ade20k.classes", "at most 254"]),
    "a world's negative seed": ("prepare_imagenet.seed", -1, ["prepare_imagenet.seed", "at least 0"]),
    "a teacher's seed beyond all generators": ("teacher.seed", 2**31, ["teacher.seed", "at most 2147483647"]),
    "a world beyond all disks": ("prepare_imagenet.train", 10**15, ["prepare_imagenet.train", "at most 100000000"]),
    "pairs beyond all disks": ("prepare_imagenet.pairs", 10**15, ["prepare_imagenet.pairs", "at most 100000000"]),
    "pictures beyond all memory": ("prepare_ade20k.size", 65536, ["prepare_ade20k.size", "at most 4096"]),
    "a number of 8,000 digits": ("linear_eval.views", f"{10**4000} * {10**4000}", ["linear_eval.views", "26576 bits"]),
    "an augmentation of no key of timm's": ("finetune.rand_augment", "rand-zz9", ["finetune.rand_augment: 'rand-zz9' is none of timm's"]),
    "an augmentation of no number": ("finetune.rand_augment", "rand-m9-mstd0.5.5", ["rand_augment: 'rand-m9-mstd0.5.5'"]),
    "an augmentation of half a layer": ("finetune.rand_augment", "rand-m9-n1.5", ["rand_augment: 'rand-m9-n1.5'"]),
    "half a character": ("model.name", "ViT\ud800", [r"model.name: 'ViT\ud800' holds characters that no text has"]),
    "a path that no file has": ("pretrain.weights", "a\0b", [r"pretrain.weights: 'a\x00b' holds characters that no text has"]),
    "a home that no shell has expanded": ("data.imagenet", "~/images", ["data.imagenet: '~/images': write your home folder out"]),
    "an empty path": ("data.imagenet", "", ["data.imagenet: an empty path", "null for the built-in world"]),
    "no visible patch": ("pretrain.mask_ratio", 0.9999, ["mask_ratio 0.9999 leaves 0 of 36"]),
    "no masked patch": ("pretrain.mask_ratio", 1e-17, ["leaves 36 of 36"]),
    "a stem that cannot be normalised": ("teacher.tiny", {**TINY, "width": 100, "head_width": 50}, ["width 100", "100 channels", "multiple of 32"]),
    "a crop of one patch": ("segment.crop_size", 8, ["segment.crop_size 8", "two patches of 8"]),
    "unknown augmentation": ("finetune.rand_augment", "nonsense", ["rand_augment: 'nonsense'", "rand-m9-mstd0.5-inc1"]),
    "teacher's heads that do not divide": ("teacher.tiny.head_width", 7, ["teacher.tiny", "width 128 is no multiple of head_width 7"]),
    "teacher's text heads": ("teacher.tiny.text_heads", 7, ["text_width 96 is no multiple of text_heads 7"]),
    "a world of one pixel": ("prepare_imagenet.size", 1, ["prepare_imagenet.size", "at least 16"]),
    "two teachers": ("teacher.pretrained", PRETRAINED, ["teacher", "not both"]),
    "neither tag nor file": ("teacher.pretrained", {**PRETRAINED, "tag": None}, ["teacher.pretrained", "give the tag"]),
    "no model": ("teacher.pretrained", {**PRETRAINED, "model": None}, ["teacher.pretrained", "give the model", "open_clip"]),
    "a small CLIP without its file": ("teacher.pretrained", {**PRETRAINED, "library": "milan"}, ["library milan takes a file", "set model and tag to null"]),
    "a digest that is none": ("teacher.pretrained", {**PRETRAINED, "sha256": "5806"}, ["teacher.pretrained.sha256: '5806'", "64 hexadecimal"]),
    "unknown library": ("teacher.pretrained", {**PRETRAINED, "library": "tim"}, ["library", "did you mean 'timm'"]),
    "expectation of less than one image": ("prepare_imagenet.expect", {"train": 0, "val": 1, "classes": 2}, ["expect.train", "above 0"]),
    "half an expectation": ("prepare_ade20k.expect", {"train": 5}, ["prepare_ade20k.expect: missing key val"]),
    "a window that leaves out pixels": ("segment.stride", 49, ["segment.stride 49 is above segment.crop_size 48"]),
    "a probe's batch norm over one image": ("linear_eval.micro_batch", 1, ["linear_eval.micro_batch must be at least 2"]),
    "a segmenter's batch norm over one image": ("segment.micro_batch", 1, ["segment.micro_batch must be at least 2"]),
    "a momentum that keeps all": ("linear_eval.momentum", 1, ["linear_eval.momentum", "must be below 1"]),
    "a block that is always dropped": ("finetune.drop_path", 1, ["finetune.drop_path", "must be below 1"]),
    "labels without a word of the class": ("finetune.label_smoothing", 1, ["finetune.label_smoothing", "must be below 1"]),
    "padded images of the probe": ("linear_eval.resize", 40, ["linear_eval.resize 40 is below model.image_size 48", "black"]),
    "padded images of fine-tuning": ("finetune.resize", 40, ["finetune.resize 40 is below model.image_size 48", "black"]),
    "scenes smaller than the images": ("segment.crop_size", 40, ["segment.crop_size 40 is below model.image_size 48"]),
    "a built-in world that is shrunk": ("prepare_imagenet.short_side", 32, ["prepare_imagenet.short_side", "set it to null"]),
    "a side beyond all memory": ("linear_eval.resize", 10**6, ["linear_eval.resize", "at most 65536"]),
    "no figure": ("extract_targets.figure_images", 0, ["extract_targets.figure_images", "above 0"]),
    "workers beyond all processes": ("runtime.workers", 10**5, ["runtime.workers", "at most 1024"]),
    "no teacher": ("teacher.tiny", None, ["teacher", "either tiny"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named(case, tree):
    place, value, words = WRONG[case]
    change(tree, place, value)
    said = refusal(tree)
    assert [word for word in words if word not in said] == [], said


def test_all_mistakes_of_a_file_are_named_at_once(tree):
    change(tree, "pretrain.epochs", -1)
    change(tree, "pretrian", {})
    change(tree, "model.image_size", 50)
    del tree["finetune"]["mixup"], tree["finetune"]["cutmix"]
    assert refusal(tree) == (
        "params.yaml: model: image_size 50 is no multiple of patch_size 8; the nearest are 48 and 56. "
        "pretrain.epochs: -1 must be above 0. finetune: missing key mixup, cutmix (compare conf/scale/demo.yaml). "
        f"unknown key 'pretrian'; did you mean 'pretrain'? Valid keys: {', '.join(field.name for field in fields(Params))}."
    )


def test_contradictions_between_sections_are_named_at_once(tree):
    change(tree, "variants", ["milano"])
    change(tree, "segment.crop_size", 50)
    assert all(words in refusal(tree) for words in ("'milano' is no row", "segment.crop_size 50"))


def test_a_larger_image_names_every_section_that_must_follow(tree):
    change(tree, "model.image_size", 96)
    said = refusal(tree)
    follow = (
        *(f"{name}.resize" for name in ("linear_eval", "attentive_probe", "finetune", "robustness")),
        *("segment.crop_size", "dense_probe.crop_size"),
    )
    assert all(f"{key} 48" in said for key in follow) and said.count("below model.image_size 96") == 3
    for key in follow:
        change(tree, key, 96)
    assert validate(Params, tree, "p").model.grid == 12


def test_a_teacher_s_contrast_needs_two_images(tree):
    change(tree, "runtime.processes", 1)
    tree["teacher"] |= {"batch_size": 1, "micro_batch": 1}
    assert "teacher.batch_size must be at least 2" in refusal(tree)


def test_of_many_mistakes_five_are_named_and_the_rest_counted(tree):
    for name in ("epochs", "lr", "batch_size", "micro_batch", "weight_decay", "min_lr", "mask_ratio"):
        change(tree, f"pretrain.{name}", "x")
    said = refusal(tree)
    assert said.count("'x' is no number") == 5 and said.endswith("And 2 more.")


def test_a_long_value_is_cut(tree):
    change(tree, "pretrain.betas", {str(k): "y" * 1000 for k in range(1000)})
    assert "pretrain.betas: expected list, found {" in refusal(tree) and len(refusal(tree)) < 600


def test_the_world_size_is_torchrun_s_or_the_recipe_s(tree, monkeypatch):
    assert validate(Params, tree, "p").world_size == tree["runtime"]["processes"] == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert validate(Params, tree, "p").world_size == 2  # a cluster's own variable: no torchrun started this process
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "4 processes cannot share evenly" in refusal(tree)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert validate(Params, tree, "p").world_size == 1


@pytest.mark.parametrize("place", ["pretrain.mask_ratio", "model.decoder.depth", "report.published", "seeds"])
def test_a_missing_key_is_named(place, tree):
    *sections, last = place.split(".")
    section = tree
    for name in sections:
        section = section[name]
    del section[last]
    assert f"missing key {last}" in refusal(tree)


@pytest.mark.parametrize("whole", [None, [], 3, "text"])
def test_a_tree_that_is_none(whole):
    assert "expected a section" in refusal(whole)


SUMS = {"1.5e-4 * 4096 / 256": 2.4e-3, "160000 / 1263": 160000 / 1263, "-(1 + 2) * 3": -9, "2 - 3 - 4": -5, "7": 7, "1e-3": 0.001}


@pytest.mark.parametrize("text", SUMS)
def test_sums_are_worked_out(text):
    assert arithmetic(text) == pytest.approx(SUMS[text], rel=1e-15)


CODE = [
    "__import__('os')",
    "__import__('os').system('touch /tmp/x')",
    "open('params.yaml')",
    "(1).__class__",
    "[1][0]",
    "10 ** 9",
    "1 if 1 else 2",
]
NOT_SUMS = [
    "",
    "1 +",
    "1 / 0",
    "'a' * 3",
    "True + 1",
    "x",
    "1; 2",
    "1 < 2",
    "\0",
    "1 // 2",
    "lambda: 1",
    "1j",
    "(" * 500 + "1",
    "-" * 20000 + "1",
]


@pytest.mark.parametrize("text", CODE + NOT_SUMS, ids=lambda text: text[:30])
def test_all_else_is_refused(text, tree):
    change(tree, "pretrain.lr", text)
    assert "is no number" in refusal(tree)


def test_a_sum_counts_as_an_int_only_when_it_is_one(tree):
    change(tree, "pretrain.batch_size", "2 * 64")
    assert validate(Params, tree, "p").pretrain.batch_size == 128
    change(tree, "pretrain.batch_size", "127 / 2")
    assert "expected int" in refusal(tree)
    change(tree, "pretrain.batch_size", "1e200 * 1e200")
    assert "expected int" in refusal(tree)


def test_the_largest_whole_number_in_a_division(tree):
    change(tree, "pretrain.lr", f"{10**400} / 3")
    assert "pretrain.lr" in refusal(tree)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.5-mmax12", "rand-mstd1-tweights"])
def test_what_timm_takes_is_taken(text, tree):
    change(tree, "finetune.rand_augment", text)
    built = validate(Params, tree, "p").finetune.rand_augment
    assert built == text and rand_augment_transform(built, {}).ops


def test_a_built_section_is_frozen(committed_tree):
    model = validate(Model, committed_tree["model"], "model")
    with pytest.raises(AttributeError):
        model.image_size = 1
    with pytest.raises(ValueError):  # a copy is validated too
        replace(model, image_size=50)


def test_values_keep_the_words_that_identities_are_made_of(committed_tree):
    """milan/core/identity.py digests the repr of each: a change of type would leave every half-done training behind."""
    params = validate(Params, committed_tree, "p")
    assert repr(params.runtime) == "Runtime(processes=2, workers=0, save_seconds=30.0)"
    assert repr(params.segment.resize) == "[192, 48]" and repr(params.segment.resize_ratio) == "[1.0, 1.5]"


BROKEN_FILES = {
    "not YAML": b"a: [1\n",
    "not text": b"\xff\xfe\x00\x81",
    "a tag that runs code": b"!!python/object/apply:os.system ['false']\n",
    "empty": b"",
    "a date that is none": b"scale: 2024-13-45\n",
    "a number of 5,000 digits": b"scale: " + b"9" * 5000,
    "a list of lists of lists": b"[" * 5000,
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(case, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(BROKEN_FILES[case])
    with pytest.raises(UserError, match="params.yaml"):
        read_params(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml is missing"):
        read_params(tmp_path / "nowhere.yaml")


def test_read_params_reads(tmp_path, committed_tree):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({**committed_tree, "scale": "mine"}))
    assert read_params(Path(path)).scale == "mine"


def recipes(**scales: str) -> None:
    """Write conf/ with these recipes."""
    Path("conf/scale").mkdir(parents=True)
    Path("conf/config.yaml").write_text("defaults: [_self_, {scale: mine}]")
    for name, text in scales.items():
        Path(f"conf/scale/{name}.yaml").write_text(f"# @package _global_\nscale: {name}\n{text}")


def test_settings_that_differ_from_the_scale_s_recipe(workplace):
    recipes(mine="a: {rate: 1e-3, epochs: 8}\nb: {epochs: 8}\ndata: {imagenet: null}\nruntime: {workers: 0}\n")
    own = {"a.rate": 0.001, "a.epochs": 8, "b.epochs": 8, "data.imagenet": None, "runtime.workers": 0}
    assert changed_settings({"scale": "mine", **own}) == {}
    ours = {"scale": "mine", **own, "a.rate": 0.5, "b.epochs": 4, "data.imagenet": "~/big/photos", "runtime.workers": 2, "c": "new"}
    changed = changed_settings(ours)
    assert changed == {"a.rate": 0.5, "b.epochs": 4, "data.imagenet": "~/big/photos", "runtime.workers": 2, "c": "new"}
    assert say_settings(changed, ours) == "rate=0.5, b.epochs=4, imagenet=photos and 1 more"
    assert say_settings({"variants": ["mae", "milan"]}, ours) == "variants=[mae, milan]"
    assert changed_settings({**ours, "scale": "other"}) == changed_settings({}) == {}


def test_outside_the_repository_the_error_says_where_to_run(workplace):
    with pytest.raises(UserError, match="run from the repository's root"):
        compose_recipe("demo")


def test_a_broken_recipe_in_conf_is_named(workplace):
    Path("conf/scale").mkdir(parents=True)
    Path("conf/config.yaml").write_text("defaults: [{scale: mine}]")
    for text in ("scale: ${nothing}", "scale: [", "scale: 2024-13-45"):
        Path("conf/scale/mine.yaml").write_text(text)
        with pytest.raises(UserError, match="conf/scale/mine.yaml"):
            compose_recipe("mine")
