"""The table: values worked out by hand, sentences on the order, and published numbers apart from ours."""

import csv
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from milan.core.errors import UserError
from milan.core.validation import validate
from milan.params import Params, read_params
from milan.report import plots, table
from milan.report.results import read_published, read_results, without_number

PUBLISHED = Path("reports/published.csv")
ZERO_SHOT = {"linear_eval/zero_shot_top1": 30.0, "linear_eval/zero_shot_masked_top1": 20.04}  # of MILAN, for both seeds
CONSTANT = {"prepare_ade20k/constant_miou": 2.14, "prepare_ade20k/constant_pixel_accuracy": 17.26}
LINEAR = {"scratch": (11.0, 12.0), "mae": (10.0, 11.4), "milan": (35.0, 37.04)}


def recipe(variants=("scratch", "mae", "milan"), seeds=(0, 1), **changes) -> Params:
    return dataclasses.replace(read_params("params.yaml"), scale="demo", variants=list(variants), seeds=list(seeds), **changes)


def write(path: Path, **metrics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**metrics, "recipe": "0"}))


@pytest.fixture
def metrics(tmp_path) -> Path:
    """Write metrics of three variants with two seeds: fine-tuning is linear + 1, the attentive probe's is
    linear + 2, mIoU is 50 - linear, the dense probe's is linear / 2, and MILAN's top-1 on corrupted images is 20 and 21.5, with
    the linear layer 10."""
    for variant, values in LINEAR.items():
        for seed, value in enumerate(values):
            name = f"{variant}-{seed}.json"
            zero_shot = ZERO_SHOT if variant == "milan" else {}
            write(tmp_path / "linear_eval" / name, **{"linear_eval/top1": value, "linear_eval/knn_top1": value - 1, **zero_shot})
            write(tmp_path / "attentive_probe" / name, **{"attentive_probe/top1": value + 2})
            write(tmp_path / "finetune" / name, **{"finetune/top1": value + 1})
            write(tmp_path / "segment" / name, **{"segment/miou": 50 - value})
            if variant == "milan":
                tops = {"robustness/finetune/corrupted_top1": 20 + 1.5 * seed, "robustness/finetune/pixelate_top1": 7.5}
                write(tmp_path / "robustness" / name, **tops, **{"robustness/linear/corrupted_top1": 10})
            write(tmp_path / "dense_probe" / name, **{"dense_probe/miou": value / 2})
    images = {"classes": 20, "train": 8000, "val": 2500}
    write(tmp_path / "prepare_imagenet.json", **{f"prepare_imagenet/{name}": count for name, count in images.items()})
    write(tmp_path / "prepare_ade20k.json", **{"prepare_ade20k/val": 500, **CONSTANT})
    write(tmp_path / "teacher.json", **{"teacher/zero_shot_top1": 75.6, "teacher/linear_top1": 79.2, "teacher/knn_top1": 77.5})
    shares = {"importance_on_object": 40.6, "object_area": 14.9, "importance_above_area": 97.25}
    write(tmp_path / "extract_targets.json", **{f"extract_targets/{name}": share for name, share in shares.items()})
    return tmp_path


def test_the_table_shows_the_last_evaluation_and_notes_a_better_one(metrics):
    assert "best of the training" not in table.markdown(read_results(metrics, PUBLISHED, recipe()))
    write(metrics / "linear_eval/milan-0.json", **{"linear_eval/top1": 35.0, "linear_eval/best_top1": 35.2, "linear_eval/knn_top1": 34.0})
    write(metrics / "finetune/mae-1.json", **{"finetune/top1": 12.4, "finetune/best_top1": 12.5})
    write(metrics / "finetune/mae-0.json", **{"finetune/top1": 11.0, "finetune/best_top1": 11.04})  # prints alike
    results = read_results(metrics, PUBLISHED, recipe())
    assert cells(table.markdown(results), "MILAN")[4] == "36.0 (35.0–37.0)"
    assert (
        "The table shows the last evaluation; best of the training where it was better: linear eval of MILAN, seed 0: 35.2 "
        "(last: 35.0); fine-tuning of MAE, seed 1: 12.5 (last: 12.4)."
    ) in table.notes(results)


