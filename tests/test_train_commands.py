"""The commands of training on good and bad input: an answer or one sentence, and a status."""

from pathlib import Path

import pytest
import torch
import train_suite as suite
from torch.nn import functional as F
from train_suite import videos as videos

from train.checkpoint import load_checkpoint, save_checkpoint
from train.data import FRAME_ORDERS
from train.evaluate import Evaluation
from train.lists import read_list
from train.recipes import RECIPES
from train.synthetic import CLASSES, OPPOSITE

REASONS = ("the file is truncated", "not a video decord", "the file is empty", "no such file")


@pytest.fixture(scope="module")
def recipe(videos):
    return suite.changed(suite.tiny_recipe(videos), loop={"epochs": 1})


@pytest.fixture(scope="module")
def checkpoint(recipe, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert suite.train(recipe, output) == 0
    return output / "last.pt"


def one_sentence(text: str) -> str:
    """`text`, checked to be a single line that is no traceback."""
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text.removesuffix("\n")


def assert_names_the_broken(said: str) -> None:
    lines = said.splitlines()
    count = lines.index("videos that could not be read: 4")
    named = lines[count + 1 : count + 5]
    for name, reason in zip(suite.BROKEN, REASONS, strict=True):
        assert [line for line in named if line.startswith(f"  {name}: {reason}")], name


# Videos that cannot be read.


def test_training_goes_on_around_broken_videos_and_names_each(recipe, tmp_path, capsys):
    broken = suite.changed(recipe, data={"train_list": "train_broken.txt"}, loop={"epochs": 2})
    assert suite.train(broken, tmp_path / "run") == 0
    assert_names_the_broken(capsys.readouterr().out)
    lines = [line for line in suite.metrics(tmp_path / "run") if line["kind"] == "train"]
    # 20 videos in 7 steps an epoch, of which 16 gave a clip.
    assert len(lines) == 14
    assert sum(line["clips"] for line in lines) == 32


def test_broken_videos_are_named_again_after_an_interruption(recipe, tmp_path, capsys):
    broken = suite.changed(recipe, data={"train_list": "train_broken.txt"})
    assert suite.train(broken, tmp_path / "run") == 0
    capsys.readouterr()
    assert suite.train(broken, tmp_path / "run", "--resume") == 0
    assert_names_the_broken(capsys.readouterr().out)


def test_training_on_broken_videos_alone_is_refused(recipe, videos, tmp_path, capsys):
    (videos / "train_none.txt").write_text("".join(f"{name} 0\n" for name in suite.BROKEN))
    none = suite.changed(recipe, data={"train_list": "train_none.txt"})
    assert suite.train(none, tmp_path / "run") == 1
    said = one_sentence(capsys.readouterr().err)
    assert said.startswith("none of 4 training videos can be opened, the first being ")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_evaluation_goes_on_around_broken_videos_and_names_each(checkpoint, capsys):
    assert suite.run_evaluate(checkpoint) == 0
    intact = capsys.readouterr().out.splitlines()[-1]
    assert intact.endswith(" on 8 videos")
    assert suite.run_evaluate(checkpoint, "--data.test_list=test_broken.txt") == 0
    said = capsys.readouterr().out
    assert f"{intact}, 4 could not be read\n" in said
    assert_names_the_broken(said)


@pytest.mark.parametrize("number", range(4), ids=suite.BROKEN)
def test_a_broken_video_has_no_prediction_but_a_sentence(checkpoint, videos, capsys, number):
    path = videos / suite.BROKEN[number]
    capsys.readouterr()
    assert suite.run_predict(checkpoint, path) == 1
    out, err = capsys.readouterr()
    assert one_sentence(err).startswith(f"cannot read {path}: {REASONS[number]}")
    assert out == ""


def test_a_good_video_is_predicted_beside_a_broken_one(checkpoint, videos, capsys):
    good = [videos / "test" / name / "00000.mp4" for name in ("left", "growing")]
    assert suite.run_predict(checkpoint, good[0], videos / "notes.mp4", good[1]) == 1
    out, err = capsys.readouterr()
    one_sentence(err)
    lines = out.splitlines()
    assert [lines[0], lines[6]] == [str(path) for path in good]
    for start in (1, 7):
        rows = [line.split() for line in lines[start : start + 5]]
        assert [row[0] for row in rows] == ["1.", "2.", "3.", "4.", "5."]
        assert {row[1] for row in rows} < set(CLASSES)
        shares = [float(row[2].rstrip("%")) for row in rows]
        assert shares == sorted(shares, reverse=True)
    assert suite.run_predict(checkpoint, good[0]) == 0


# Evaluation and prediction.


def test_frame_orders_are_four_rows_with_the_opposite_class(checkpoint, monkeypatch, capsys):
    """Each of its own pass: here the k-th order gets 2 k of 8 videos right and turns the rest."""

    def evaluate(model, dataset, loop, device, group, precision):
        right = 2 * list(FRAME_ORDERS).index(dataset.frame_order)
        labels = torch.arange(8)
        predicted = torch.where(labels < right, labels, torch.tensor(OPPOSITE))
        return Evaluation(F.one_hot(predicted).float(), labels, [""] * 8, [])

    monkeypatch.setattr("train.evaluate.evaluate", evaluate)
    assert suite.run_evaluate(checkpoint, "--frame-orders") == 0
    rows = capsys.readouterr().out.splitlines()[-4:]
    shares = [("0.0%", "100.0%"), ("25.0%", "75.0%"), ("50.0%", "50.0%"), ("75.0%", "25.0%")]
    for row, order, (top1, opposite) in zip(rows, FRAME_ORDERS, shares, strict=True):
        assert row.startswith(order)
        assert row.removeprefix(order).split() == [top1, opposite]


def test_frame_orders_of_a_trained_model_are_printed(checkpoint, capsys):
    assert suite.run_evaluate(checkpoint, "--frame-orders") == 0
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row[:20].strip() for row in rows] == list(FRAME_ORDERS)
    assert all(row.count("%") == 2 for row in rows)


