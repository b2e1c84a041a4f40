import json

import pytest
import torch
from PIL import Image

from curation.cli import main
from curation.dinov2.evaluate.backbones import load_backbone
from curation.dinov2.evaluate.evaluation import evaluate
from curation.dinov2.train import train
from curation.errors import VectorError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(manifest, small_settings, tmp_path_factory):
    """Return the folder of a training run of eight steps."""
    folder = tmp_path_factory.mktemp("run")
    train(manifest, small_settings, folder, resume=False, device="cpu")
    return folder


QUICK = [
    "--set", "crop_share=1.0", "--set", "raw_side_px=8", "--set", "knn.k=[3, 10]", "--set", "linear.epochs=2",
    "--set", "logistic.powers=[-1.0, 1.0]", "--set", "pictures.num_images=2",
]  # fmt: skip


def test_the_command_measures_a_run_beside_random_weights_and_raw_pixels(run, labelled_parquet, tmp_path, capsys):
    (tmp_path / ".features").mkdir()  # of an evaluation that was killed
    (tmp_path / ".features" / "0").write_bytes(bytes(1000))
    command = ["evaluate", "--run", str(run), "--data", str(labelled_parquet), "--device", "cpu", *QUICK]
    assert main([*command, "--output", str(tmp_path)]) == 0

    printed = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "evaluation.json").read_text())
    names = ["teacher, 8 steps", "random initialisation", "raw pixels"]
    assert [row["name"] for row in found["rows"]] == names
    assert [next(line for line in printed if line.startswith(name)) for name in names]
    assert printed[0] == "3 classes; 60 images to learn from, 30 images to test on; accuracies in %"
    for row in found["rows"]:
        assert row["knn"].keys() == {"3", "10"}
        chosen, best = row["linear"]["chosen"], row["linear"]["best_on_test"]
        assert chosen["holdout"] == max(head["holdout"] for head in row["linear"]["grid"])
        assert best["test"] >= chosen["test"]
        assert 1 <= row["rankme"] <= 192
    assert len(found["rows"][0]["linear"]["grid"]) == 52
    assert found["rows"][2]["logistic"]["test"] > 0.9  # stripes are plain to see for pixels
    for name in ("attention", "components", "random_attention", "random_components"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.verify()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_evaluation_gives_the_same_figures_again(run, evaluate_settings, tmp_path):
    config = evaluate_settings(tasks=["knn", "linear", "logistic", "spectrum"])
    found = []
    for number in range(2):
        backbones = load_backbone(str(run), CPU, config.seed)
        found.append(evaluate(*backbones, config, tmp_path / str(number), CPU).rows)

    assert found[0] == found[1]


def test_what_needs_no_labels_takes_a_folder_of_images(run, rows, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number, row in enumerate(rows[:12]):
        (tmp_path / "images" / f"{number}.png").write_bytes(row["image"]["bytes"])
    (tmp_path / "images" / "broken.png").write_bytes(b"broken")
    command = ["evaluate", "--run", str(run), "--data", str(tmp_path / "images"), "--tasks", "spectrum", "pictures"]

    assert main([*command, "--output", str(tmp_path / "out"), "--device", "cpu", "--set", "pictures.num_images=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("12 images to test on\n")
    assert "note: 1 images cannot be decoded and were left out" in printed


@pytest.mark.parametrize(
    ("asked", "measured", "note"),
    [
        ([10, 20, 100, 200], {10, 20}, "k-NN with k = 100, 200: there are only 59 images to learn from; left out"),
        ([60, 100], {59}, "k-NN with k = 60, 100: there are only 59 images to learn from; all 59 vote instead"),
        ([59], {59}, None),
    ],
)
def test_more_neighbours_than_images_are_left_out_with_a_note(
    run, rows, write_parquet, evaluate_settings, tmp_path, asked, measured, note
):
    broken = [{**rows[0], "image": {"bytes": b"broken", "path": None}}, *rows[1:]]
    data = {"path": str(write_parquet(tmp_path / "set.parquet", broken))}
    config = evaluate_settings(tasks=["knn"], data=data, knn__k=asked)
    found = evaluate(*load_backbone(str(run), CPU, 0), config, tmp_path / "out", CPU)

    assert [set(row.knn) for row in found.rows] == [measured] * 3
    assert [text for text in found.notes if text.startswith("k-NN")] == ([] if note is None else [note])


def test_features_that_are_not_finite_have_no_figures(run, evaluate_settings, tmp_path):
    trained, random = load_backbone(str(run), CPU, 0)
    trained._network.norm.weight.fill_(float("nan"))

    with pytest.raises(VectorError, match=r"teacher, 8 steps: gives features that are not finite"):
        evaluate(trained, random, evaluate_settings(), tmp_path, CPU)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--run", "nowhere", "--data", "a.parquet"], 2, "is no backbone that can be evaluated"),
        (["--run", "RUN", "--data", "nowhere.parquet"], 1, "nowhere.parquet: does not exist"),
        (["--run", "RUN", "--data", "SET", "--output", "s3://bucket/out"], 2, "must be on a disk of this machine"),
        (["--run", "RUN", "--data", "SET", "--set", "knn.k=[]"], 2, "knn.k: must have at least 1 entries"),
        (["--run", "RUN", "--data", "SET", "--set", "data.label_column=colour"], 1, "set data.label_column to one of"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(run, labelled_parquet, capsys, arguments, code, message):
    places = {"RUN": str(run), "SET": str(labelled_parquet)}
    assert main(["evaluate", "--device", "cpu", *(places.get(word, word) for word in arguments)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_figures_of_a_cpu(run, evaluate_settings, tmp_path):
    config = evaluate_settings(tasks=["knn", "linear", "logistic", "spectrum"])
    rows = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        rows.append(evaluate(*load_backbone(str(run), device, config.seed), config, tmp_path / name, device).rows)

    for ours, theirs in zip(*rows, strict=True):
        assert ours.knn == pytest.approx(theirs.knn, abs=0.04)  # one image of thirty may stand on the edge
        assert ours.rankme == pytest.approx(theirs.rankme, rel=1e-2)
        assert ours.linear[0].test == pytest.approx(theirs.linear[0].test, abs=0.07)


def test_the_file_of_a_run_is_shown_images_as_the_run_was(manifest, settings, tmp_path):
    config = settings(crops={"global_px": 32, "local_px": 16, "num_local": 2, "mean": [0.1] * 3, "std": [0.9] * 3})
    train(manifest, config, tmp_path, resume=False, device="cpu", should_stop=lambda: True)
    pixels = torch.arange(32 * 32 * 3).view(1, 32, 32, 3).byte()

    folder, file = (load_backbone(str(path), CPU, 0)[0] for path in (tmp_path, tmp_path / "teacher.safetensors"))

    assert folder(pixels, 1)[0].cls_ND.allclose(file(pixels, 1)[0].cls_ND, atol=1e-5)