def cells(text: str, algorithm: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {algorithm} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_training_over_an_edit_of_code_is_named_below_the_table(metrics):
    assert "edit of the code" not in table.markdown(read_results(metrics, PUBLISHED, recipe()))
    write(metrics / "pretrain" / "milan-1.json", **{"pretrain/loss": 0.5, "edited_while_training": "milan/method/masking.py"})
    said = table.markdown(read_results(metrics, PUBLISHED, recipe()))
    assert "not by one piece of code: pretrain milan-1 (milan/method/masking.py)." in said


def test_doubts_of_stages_stand_below_the_table(metrics):
    assert "Warning" not in table.markdown(read_results(metrics, PUBLISHED, recipe()))
    write(metrics / "extract_targets.json", doubts="Its features are constant.")
    write(metrics / "pretrain" / "milan-1.json", **{"pretrain/loss": 0.001, "doubts": "The loss is near zero. So."})
    said = table.notes(read_results(metrics, PUBLISHED, recipe()))
    assert "Warning of extract_targets: Its features are constant." in said
    assert "Warning of pretrain milan-1: The loss is near zero. So." in said


def test_means_and_ranges_by_hand(metrics):
    ours = read_results(metrics, PUBLISHED, recipe()).ours
    assert list(ours.index) == ["scratch", "mae", "milan"]
    assert ours.loc["milan"].to_dict() == pytest.approx(
        {"linear": 36.02, "linear_low": 35.0, "linear_high": 37.04, "knn": 35.02, "knn_low": 34.0, "knn_high": 36.04}
        | {"zero_shot": 30.0, "zero_shot_low": 30.0, "zero_shot_high": 30.0}
        | {"zero_shot_masked": 20.04, "zero_shot_masked_low": 20.04, "zero_shot_masked_high": 20.04}
        | {"attentive": 38.02, "attentive_low": 37.0, "attentive_high": 39.04}
        | {"finetune": 37.02, "finetune_low": 36.0, "finetune_high": 38.04, "miou": 13.98, "miou_low": 12.96, "miou_high": 15.0}
        | {"corrupted": 20.75, "corrupted_low": 20.0, "corrupted_high": 21.5}
        | {"dense": 18.01, "dense_low": 17.5, "dense_high": 18.52}
    )


def test_row_shows_mean_range_recipe_weights_and_curves(metrics):
    row = cells(table.markdown(read_results(metrics, PUBLISHED, recipe())), "MILAN")
    p = recipe()
    assert row[1:4] == [p.model.name, f"{p.pretrain.epochs:g}", str(p.pretrain.batch_size)]
    assert row[4:6] == ["36.0 (35.0–37.0)", "35.0 (34.0–36.0)"]
    assert row[8:11] == ["38.0 (37.0–39.0)", "37.0 (36.0–38.0)", "20.8 (20.0–21.5)"]
    assert row[11:14] == ["14.0 (13.0–15.0)", "18.0 (17.5–18.5)", "[demo](../conf/scale/demo.yaml)"]
    assert row[14] == "[0](../outs/demo/pretrain/milan-0), [1](../outs/demo/pretrain/milan-1)"
    assert row[15] == "[0](curves/demo/pretrain/milan-0.csv), [1](curves/demo/pretrain/milan-1.csv)"


def test_no_pretraining_has_no_epochs_and_no_curve(metrics):
    row = cells(table.markdown(read_results(metrics, PUBLISHED, recipe())), "No pretraining")
    assert row[2:4] == ["–", "–"] and row[15] == "–"


def test_zero_shot_columns_and_their_explanation(metrics):
    r = read_results(metrics, PUBLISHED, recipe())
    text = table.markdown(r)
    head = cells(text, "Algorithm")
    assert head[6:8] == ["Zero-shot", "Zero-shot, masked"]
    assert cells(text, "MILAN")[6:8] == ["30.0 (30.0–30.0)", "20.0 (20.0–20.0)"] and cells(text, "MAE")[6:8] == ["–", "–"]
    assert any(said.startswith("Zero-shot: ") and "75 % of the patches masked at random" in said for said in table.notes(r))
    rows = list(csv.DictReader(io.StringIO(table.csv(r))))
    assert [row["zero_shot"] for row in rows[:3]] == ["", "", "30.0"] and rows[2]["zero_shot_masked"] == "20.04"
    assert r"30.0 (30.0--30.0) & 20.0 (20.0--20.0)" in table.latex(r) and "nan" not in text + table.csv(r) + table.latex(r)


def test_robustness_has_a_column_and_a_table_of_its_own(metrics):
    r = read_results(metrics, PUBLISHED, recipe())
    text = table.markdown(r)
    assert cells(text, "Algorithm")[10] == "Corrupted top-1" and cells(text, "MAE")[10] == "–", "a dash where it was not measured"
    assert "| Algorithm | Head | Corrupted top-1 | Pixelate |" in text
    assert "| MILAN | fine-tuned | 20.8 | 7.5 |" in text and "| MILAN | linear layer | 10.0 | – |" in text
    assert any("there is no AlexNet" in said for said in table.notes(r))


def test_without_robustness_there_is_no_word_of_it(metrics):
    text = table.markdown(read_results(metrics, PUBLISHED, recipe(["scratch", "mae"])))
    assert "### Robustness" not in text and "AlexNet" not in text


@pytest.mark.parametrize("name, value, said", [
    ("linear_eval/zero_shot_top1", "high", "zero_shot_top1 is 'high' and no number"),
    ("linear_eval/knn_top1", "high", "knn_top1 is 'high' and no number"),
    ("linear_eval/knn_top1", 10**400, "no valid JSON object of numbers and words"),
    ("linear_eval/zero_shot_top1", 10**400, "no valid JSON object of numbers and words"),
], ids=["a word beside", "a word", "a huge number", "a huge number beside"])  # fmt: skip
def test_a_value_that_is_no_number_is_named_with_its_file(metrics, name, value, said):
    path = metrics / "linear_eval/milan-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=f"^{path}.*{said}"):
        read_results(metrics, PUBLISHED, recipe())


def test_without_zero_shot_results_there_is_no_explanation(metrics):
    text = table.markdown(read_results(metrics, PUBLISHED, recipe(["scratch", "mae"])))
    assert cells(text, "MAE")[6:8] == ["–", "–"] and "- Zero-shot:" not in text


def test_one_seed_has_no_range_and_says_so(metrics):
    text = table.markdown(read_results(metrics, PUBLISHED, recipe(seeds=[1])))
    assert cells(text, "MILAN")[4:13] == ["37.0", "36.0", "30.0", "20.0", "39.0", "38.0", "21.5", "13.0", "18.5"]
    assert "One seed, so the spread over seeds is not known; the sampling error of a top-1 over 2,500 images is up to 1.0 points" in text


def test_images_without_labels_have_no_sentence_on_labels(metrics):
    labelled = table.notes(read_results(metrics, PUBLISHED, recipe()))
    write(metrics / "prepare_imagenet.json", **{"prepare_imagenet/classes": 0, "prepare_imagenet/train": 8000, "prepare_imagenet/val": 2500})
    without = table.notes(read_results(metrics, PUBLISHED, recipe()))
    assert without == ["Means over 2 seeds, the range in brackets.", *labelled[2:]]


def test_sentences_on_the_order_follow_from_the_numbers(metrics):
    assert table.order_sentences(read_results(metrics, PUBLISHED, recipe())) == [
        "MILAN: linear eval 36.0, 24.5 above no pretraining, 25.3 above MAE.",
        "MILAN: fine-tuning 37.0, 24.5 above no pretraining, 25.3 above MAE.",
        "MILAN: segmentation mIoU 14.0, 24.5 below no pretraining, 25.3 below MAE.",
        "MILAN: dense probe mIoU 18.0, 12.2 above no pretraining, 12.6 above MAE.",
        "Expected order, as each ingredient of the paper adds to the one before: no pretraining < MAE < MILAN.",
        "Linear eval: not in this order, MAE (10.7) is below no pretraining (11.5), though their ranges over seeds overlap.",
        "Fine-tuning: not in this order, MAE (11.7) is below no pretraining (12.5), though their ranges over seeds overlap.",
        "Segmentation mIoU: not in this order, MILAN (14.0) is below MAE (39.3).",
        "Dense probe mIoU: not in this order, MAE (5.4) is below no pretraining (5.8), though their ranges over seeds overlap.",
    ]


def test_without_a_number_there_is_no_mean_no_lead_and_no_order(metrics):
    """NaN and infinity are one: no number. The other measures of the run count."""
    for value in (math.nan, math.inf):
        write(metrics / "linear_eval/mae-1.json", **{"linear_eval/top1": value, "linear_eval/knn_top1": 10})
        r = read_results(metrics, PUBLISHED, recipe())
        assert cells(table.markdown(r), "MAE")[4:6] == ["–", "9.5 (9.0–10.0)"]
        said = [*table.order_sentences(r), *table.notes(r)]
        assert "MILAN: linear eval 36.0, 24.5 above no pretraining, no number for MAE." in said
        assert "Linear eval: not known, without a number for MAE." in said
        assert "NaN or infinite, so without a mean and a verdict: linear eval of MAE, seed 1." in said
        assert "nan" not in table.csv(r) + table.latex(r).replace("NaN", "")
        assert pd.isna(r.ours.loc["mae", ["linear", "linear_low", "linear_high"]]).all()
        plots.plt.close(plots.bars(r))


def test_a_best_variant_without_a_number_has_no_lead(metrics):
    write(metrics / "finetune/milan-0.json", **{"finetune/top1": math.nan})
    assert "MILAN: no number for fine-tuning." in table.order_sentences(read_results(metrics, PUBLISHED, recipe()))


def test_a_zero_shot_score_of_one_seed_is_missed_and_one_of_no_seed_is_not(metrics):
    write(metrics / "linear_eval/milan-1.json", **{"linear_eval/top1": 37.04, "linear_eval/knn_top1": 36, **dict.fromkeys(ZERO_SHOT, math.nan)})
    said = table.notes(read_results(metrics, PUBLISHED, recipe()))
    assert any(text.endswith(": zero-shot of MILAN, seed 1; zero-shot, masked of MILAN, seed 1.") for text in said)


def test_means_of_exact_halves_are_rounded_up(metrics):
    """Means of 5.3 and 5.4, and of 11.7 and 11.8."""
    for seed, value in enumerate((5.3, 5.4)):
        write(metrics / f"linear_eval/mae-{seed}.json", **{"linear_eval/top1": value, "linear_eval/knn_top1": value + 6.4})
    assert cells(table.markdown(read_results(metrics, PUBLISHED, recipe())), "MAE")[4:6] == ["5.4 (5.3–5.4)", "11.8 (11.7–11.8)"]


def test_words_in_place_of_a_number_are_named(metrics):
    write(metrics / "finetune/mae-0.json", **{"finetune/top1": "high"})
    with pytest.raises(UserError, match="mae-0.json: finetune/top1 is 'high' and no number"):
        read_results(metrics, PUBLISHED, recipe())


def test_names_of_any_characters_stay_in_their_cells(metrics, tmp_path):
    """A method named like markup in published numbers, and a model's name."""
    odd = r"a|b \ {x} ^ ~ $y$ <b> _z_"
    rows = read_published(PUBLISHED)
    rows.loc[0, ["method", "source"]] = [odd, f"{odd} https://example.org/a|b"]
    rows.to_csv(tmp_path / "published.csv", index=False)
    r = read_results(metrics, tmp_path / "published.csv", recipe(model=dataclasses.replace(recipe().model, name=odd)))
    text, tex = table.markdown(r), table.latex(r)
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in text.split("## Published")[1].splitlines() if line.startswith("|")}
    assert len(bars) == 1 and text.count(r"a\|b \\ {x} ^ \~ \$y\$ \<b> \_z\_") == 2 + len(LINEAR)
    assert "(https://example.org/a%7Cb)" in text
    escaped = r"a\textbar{}b \textbackslash{} \{x\} \textasciicircum{} \textasciitilde{} \$y\$ \textless{}b\textgreater{} \_z\_"
    assert tex.count(escaped) == 1 + len(LINEAR)
    assert list(csv.DictReader(io.StringIO(table.csv(r))))[0]["backbone"] == odd


