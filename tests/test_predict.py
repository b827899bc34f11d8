"""Predictions: what is told, written and drawn of videos is what the model makes of them."""

import errno
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import predict_suite as predicting
import pytest
import torch
import train_suite as suite
from PIL import Image
from predict_suite import CLASSES, numbers_of
from predict_suite import one_thread as one_thread
from predict_suite import videos as videos

from model.weights import save_weights, to_official, to_torchvision
from model.weights.files import FORMAT
from train import contact_sheet as sheets
from train import predict
from train.checkpoint import KEYS, CheckpointError
from train.given import check_names, given_videos
from train.lists import ListError
from train.predict import one_behind
from train.recipes import RECIPES
from train.trained import load_trained
from train.transforms import center_crop, normalize, resize_short_side, three_crop
from train.video import open_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return predicting.write_checkpoint(tmp_path_factory.mktemp("trained") / "last.pt")


# Of 20 frames: three clips in the middles of three equal shares of 13 places.
CLIPS = [[2, 4, 6, 8], [6, 8, 10, 12], [10, 12, 14, 16]]


def judged(path: Path, clips: list[list[int]], crops: int = 3) -> torch.Tensor:
    """Probabilities [classes] from views one by one."""
    video, model, shares = open_video(path), predicting.trained_model(), []
    for clip in clips:
        frames = resize_short_side(video.read(clip), 16)
        for view in three_crop(frames, 16) if crops == 3 else [center_crop(frames, 16)]:
            with torch.no_grad():
                logits = model(normalize(view.transpose(0, 1)[None]))
            shares.append(logits[0].double().softmax(dim=0))
    return torch.stack(shares).mean(dim=0)


def told_of(checkpoint, tmp_path, *words) -> list[dict]:
    path = tmp_path / "told" / "predictions.json"
    suite.run_predict(checkpoint, *words, "--json", path)
    return json.loads(path.read_text())["videos"]


def test_a_folder_is_told_in_order_in_the_table_and_in_json(
    checkpoint, videos, tmp_path, capsys, monkeypatch
):
    calls = predicting.recorded(monkeypatch)
    told = told_of(checkpoint, tmp_path, videos, "--top", "3", "--loop.views-per-pass=2")
    out, err = capsys.readouterr()
    names = ["b/broken.mp4", "b/sub/five.mp4", "b/twenty.mp4", "c.mkv"]
    assert [each["video"] for each in told] == [str(videos / name) for name in names]
    assert told[0].keys() == {"video", "error"}
    assert err == f"cannot read {videos / names[0]}: {told[0]['error']}\n"
    # Nine views of each, two at a time, and none of them twice.
    assert [shape[0] for shape in calls] == 3 * [2, 2, 2, 2, 1]
    lines = out.splitlines()
    for start, each in zip((0, 4, 8), told[1:], strict=True):
        assert lines[start] == each["video"]
        for line, row in zip(lines[start + 1 : start + 4], each["top"], strict=True):
            assert row["name"] == CLASSES[row["label"]]
            assert f". {row['name']} " in line
            assert line.endswith(f" {row['probability']:.2%}")
    assert lines[12:] == ["1 of 4 videos could not be read"]
    twenty = told[2]
    assert (twenty["num_frames"], twenty["fps"], twenty["frames"]) == (20, 25.0, CLIPS)
    assert told[1]["frames"] == [[0, 2, 4, 1]] * 3
    for each in told[1:]:
        scores = judged(each["video"], each["frames"])
        assert [row["label"] for row in each["top"]] == scores.topk(3).indices.tolist()
        shares = [row["probability"] for row in each["top"]]
        torch.testing.assert_close(shares, scores.topk(3).values.tolist(), rtol=0, atol=1e-6)


def test_two_videos_differ_by_more_than_the_tolerance(checkpoint, videos):
    """Or the test above would take any frames for the right ones."""
    right = judged(videos / "b" / "twenty.mp4", CLIPS)
    assert (judged(videos / "b" / "twenty.mp4", CLIPS[:2]) - right).abs().max() > 1e-3
    assert (judged(videos / "b" / "twenty.mp4", CLIPS, crops=1) - right).abs().max() > 1e-3


def test_fields_of_data_can_be_set(checkpoint, videos, tmp_path):
    words = ("--data.test-clips=1", "--data.test-crops=1", "--data.interval=1")
    (told,) = told_of(checkpoint, tmp_path, videos / "b" / "twenty.mp4", *words)
    assert told["frames"] == [[8, 9, 10, 11]]
    scores = judged(told["video"], told["frames"], crops=1)
    assert told["top"][0]["probability"] == pytest.approx(scores.max().item(), abs=1e-6)
    assert len(told["top"]) == 5