def test_a_checkpoint_evaluates_to_what_its_run_reported(checkpoint, capsys):
    reported = suite.metrics(checkpoint.parent)[-1]
    assert suite.run_evaluate(checkpoint) == 0
    assert f"top1 {reported['top1']:.2%}, top5 {reported['top5']:.2%}" in capsys.readouterr().out


def test_the_prediction_is_the_one_that_evaluation_counts(checkpoint, videos, capsys):
    names, labels = zip(*((v.name, v.label) for v in read_list(videos / "test.txt")), strict=True)
    assert suite.run_predict(checkpoint, *(videos / name for name in names)) == 0
    likeliest = [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line[:4] == "  1."
    ]
    hits = sum(CLASSES[label] == word for label, word in zip(labels, likeliest, strict=True))
    assert hits / 8 == suite.metrics(checkpoint.parent)[-1]["top1"]


# Refusals.


@pytest.fixture
def commands(recipe, checkpoint, videos, tmp_path):
    """Each command with further words on its line."""
    return {
        "train": lambda *words: suite.train(recipe, tmp_path / "run", *words),
        "evaluate": lambda *words: suite.run_evaluate(checkpoint, *words),
        "predict": lambda *words: suite.run_predict(
            checkpoint, videos / "test" / "up" / "00000.mp4", *words
        ),
    }


COMMANDS = pytest.mark.parametrize("command", ["train", "evaluate", "predict"])


@COMMANDS
@pytest.mark.parametrize("word", ["fused", "cpu"])
def test_kernels_that_cannot_run_are_refused(commands, capsys, command, word, no_libraries):
    run = commands[command]
    capsys.readouterr()
    assert run("--kernels", word) == 1
    said = one_sentence(capsys.readouterr().err)
    assert f"kernels={word!r} cannot run: " in said
    assert "use kernels=" in said


@COMMANDS
def test_an_unknown_word_for_the_kernels_is_refused_with_the_known_ones(commands, capsys, command):
    with pytest.raises(SystemExit) as caught:
        commands[command]("--kernels", "fast")
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--kernels" in said
    assert all(word in said for word in ("fast", "auto", "fused", "reference"))


@COMMANDS
@pytest.mark.parametrize("word", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(commands, capsys, command, word):
    with pytest.raises(SystemExit) as caught:
        commands[command]("--device", word)
    assert caught.value.code == 2
    assert f"{word!r} cannot be used: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("word", "named"),
    [("--model.name=swin_xxl", "swin_nano"), ("--model.frozen_stages=9", "frozen_stages")],
)
def test_a_recipe_that_describes_no_model_is_refused(commands, capsys, word, named):
    run = commands["train"]
    capsys.readouterr()
    assert run(word) == 1
    assert named in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["resume", "evaluate", "predict"])
def test_a_checkpoint_of_another_model_is_refused(recipe, checkpoint, tmp_path, capsys, command):
    """As a variant that was changed since would make it."""
    state = load_checkpoint(checkpoint)
    weights = state["model"]
    weights["backbone.norm.weight"] = torch.cat([weights["backbone.norm.weight"]] * 2)
    other = tmp_path / "last.pt"
    save_checkpoint(other, state)
    status = {
        "resume": lambda: suite.train(recipe, tmp_path, "--resume"),
        "evaluate": lambda: suite.run_evaluate(other),
        "predict": lambda: suite.run_predict(other, "any.mp4"),
    }[command]()
    assert status == 1
    said = one_sentence(capsys.readouterr().err)
    assert said.startswith(f"cannot load {other}: ")
    assert "of another shape backbone.norm.weight [256] instead of [128]" in said


@pytest.mark.parametrize("run", [suite.run_evaluate, suite.run_predict])
def test_a_file_that_is_no_checkpoint_is_refused(videos, capsys, run):
    path = videos / "notes.mp4"
    assert run(path, *([path] if run is suite.run_predict else [])) == 1
    assert one_sentence(capsys.readouterr().err).startswith(f"cannot load {path}: ")


@pytest.mark.parametrize("name", ["train_list", "test_list", "class_names"])
def test_a_missing_list_is_refused(recipe, tmp_path, capsys, name):
    wrong = suite.changed(recipe, data={name: "nowhere.txt"})
    assert suite.train(wrong, tmp_path / "run") == 1
    assert "nowhere.txt" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        suite.train_main(["--recipe", "none", *suite.MACHINE])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"--recipe must be one of {', '.join(RECIPES)}, got 'none'\n"
    )


def test_scores_do_not_depend_on_what_was_evaluated_before(checkpoint, capsys):
    """The model is left in eval mode, and nothing is drawn."""
    torch.manual_seed(1)
    said = []
    for _ in range(2):
        assert suite.run_evaluate(checkpoint, "--data.workers=1") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