def test_means_that_print_alike_are_level(metrics):
    """11.5 and 11.52 are both printed as 11.5."""
    write(metrics / "linear_eval/mae-0.json", **{"linear_eval/top1": 11.5, "linear_eval/knn_top1": 10})
    write(metrics / "linear_eval/mae-1.json", **{"linear_eval/top1": 11.54, "linear_eval/knn_top1": 10})
    said = table.order_sentences(read_results(metrics, PUBLISHED, recipe()))
    assert "Linear eval: not in this order, MAE (11.5) is level with no pretraining." in said


def test_a_released_checkpoint_is_named_by_its_file(metrics):
    pretrain = dataclasses.replace(read_params("params.yaml").pretrain, weights="/models/mae_vit_base.pth")
    text = table.markdown(read_results(metrics, PUBLISHED, recipe(["milan"], pretrain=pretrain)))
    assert cells(text, "mae_vit_base.pth")[2:6] == ["–", "–", "36.0 (35.0–37.0)", "35.0 (34.0–36.0)"]
    assert "MILAN: linear eval" not in text


def test_own_images_name_the_built_in_scenes_and_warn_that_the_teacher_may_have_seen_labels(metrics, tree):
    own = dataclasses.replace(read_params("params.yaml").data, imagenet="/my/images")
    trained = validate(Params, tree, "params.yaml").teacher
    results = read_results(metrics, PUBLISHED, recipe(data=own, teacher=trained))
    assert table.measured_on(results).endswith(
        "500 scenes with 11 classes of the built-in world (the most frequent class everywhere: 2.1, and 17.3 % of the pixels)."
    )
    assert table.NAMES_CAVEAT in table.notes(results)
    assert "built-in" not in table.measured_on(read_results(metrics, PUBLISHED, recipe()))


