"""What evaluation leaves and compares: files, published numbers, weights of any format, views."""

import csv
import json

import pytest
import torch
import train_suite as suite
from matplotlib.axes import Axes
from torch import nn
from train_suite import recipe as recipe
from train_suite import videos as videos

from model import create
from model.weights import save_weights, to_official, to_torchvision
from train import evaluate, results
from train.checkpoint import CheckpointError
from train.data import VideoDataset
from train.evaluate import Evaluation, view_logits
from train.lists import read_list
from train.loop import Run
from train.parallel import Group
from train.recipes import RECIPES
from train.trained import PUBLISHED, Trained, load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    assert suite.train(suite.changed(recipe, loop={"epochs": 1}), output) == 0
    return output / "last.pt"


@pytest.fixture
def tiny(recipe, monkeypatch):
    """The recipe under a name, as `--recipe` takes it."""
    monkeypatch.setitem(RECIPES, "demo", recipe)
    return recipe


def test_the_files_say_what_was_printed(checkpoint, videos, tmp_path, capsys):
    words = ("--data.test_list=test_broken.txt", "--output", str(tmp_path / "out"))
    assert suite.run_evaluate(checkpoint, *words) == 0
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert f"top1 {told['top1']:.2%}, top5 {told['top5']:.2%}" in said
    assert (told["videos"], told["broken"], told["views"]) == (8, 4, "1 x 1")
    assert (told["checkpoint"], told["precision"]) == (str(checkpoint), "float32")
    assert told["recipe"]["data"]["test_list"] == "test_broken.txt"
    assert [each["video"] for each in told["unreadable"]] == list(suite.BROKEN)
    with open(tmp_path / "out" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    listed = list(read_list(videos / "test.txt"))
    classes = (videos / "classes.txt").read_text().split()
    assert [row["video"] for row in rows] == [each.name for each in listed]
    assert [row["class"] for row in rows] == [classes[each.label] for each in listed]
    hits = sum(row["class"] == row["top1"] for row in rows)
    assert hits / len(rows) == told["top1"]
    for row in rows:
        shares = [float(row[f"probability{rank}"]) for rank in range(1, 6)]
        assert shares == sorted(shares, reverse=True)
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_matrix_are_classes_and_columns_predictions():
    predicted, labels = torch.tensor([0, 2, 2, 1]), torch.tensor([0, 0, 2, 2])
    counts = results.confusion_matrix(predicted, labels, 3)
    assert counts.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("count", [2, 61])
def test_many_classes_are_drawn_without_their_names(tmp_path, monkeypatch, count):
    named, plain = [], Axes.set_xticks
    monkeypatch.setattr(
        Axes,
        "set_xticks",
        lambda axes, places, labels=(), **words: (
            named.extend(labels),
            plain(axes, places, labels or None, **words),
        ),
    )
    png = tmp_path / "confusion.png"
    names = [f"${n} to $10, c^{n} $a_$" for n in range(count)]
    results.draw_confusion(torch.eye(count), names, png)
    assert png.stat().st_size > 1000
    assert len(named) == (2 if count == 2 else 0)


def test_published_numbers_stand_beside_ours():
    scores = torch.eye(10)[torch.tensor([0, 1, 2, 3, 9])]
    result = Evaluation(scores, torch.tensor([0, 1, 2, 3, 4]), ["video"] * 5, [])
    lines = results.compare(result, PUBLISHED["swin_t_k400_1k"]).splitlines()
    assert lines[1].split() == ["top1", "80.00", "78.80", "+1.20"]
    assert lines[2].split()[:3] == ["top5", "80.00", "93.60"]
    assert lines[-1] == "published: upstream's README"


# Read in upstream's README, and for swin_l in mmaction2's, and written down by hand.
README = {
    "swin_t_k400_1k": (78.8, 93.6),
    "swin_s_k400_1k": (80.6, 94.5),
    "swin_b_k400_1k": (80.6, 94.6),
    "swin_b_k400_22k": (82.7, 95.5),
    "swin_b_k600_22k": (84.0, 96.5),
    "swin_b_w1677_sthv2": (69.6, 92.7),
    "swin_l_k400_22k": (83.46, 95.91),
}


def test_each_published_model_has_a_recipe_and_weights_of_a_name():
    from model.weights.download import locate

    assert {name: (each.top1, each.top5) for name, each in PUBLISHED.items()} == README
    urls = {locate(RECIPES[name].model.name, each.weights) for name, each in PUBLISHED.items()}
    assert len(urls) == len(PUBLISHED)
    assert all(url.startswith("https://") for url in urls)


def test_one_command_tests_published_weights(videos, recipe, tmp_path, monkeypatch, capsys):
    """Here the weights behind the name are a file of ours."""
    path = tmp_path / "released.pth"
    model = create("swin_nano", num_classes=8)
    torch.save({"meta": {}, "state_dict": to_official(model)}, path)
    monkeypatch.setitem(RECIPES, "swin_t_k400_1k", recipe)
    monkeypatch.setattr("train.trained.locate", lambda variant, weights: path)
    with suite.one_thread():
        words = ["--published", "swin_t_k400_1k", *suite.MACHINE, "--loop.views-per-pass=1"]
        assert evaluate.main(words) == 0
    said = capsys.readouterr().out
    assert " on 8 videos\n" in said
    assert f"{'published: ' + PUBLISHED['swin_t_k400_1k'].source}\n" in said


@pytest.mark.parametrize("format", ["official", "torchvision", "own"])
def test_weights_of_any_format_are_tested_alike(tiny, videos, tmp_path, capsys, format):
    torch.manual_seed(0)
    model = create("swin_nano", num_classes=8)
    path = tmp_path / "weights.pth"
    if format == "own":
        path = path.with_suffix(".safetensors")
        save_weights(model, path)
    else:
        torch.save((to_official if format == "official" else to_torchvision)(model), path)
    assert suite.run_evaluate(path, "--recipe", "demo", "--output", str(tmp_path)) == 0
    table = (tmp_path / "predictions.csv").read_text()
    # The names of the classes are the data set's.
    assert table.splitlines()[1].split(",")[1] in (videos / "classes.txt").read_text().split()
    found = load_trained(path, "auto", CPU, "demo")
    for mine, its in zip(found.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert not found.model.training


def test_what_cannot_be_a_trained_model_is_refused(tiny, checkpoint, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save(to_official(create("swin_nano", num_classes=3)), weights)
    bare = tmp_path / "bare.pth"
    torch.save(to_official(create("swin_nano")), bare)
    for path, words, said in (
        (weights, [], "expected a file written by `python -m train`"),
        (weights, ["--recipe", "demo"], "has 8 class names, the model 3 classes"),
        (bare, ["--recipe", "demo"], "has no classifier of videos"),
        (checkpoint, ["--recipe", "demo"], "has a recipe of its own: leave out --recipe demo"),
        ("k9000", ["--recipe", "demo"], "weights must be a name that swin_nano has"),
    ):
        assert suite.run_evaluate(path, *words) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_class_names_must_be_those_that_were_trained():
    trained = Trained(nn.Identity(), RECIPES["demo"], ["a", "b"])
    assert trained.named(None, "x").classes == trained.named(["a", "b"], "x").classes == ["a", "b"]
    with pytest.raises(CheckpointError, match=r"^x: these are not the class names"):
        trained.named(["b", "a"], "x")


@pytest.mark.parametrize("views_per_pass", [0, 1, 2, 5, 9])
def test_views_may_take_turns(views_per_pass):
    seen = []

    class Model(nn.Module):
        def forward(self, clips):
            seen.append(clips.shape[1])
            return clips.mean(dim=(3, 4, 5))

    clips = torch.randint(256, (2, 5, 3, 2, 4, 4), dtype=torch.uint8)
    logits = view_logits(Model(), clips, views_per_pass)
    torch.testing.assert_close(logits, view_logits(Model(), clips, 0))
    assert seen[:-1] == {0: [5], 1: [1] * 5, 2: [2, 2, 1], 5: [5], 9: [5]}[views_per_pass]


def test_scores_that_are_no_finite_numbers_are_told(checkpoint, monkeypatch, capsys):
    def overflow(model, clips, views_per_pass):
        logits = view_logits(model, clips, views_per_pass)
        logits[0] = float("nan")
        return logits

    monkeypatch.setattr("train.evaluate.view_logits", overflow)
    assert suite.run_evaluate(checkpoint) == 1
    out, err = capsys.readouterr()
    assert "on 8 videos, 3 have scores that are no finite numbers\n" in out
    assert err.startswith("the scores of 3 videos are no finite numbers, the first being test/")


def test_folders_of_classes_name_the_classes_of_weights(tiny, videos, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(to_official(create("swin_nano", num_classes=8)), path)
    words = ["--recipe", "demo", "--data.class-names=none.txt", "--data.test-list=test"]
    assert suite.run_evaluate(path, *words, "--output", str(tmp_path)) == 0
    rows = (tmp_path / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0].split("/")[1] for row in rows] == [row.split(",")[1] for row in rows]


def test_processes_meet_after_each_batch(recipe, monkeypatch):
    """Else the first that is done would wait at the end for longer than gloo lets it."""
    met = []
    monkeypatch.setattr(Group, "wait", lambda group: met.append(group))
    data = suite.changed(recipe, loop={"test_batch_size": 3})
    videos = data.data.read("test.txt", data.data.read_class_names())
    model = create("swin_nano", num_classes=8)
    found = evaluate.evaluate(model, VideoDataset(videos, data.data), data.loop, CPU)
    assert (len(found.labels), len(met)) == (8, 3)


def test_processes_with_other_lists_are_refused(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(Group, "gather", lambda group, items: [items, (*items[:-1], "another")])
    assert suite.run_evaluate(checkpoint) == 1
    said = "the processes of the run do not have the same recipe, class names, test videos\n"
    assert capsys.readouterr().err == said


def test_a_place_that_cannot_be_written_is_told_before_the_test(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert suite.run_evaluate(checkpoint, "--output", str(tmp_path / "file" / "out")) == 1
    out, err = capsys.readouterr()
    assert err == f"{tmp_path / 'file' / 'out'}: not a directory\n"
    assert "top1" not in out


def test_a_test_during_training_has_the_views_of_validation(recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("train.loop.evaluate", lambda _, dataset, *rest: seen.append(dataset.views))
    views = {"val_clips": 3, "val_crops": 3, "test_clips": 2, "test_crops": 1}
    Run(suite.changed(recipe, data=views), tmp_path / "run").evaluate()
    assert seen == [(3, 3, 16)]


def test_the_views_of_a_pass_are_the_recipes(checkpoint, monkeypatch, capsys):
    seen, plain = [], view_logits

    def record(model, clips, views_per_pass):
        seen.append((clips.shape[1], views_per_pass))
        return plain(model, clips, views_per_pass)

    monkeypatch.setattr("train.evaluate.view_logits", record)
    assert suite.run_evaluate(checkpoint, "--data.test-clips=3", "--loop.views-per-pass=2") == 0
    assert set(seen) == {(3, 2)}


def test_neither_or_both_of_checkpoint_and_published_are_refused(capsys):
    for words in ([], ["--checkpoint", "x.pt", "--published", "swin_t_k400_1k"]):
        with pytest.raises(SystemExit):
            evaluate.main(words)
        assert "one of --checkpoint and --published is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--published", "swin_t_k400_1k", "--recipe", "demo"])
    assert "leave out --recipe" in capsys.readouterr().err