def test_other_fields_are_refused(checkpoint, videos, capsys):
    with pytest.raises(SystemExit):
        suite.run_predict(checkpoint, videos, "--optim.lr=7")
    assert "optim.lr" in capsys.readouterr().err


def test_a_lower_precision_is_near(checkpoint, videos, tmp_path):
    path = videos / "b" / "twenty.mp4"
    plain, low = (
        told_of(checkpoint, tmp_path, path, "--top", "8", "--precision", word)[0]["top"]
        for word in ("float32", "bfloat16")
    )
    shares = [{row["label"]: row["probability"] for row in top} for top in (plain, low)]
    gaps = [abs(shares[0][label] - shares[1][label]) for label in range(8)]
    assert 1e-6 < max(gaps) < 0.1


def test_names_for_weights(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", predicting.recipe())
    weights, names = tmp_path / "weights.pth", tmp_path / "names.txt"
    torch.save(to_official(predicting.trained_model()), weights)
    names.write_text("\n".join(CLASSES), encoding="utf-8")
    video = videos / "b" / "twenty.mp4"
    label = judged(video, CLIPS).argmax().item()
    for words, name in (((), f"class {label}"), (("--classes", names), CLASSES[label])):
        assert suite.run_predict(weights, video, "--recipe", "tiny", *words) == 0
        assert f"  1. {name} " in capsys.readouterr().out
    names.write_text("one\ntwo\n")
    assert suite.run_predict(weights, video, "--recipe", "tiny", "--classes", names) == 1
    assert "has 2 class names, the model 8 classes" in capsys.readouterr().err


def test_names_that_were_not_trained_are_refused(checkpoint, videos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(reversed(CLASSES)), encoding="utf-8")
    assert suite.run_predict(checkpoint, videos, "--classes", names) == 1
    assert "not the class names that were trained" in capsys.readouterr().err


def test_a_sheet_shows_the_frames_that_were_seen_and_the_top_five(
    checkpoint, videos, tmp_path, monkeypatch
):
    drawn = []

    def draw(clip, frames, fps, **words):
        drawn.append((clip, frames, fps, words["bars"]))
        return sheets_plain(clip, frames, fps, **words)

    sheets_plain = sheets.contact_sheet
    monkeypatch.setattr(sheets, "contact_sheet", draw)
    told = told_of(checkpoint, tmp_path, videos, "--sheet", tmp_path / "sheets", "--top", "1")
    found = sorted(path.relative_to(tmp_path / "sheets") for path in tmp_path.rglob("*.png"))
    assert list(map(str, found)) == ["b/sub/five.mp4.png", "b/twenty.mp4.png", "c.mkv.png"]
    clip, frames, fps, bars = drawn[1]
    assert numbers_of(clip) == frames == CLIPS[1]
    assert fps == 25.0
    best = judged(told[2]["video"], CLIPS).topk(5)
    assert [name for name, _ in bars] == [CLASSES[label] for label in best.indices]
    assert [share for _, share in bars] == pytest.approx(best.values.tolist(), abs=1e-6)
    # Of the centre crop the last columns alone are of the brighter ends.
    assert clip[:, 0, :, :14].float().std() < 2
    with Image.open(tmp_path / "sheets" / "b" / "twenty.mp4.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = sheets.CELL // 2
    cells = [pixels[top + middle, left + middle] for left, top in sheets.cell_boxes(4, sheets.CELL)]
    assert [round(cell.mean() / predicting.STEP) for cell in cells] == CLIPS[1]


def test_a_sheet_is_as_large_as_what_is_on_it_and_its_bars_are_the_shares():
    clip = torch.zeros(3, 40, 32, 64, dtype=torch.uint8) + torch.arange(40).view(1, 40, 1, 1) * 6
    words = {"title": "t" * 300, "note": "n", "bars": [("x" * 300, 0.75), ("Über спин", 0.0)]}
    sheet = sheets.contact_sheet(clip.to(torch.uint8), list(range(40)), 0, **words)
    grid = 8 * sheets.CELL + 7 * sheets.GAP
    assert sheet.width == grid + 3 * sheets.MARGIN + sheets.PANEL
    assert sheets.chosen_frames(40)[0] == 0
    assert sheets.chosen_frames(40)[-1] == 39
    assert len(set(sheets.chosen_frames(40))) == 32
    pixels = np.asarray(sheet).astype(int)
    boxes = sheets.cell_boxes(32, sheets.CELL // 2)
    seen = [pixels[top + 9, left + 9, 0] // 6 for left, top in boxes]
    assert seen == sheets.chosen_frames(40)
    bar = np.array([0x2F, 0x6F, 0xB0])
    lengths = (pixels == bar).all(axis=-1).sum(axis=1)
    assert set(lengths) == {0, round(0.75 * (sheets.PANEL - 64)) + 1}
    # Nothing is written over the margin.
    assert (pixels[:, : sheets.MARGIN] == 255).all()
    assert (pixels[:, -sheets.MARGIN + 1 :] == 255).all()


def test_long_names_are_broken_between_words_and_letters_have_a_font():
    name = "Pretending to put something underneath something that cannot be seen at all"
    lines = sheets._wrapped(name, 16, 200, 2)
    assert name.startswith(" ".join(lines).removesuffix("…"))
    assert len(lines) == 2
    assert all(sheets._font(line, 16).getlength(line) <= 200 for line in lines)
    assert sheets._wrapped("up", 16, 200, 2) == ["up"]
    assert sheets._fitted("a/b/" * 90 + "c.mp4", 16, 200, keep_end=True).endswith("/c.mp4")
    assert sheets._has(sheets._font("Straße спин 3 μ", 16).path, "ßпμ")
    assert not sheets._has(sheets._font("a", 16).path, "\U0010fffd")


# What is asked for.


def test_lists_and_folders_and_files_are_found_once_each(videos, tmp_path, monkeypatch):
    away = tmp_path / "away" / "x.mp4"
    lines = ["b/twenty.mp4 3", "", "c.mkv\t4", "b/name 7.mp4", "a b.mp4 12", str(away)]
    (videos / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    given = given_videos([str(videos / "list.txt"), str(videos / "c.mkv")])
    (videos / "list.txt").unlink()
    names = ["b/twenty.mp4", "c.mkv", "b/name 7.mp4", "a b.mp4", str(away).lstrip("/")]
    assert [each.name for each in given] == names
    assert [each.path for each in given] == [str(videos / name) for name in names[:4]] + [str(away)]
    monkeypatch.chdir(videos)
    (only,) = given_videos(["b/../b/twenty.mp4"])
    assert (only.path, only.name) == ("b/../b/twenty.mp4", "b/twenty.mp4")


def test_a_folder_without_videos_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "notes.doc").touch()
    assert suite.run_predict(checkpoint, tmp_path) == 1
    assert capsys.readouterr().err == f"{tmp_path}: there is no video in it\n"


def test_two_videos_of_one_name_are_refused_where_both_would_be_written(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").touch()
    given = given_videos([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ListError, match=r"a/x\.mp4 and .*b/x\.mp4 would both be x\.mp4"):
        check_names(given)
    check_names(given_videos([str(tmp_path)]))


def test_the_next_is_made_before_one_is_given():
    made = []
    items = one_behind(made.append(n) or n for n in range(4))
    assert [(n, len(made)) for n in items] == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(one_behind([])) == []


def test_a_checkpoint_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        predict.main(["x.mp4"])
    assert "--checkpoint is needed" in capsys.readouterr().err


# What goes wrong, and what is kept of it.


def test_what_was_asked_for_stands_in_the_json(checkpoint, videos, tmp_path, monkeypatch):
    uniform = suite.changed(
        predicting.recipe(), data={"sampling": "uniform", "test_crops": 1, "val_clips": 1}
    )
    monkeypatch.setitem(RECIPES, "tiny", uniform)
    torch.save(to_official(predicting.trained_model()), tmp_path / "weights.pth")
    found = []
    for source, words in (
        (checkpoint, ["--data.reader=pyav"]),
        (tmp_path / "weights.pth", ["--recipe", "tiny", "--precision", "bfloat16"]),
    ):
        path = tmp_path / "told.json"
        assert suite.run_predict(source, videos / "c.mkv", "--json", path, *words) == 0
        found.append(json.loads(path.read_text()))
        (told,) = found[-1].pop("videos")
        assert found[-1].pop("checkpoint") == str(source)
        assert found[-1].pop("complete") is True
        assert found[-1]["views"]["clips"] == len(told["frames"])
    one, two = {"clips": 3, "crops": 3}, {"clips": 1, "crops": 1}
    assert found == [
        {"recipe": None, "reader": "pyav", "precision": "float32", "views": one},
        {"recipe": "tiny", "reader": "decord", "precision": "bfloat16", "views": two},
    ]


def test_what_is_known_is_kept_where_the_run_ends(checkpoint, videos, tmp_path, monkeypatch):
    def stop(prediction, *_):
        if prediction.video.name == "b/twenty.mp4":
            raise KeyboardInterrupt
        return plain(prediction, *_)

    plain, path = predict.table, tmp_path / "told.json"
    monkeypatch.setattr(predict, "table", stop)
    with pytest.raises(KeyboardInterrupt):
        suite.run_predict(checkpoint, videos, "--json", path)
    told = json.loads(path.read_text())
    names = [Path(each["video"]).name for each in told["videos"]]
    assert names == ["broken.mp4", "five.mp4", "twenty.mp4"]
    assert told["complete"] is False


def test_a_sheet_that_cannot_be_written_is_told_and_survived(checkpoint, videos, tmp_path, capsys):
    sheets = tmp_path / "sheets"
    (sheets / "five.mp4.png").mkdir(parents=True)
    words = ("--sheet", sheets, "--json", tmp_path / "told.json")
    given = (videos / "b" / "sub", videos / "c.mkv")
    assert suite.run_predict(checkpoint, *given, *words) == 1
    out, err = capsys.readouterr()
    assert err == f"{sheets / 'five.mp4.png'}: is a directory\n"
    assert out.endswith("1 of 2 videos have no sheet\n")
    assert len(json.loads((tmp_path / "told.json").read_text())["videos"]) == 2
    assert [path.name for path in sheets.rglob("c.mkv.png")] == ["c.mkv.png"]


@pytest.mark.parametrize("option", ["--json", "--sheet"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_where_nothing_can_be_written_nothing_is_computed(
    checkpoint, videos, tmp_path, monkeypatch, capsys, option, is_folder
):
    calls = predicting.recorded(monkeypatch)
    path = tmp_path / "file" / "x"
    if is_folder and option == "--json":
        path.mkdir(parents=True)
        where, reason = path, "is a directory"
    else:
        (tmp_path / "file").write_text("")
        where = tmp_path / "file" if option == "--json" else path
        reason = "file exists" if option == "--json" else "not a directory"
    assert suite.run_predict(checkpoint, videos / "c.mkv", option, path) == 1
    assert capsys.readouterr().err == f"{where}: {reason}\n"
    assert calls == []


def test_an_error_without_a_path_names_one(checkpoint, videos, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predict, "write_text", full)
    path = tmp_path / "told.json"
    assert suite.run_predict(checkpoint, videos / "c.mkv", "--json", path) == 1
    assert capsys.readouterr().err == f"{path}: no space left on device\n"


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_scores_that_are_not_finite_are_no_answer(videos, tmp_path, capsys, value):
    """Of the logits one is infinite: minus infinity alone would be a probability of zero."""
    model = deepcopy(predicting.trained_model())
    model.backbone.norm.weight.data.zero_()
    model.backbone.norm.bias.data.fill_(1)
    model.cls_head.fc_cls.weight.data[2] = value
    source, path = tmp_path / "last.pt", tmp_path / "told.json"
    predicting.write_checkpoint(source, model)
    video = videos / "b" / "twenty.mp4"
    words = ("--json", path, "--sheet", tmp_path / "sheets")
    assert suite.run_predict(source, video, videos / "b" / "broken.mp4", *words) == 1
    out, err = capsys.readouterr()
    reason = "its scores are NaN or infinite at --precision float32"
    assert err.startswith(f"{video}: {reason}\n")
    assert "1 of 2 videos have no finite scores\n1 of 2 videos could not be read\n" in out
    assert json.loads(path.read_text())["videos"][0] == {"video": str(video), "error": reason}
    assert not list((tmp_path / "sheets").iterdir())


def test_it_is_not_for_torchrun(checkpoint, videos, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert suite.run_predict(checkpoint, videos) == 1
    err = capsys.readouterr().err
    assert err.startswith("predict: must be started as one process, got 2 of torchrun: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["official", "torchvision", "own.pth", "own.safetensors"])
def test_weights_without_their_recipe_are_told_the_cure(tmp_path, kind):
    path, model = tmp_path / f"{kind}.pth", predicting.trained_model()
    if kind.startswith("own"):
        path = tmp_path / kind
        save_weights(model, path)
    else:
        torch.save((to_official if kind == "official" else to_torchvision)(model), path)
    check_cure(path)


@pytest.mark.parametrize("name", ["k400", "ssv2", "https://a.org/w.pth", "s3://b/w.pth"])
def test_names_and_addresses_without_a_recipe_are_told_the_cure(name):
    check_cure(name)


def check_cure(source) -> None:
    cure = "expected a file written by `python -m train`; weights need --recipe NAME"
    with pytest.raises(CheckpointError) as caught:
        load_trained(source, "auto", torch.device("cpu"))
    assert str(caught.value) == f"cannot load {source}: {cure}"


def test_what_is_no_weights_is_not_told_to_need_a_recipe(tmp_path):
    state = dict.fromkeys({*KEYS, "format"} - {"step"})
    state.update(format=FORMAT, model=predicting.trained_model().state_dict())
    torch.save(state, tmp_path / "old.pt")
    (tmp_path / "text.pth").write_text("text")
    for name, said in (
        ("old.pt", "it has no step"),
        ("text.pth", "not a c"),
        ("no.pth", "no such"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_trained(tmp_path / name, "auto", torch.device("cpu"))
        assert "--recipe" not in str(caught.value)


def test_an_address_of_another_kind_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be the http or https address of a file, got"):
        load_trained("s3://b/w.pth", "auto", torch.device("cpu"), "swin_t_k400_1k")