def test_the_expected_order_and_a_single_variant(metrics):
    assert "Linear eval: in this order." in table.order_sentences(read_results(metrics, PUBLISHED, recipe(["mae", "milan"])))
    alone = table.order_sentences(read_results(metrics, PUBLISHED, recipe(["milan"])))
    assert alone == ["MILAN: linear eval 36.0.", "MILAN: fine-tuning 37.0.", "MILAN: segmentation mIoU 14.0.", "MILAN: dense probe mIoU 18.0."]


def test_notes_name_the_teacher_and_the_captions(metrics):
    said = table.notes(read_results(metrics, PUBLISHED, recipe()))
    assert "Of the 8,000 labels of training images linear evaluation and k-NN had 100 %, the attentive probe 100 % and fine-tuning 20 %." in said
    assert "The teacher's own accuracy: zero-shot 75.6, linear 79.2, k-NN 77.5." in said
    assert (
        "40.6 % of the teacher's patch importance falls on the object, which covers 14.9 % of the image; in 97.3 % of "
        "the images the first share is larger."
    ) in said
    assert said[-1] == table.CAPTIONS_CAVEAT and "extra information" in said[-1]


def test_a_released_teacher_has_no_numbers_in_the_notes(metrics):
    write(metrics / "teacher.json")
    write(metrics / "extract_targets.json")
    assert [said[:9] for said in table.notes(read_results(metrics, PUBLISHED, recipe()))] == [
        "Means ove", "Of the 8,", "Zero-shot", "Corrupted", "The CLIP ",
    ]  # fmt: skip


@pytest.mark.parametrize("missing", ["linear_eval/mae-1.json", "segment/milan-0.json", "prepare_ade20k.json", "teacher.json"])
def test_missing_file_is_named(metrics, missing):
    (metrics / missing).unlink()
    with pytest.raises(UserError, match=missing.replace(".", r"\.")):
        read_results(metrics, PUBLISHED, recipe())


def test_an_optional_number_that_one_seed_lacks_is_named(metrics):
    (metrics / "robustness/milan-1.json").unlink()
    assert without_number(read_results(metrics, PUBLISHED, recipe())) == ["corrupted top-1 of MILAN, seed 1"]


def test_evaluations_that_were_not_run_are_dashes(metrics, tmp_path):
    """No scenes, and one fine-tuning of six is missing."""
    for path in [metrics / "prepare_ade20k.json", metrics / "finetune/mae-1.json", *metrics.glob("segment/*"), *metrics.glob("dense_probe/*")]:
        path.unlink()
    results = read_results(metrics, PUBLISHED, recipe(), partial=True)
    said = table.markdown(results)
    assert "Not run, so a dash in the table: finetune (mae-1), segment, dense_probe." in said
    assert "(chance 5.0 %)." in said and "mIoU in % over" not in said and "NaN" not in said
    rows = {row["Algorithm"]: row for row in table.our_rows(results, lambda text, path: text)}
    assert rows["MILAN"]["Linear eval"] == "36.0 (35.0–37.0)" and rows["MILAN"]["Fine-tuning"] == "37.0 (36.0–38.0)"
    assert rows["MILAN"]["Segmentation mIoU"] == rows["MILAN"]["Dense probe mIoU"] == rows["MAE"]["Fine-tuning"] == "–"
    assert not any("mIoU" in sentence for sentence in table.order_sentences(results))
    milan = next(row for row in csv.DictReader(io.StringIO(table.csv(results))) if row["variant"] == "milan")
    assert milan["miou"] == milan["dense"] == "" and float(milan["linear"]) == 36.02
    axes = plots.bars(results).axes
    assert [axis.get_title().endswith("(not run)") for axis in axes] == [False, False, True, True]
    for path in ("teacher", *(f"linear_eval/{variant}-{seed}" for variant in LINEAR for seed in (0, 1))):
        (csv_file := tmp_path / "curves" / f"{path}.csv").parent.mkdir(parents=True, exist_ok=True)
        csv_file.write_text("step,epoch,loss,lr\n1,1.0,2.0,0.1\n")
    missing = [(stage, f"{variant}-{seed}") for stage in ("pretrain", "attentive_probe") for variant in LINEAR for seed in (0, 1)]
    every = [("finetune", f"{variant}-{seed}") for variant in LINEAR for seed in (0, 1)]
    panels = plots.curves(tmp_path / "curves", recipe(), [*results.missing, *missing, *every]).axes
    assert [axis.get_title() for axis in panels] == ["Teacher, contrast", "Linear evaluation"]


def test_what_was_seen_while_pretraining_is_drawn_with_the_losses(tmp_path):
    """Of four points two have values of the monitor; the pixels' loss has a panel of its own, and k-NN and RankMe have all."""
    params, folder = recipe(), tmp_path / "curves"
    names = [f"{variant}-{seed}" for variant in params.variants for seed in params.seeds]
    for path in ("teacher", *(f"{stage}/{name}" for stage in {stage for stage, _, _ in plots.CURVES.values()} for name in names)):
        (csv_file := folder / f"{path}.csv").parent.mkdir(parents=True, exist_ok=True)
        csv_file.write_text("step,epoch,loss,lr\n")
    watched = "step,epoch,loss,lr,rankme,knn_top1\n1,1.0,0.9,0.1,,\n2,2.0,0.8,0.1,12.5,40.0\n3,3.0,0.7,0.1,,\n4,4.0,0.6,0.1,14.5,60.0\n"
    (folder / "pretrain/milan-1.csv").write_text(watched)
    drawn = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines] for axis in plots.curves(folder, params).axes}
    drawn = {title: [line for line in lines if line] for title, lines in drawn.items()}
    assert drawn == {
        "Pretraining, CLIP features: 2 – 2 cos": [[[1, 0.9], [2, 0.8], [3, 0.7], [4, 0.6]]],
        "Pretraining, k-NN of class tokens": [[[2, 40.0], [4, 60.0]]],
        "Pretraining, RankMe of class tokens": [[[2, 12.5], [4, 14.5]]],
    }


def test_missing_entry_and_broken_file_are_named(metrics):
    write(metrics / "finetune/mae-0.json", other=1)
    with pytest.raises(UserError, match=r"mae-0\.json has no entry 'finetune/top1'"):
        read_results(metrics, PUBLISHED, recipe())
    (metrics / "finetune/mae-0.json").write_text('{"finetune/top1": ')
    with pytest.raises(UserError, match=r"mae-0\.json is no valid JSON"):
        read_results(metrics, PUBLISHED, recipe())


def test_missing_published_file_is_named(metrics, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read_results(metrics, tmp_path / "nowhere.csv", recipe())


def test_markdown_keeps_ours_published_and_reruns_apart(metrics):
    ours, published, again = table.markdown(read_results(metrics, PUBLISHED, recipe())).split("\n## ")[1:]
    assert ours.startswith("Our results on the built-in world: not comparable with the published numbers")
    assert published.startswith("Published: ImageNet-1K and ADE20K") and again.startswith("Re-run by others: ImageNet-1K and ADE20K")
    assert "ViT-B/16" not in ours and "Segmentation mIoU" in ours and "ADE20K" not in ours
    for block in (published, again):
        assert recipe().model.name not in block
        rows = [line for line in block.splitlines() if line.startswith("| ")][2:]
        assert rows and all(line.count("ViT-B/16") == 1 for line in rows)
    assert cells(published, "MILAN")[5:8] == ["79.9", "85.4", "52.7"]
    assert cells(again, "MILAN (OpenMMLab, own code)")[5:8] == ["78.9", "85.3", "–"]


def test_csv_marks_the_kind_and_data_of_each_row(metrics):
    rows = list(csv.DictReader(io.StringIO(table.csv(read_results(metrics, PUBLISHED, recipe())))))
    kinds = [row["kind"] for row in rows]
    assert kinds == sorted(kinds, key=["ours", "published", "re-run"].index)
    assert [row["variant"] for row in rows[:3]] == list(LINEAR)
    assert {(row["data"], row["backbone"]) for row in rows[:3]} == {("the built-in world", recipe().model.name)}
    assert all(row["data"] == "ImageNet-1K and ADE20K" and row["source"] and not row["variant"] for row in rows[3:])
    assert (rows[2]["linear"], rows[2]["linear_low"], rows[2]["seeds"], rows[0]["epochs"]) == ("36.02", "35.0", "2", "")


def test_real_data_is_named(metrics):
    data = dataclasses.replace(read_params("params.yaml").data, name="flowers", imagenet="/data/imagenet", ade20k="/data/ade20k")
    title, text = table.markdown(read_results(metrics, PUBLISHED, recipe(data=data))).split("\n## ")[:2]
    assert title == "# Results on flowers, at scale demo\n" and text.startswith("Our results on flowers\n")
    assert "](curves/flowers/pretrain/milan-0.csv)" in text and "](../outs/flowers/pretrain/milan-1)" in text
    assert "built-in world" not in text and "ADE20K mIoU" in text and "not comparable" not in text


def test_latex_has_a_table_for_each_kind_and_escapes(metrics):
    text = table.latex(read_results(metrics, PUBLISHED, recipe()))
    assert text.count(r"\begin{table}") == text.count(r"\bottomrule") == 3
    assert r"MILAN & ViT-B/16 & 400 & 4096 & CLIP ViT-B & 79.9 & 85.4 & 52.7 \\" in text
    assert r"5.0 \%" in text and "–" not in text


def test_published_rows_have_a_kind_a_source_and_plausible_numbers():
    rows = read_published(PUBLISHED)
    assert set(rows["kind"]) == {"published", "re-run"} and rows["source"].notna().all() and (rows["backbone"] == "ViT-B/16").all()
    for column, low, high in (("linear", 50, 81), ("finetune", 82, 86), ("miou", 45, 54)):
        assert rows[column].dropna().between(low, high).all()


def test_report_stage_starts_without_torch():
    subprocess.run([sys.executable, "-c", "import sys, stages.report; sys.exit('torch' in sys.modules)"], check=True)


def test_a_missing_column_of_published_numbers_is_named(tmp_path):
    (tmp_path / "published.csv").write_text("method,source\nMAE,here\n")
    with pytest.raises(UserError, match="published.csv lacks the column backbone; it must have method"):
        read_published(tmp_path / "published.csv")
