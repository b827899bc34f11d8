"""train.prepare list: what each layout gives, the same each time; what is missing is said."""

import json
import os
import random

import pytest

pytest.importorskip("av")

from prepare_suite import lines, prepare, touch

from train.lists import read_class_names, read_videos
from train.prepare.layouts import _share


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "videos"
    path.mkdir()
    return path


def refusal(capsys, *words) -> str:
    assert prepare(*words) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def listed(root, name="train.txt", layout="files") -> list[tuple]:
    """What the training code reads of a list."""
    videos = read_videos(root, name, read_class_names(root / "classes.txt"), layout)
    return [
        (v.name, v.frames, v.label) if layout == "frames" else (v.name, v.label) for v in videos
    ]


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folders_with_splits(root, capsys, test):
    touch(root, "train/b/2.mp4", "train/b/10.MKV", "train/a c/sub/ö 1.webm", f"{test}/b/3.avi")
    touch(root, f"{test}/über/4.mov", "train/b/.5.mp4", "train/.hidden/6.mp4", "train/b/notes.txt")
    touch(root, "train/7.mp4", "other/b/8.mp4", "train/empty/readme", "train/b/ 9.mp4 ")
    assert prepare("list", "folders", root) == 0
    assert lines(root / "classes.txt") == ["a c", "b", "über"]
    assert listed(root) == [
        ("train/a c/sub/ö 1.webm", 0),
        ("train/b/10.MKV", 1),
        ("train/b/2.mp4", 1),
    ]
    assert listed(root, "test.txt") == [(f"{test}/b/3.avi", 1), (f"{test}/über/4.mov", 2)]
    said = capsys.readouterr().out
    assert "3 classes, 3 videos in train.txt, 2 in test.txt" in said
    assert "classes without videos in train.txt: 1\n  über\n" in said
    assert "classes without videos in test.txt: 1\n  a c\n" in said
    assert "left out: 3\n" in said
    for name in ("other/b/8.mp4", "train/7.mp4", "train/empty"):
        assert f"  {name}: " in said
    assert not (root / "missing.txt").exists()
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize("names", [["test/empty/readme"], ["test/1.mp4", "test/2.mp4"]])
def test_a_test_folder_without_labels_gives_way_to_val(root, capsys, names):
    touch(root, "train/a/1.mp4", *names)
    reason = "no video in the folder of a class of test"
    assert reason in refusal(capsys, "list", "folders", root)
    touch(root, "val/a/3.mp4")
    assert prepare("list", "folders", root) == 0
    assert listed(root, "test.txt") == [("val/a/3.mp4", 0)]


def test_no_list_is_empty(root, tmp_path, capsys):
    touch(root, "a/1.mp4", "b/2.mp4")
    assert "there is no video for test.txt" in refusal(capsys, "list", "folders", root)
    (tmp_path / "k.csv").write_text(KINETICS + "x,q,1,11,train\ny,b,1,11,val\n")
    touch(root, "b_000001_000011.mp4")
    words = ("list", "kinetics", root, "--annotations", tmp_path / "k.csv")
    assert "no video for train.txt, 1 are missing" in refusal(capsys, *words)


def test_folders_without_splits_share_each_class(root):
    names = [f"{kind}/{i}.mp4" for kind in ("run", "walk on") for i in range(200)]
    touch(root, *names, "pair/1.mp4", "pair/2.mp4", "lone/1.mp4")
    assert prepare("list", "folders", root, "--test-share", 0.2) == 0
    train, test = listed(root), listed(root, "test.txt")
    assert len(train) + len(test) == 403
    assert not {name for name, _ in train} & {name for name, _ in test}
    for label, (least, most) in enumerate([(0, 0), (1, 1), (25, 55), (25, 55)]):
        assert least <= sum(other == label for _, other in test) <= most
    assert prepare("list", "folders", root, "--test-share", 0.2, "--seed", 1) == 0
    assert listed(root, "test.txt") != test


def test_no_video_changes_sides_when_others_come_or_it_is_reencoded():
    names = [f"run/{i}.mp4" for i in range(300)]
    first = _share(names[:150], 0.1, 0)
    shuffled = random.Random(0).sample(names, 300)
    second = _share([name.replace(".mp4", ".avi") for name in shuffled], 0.1, 0)
    for split, chosen in first.items():
        assert {name.replace(".mp4", ".avi") for name in chosen} <= set(second[split])
    # Pinned, so that no version of this program moves videos of a data set that is in use.
    assert [name[4:-4] for name in first["test"]][:6] == ["21", "31", "41", "46", "54", "59"]
    # As Linux writes names, and as macOS does.
    composed = [f"run/{i} \xe9.mp4" for i in range(40)]
    apart = {name: name.replace("\xe9", "e\u0301") for name in composed}
    chosen = _share(composed, 0.5, 0)["test"]
    assert _share(list(apart.values()), 0.5, 0)["test"] == [apart[name] for name in chosen]


def test_equal_trees_give_equal_lists(tmp_path):
    names = [f"{kind}/{i}.mp4" for kind in ("run", "walk", "Jump") for i in range(20)]
    texts = []
    for seed in range(2):
        root = tmp_path / str(seed)
        touch(root, *random.Random(seed).sample(names, len(names)))
        assert prepare("list", "folders", root) == 0
        texts.append([(root / name).read_bytes() for name in ("train.txt", "test.txt")])
    assert texts[0] == texts[1]


def test_links_are_followed_and_loops_are_not(root, capsys):
    touch(root.parent / "elsewhere", "1.mp4")
    touch(root, "train/a/2.mp4", "test/a/3.mp4")
    (root / "train/b").symlink_to(root.parent / "elsewhere")
    (root / "train/a/up").symlink_to(root)
    (root / "train/a/self").symlink_to("self")
    (root / "train/a/4.mp4").symlink_to("gone.mp4")
    assert prepare("list", "folders", root) == 0
    assert listed(root) == [("train/a/2.mp4", 0), ("train/b/1.mp4", 1)]
    assert "train/a/4.mp4: it is a link that leads nowhere" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_no_list_can_hold_are_left_out(root, capsys):
    touch(
        root,
        "a/1.mp4",
        "a/2.mp4",
        "a/x\ny.mp4",
        "a/x\ty.mp4",
        " b/1.mp4",
        "a/\udcff.mp4",
        "\udcff/notes",
    )
    assert prepare("list", "folders", root) == 0
    assert {name for name, _ in listed(root) + listed(root, "test.txt")} == {"a/1.mp4", "a/2.mp4"}
    said = capsys.readouterr().out
    assert "left out: 6" in said  # the four, and two folders without any
    assert "'a/x\\ny.mp4': its name has a tab or a line break" in said
    assert "'a/\\udcff.mp4': its name is not UTF-8" in said


def test_folders_that_are_no_data_set_are_refused(root, capsys):
    assert "no video in the folder" in refusal(capsys, "list", "folders", root)
    touch(root, "1.mp4", "train/a/1.mp4")
    assert "expected test or val beside it" in refusal(capsys, "list", "folders", root)
    assert "no such folder" in refusal(capsys, "list", "folders", root / "none")
    assert "takes no --annotations" in refusal(
        capsys, "list", "folders", root, "--annotations", root
    )
    assert "needs --annotations" in refusal(capsys, "list", "ucf", root)
    assert "above 0" in refusal(capsys, "list", "folders", root, "--test-share", 0)
    assert [path.name for path in root.iterdir() if path.suffix == ".txt"] == []


@pytest.mark.parametrize("command", ["list", "index"])
def test_what_was_stopped_and_begins_anew_says_no_more(root, capsys, monkeypatch, command):
    def stopped(*_):
        raise KeyboardInterrupt

    for module in ("found.survey", "shards.build_index"):
        monkeypatch.setattr(f"train.prepare.{module}", stopped)
    assert prepare(command, *(["folders"] if command == "list" else []), root) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_frames(root, capsys):
    for name, numbers in {
        "train/a b/x y.mp4": (1, 2, 3),
        "train/b/deep/v2": range(1, 101),
        "train/b/gap": (1, 3),
        "train/b/zero": (0, 1, 2),
        "test/b/v3": (1,),
    }.items():
        touch(root, *(f"{name}/img_{number:05}.jpg" for number in numbers))
    touch(root, "train/b/deep/v2/.img_00101.jpg", "train/b/deep/v2/flow.npy")
    (root / "train/b/loop").symlink_to(root / "train")
    assert prepare("list", "frames", root) == 0
    assert listed(root, layout="frames") == [
        ("train/a b/x y.mp4", 3, 0),
        ("train/b/deep/v2", 100, 1),
    ]
    assert listed(root, "test.txt", "frames") == [("test/b/v3", 1, 1)]
    said = capsys.readouterr().out
    assert "train/b/gap: of its 2 images img_00002.jpg is missing" in said
    assert "train/b/zero: of its 3 images img_00003.jpg is missing, or named otherwise" in said


KINETICS = "label,youtube_id,time_start,time_end,split\n"


def test_kinetics(root, tmp_path, capsys):
    touch(root, "train/riding a bike/-a_b_000003_000013.mp4", "train/x/ccc_000010_000020.mkv")
    touch(root, "val/-a_b_000003_000013.mp4", "val/ddd_000100_000110.mp4", "val/eee_1_2.mp4")
    touch(root, "train/x/ddd_000100_000110.mp4")
    touch(tmp_path / "csv", "train.csv")
    (tmp_path / "csv/train.csv").write_text(
        KINETICS + '"hand, shaking",ccc,10,20,train\nriding a bike,-a_b,3,13,train\n'
        '"hand, shaking",gone,0,10,train\nabseiling,also,5,15,train\n'
    )
    (tmp_path / "csv/validate.csv").write_text(KINETICS + "riding a bike,ddd,100,110,validate\n")
    (tmp_path / "csv/test.csv").write_text("youtube_id,time_start,time_end,split\nzzz,1,2,test\n")
    words = ("list", "kinetics", root, "--annotations", tmp_path / "csv")
    assert prepare(*words) == 0
    assert lines(root / "classes.txt") == ["abseiling", "hand, shaking", "riding a bike"]
    assert listed(root) == [
        ("train/riding a bike/-a_b_000003_000013.mp4", 2),
        ("train/x/ccc_000010_000020.mkv", 1),
    ]
    assert listed(root, "test.txt") == [("val/ddd_000100_000110.mp4", 2)]
    assert lines(root / "missing.txt") == [
        "train gone_000000_000010",
        "train also_000005_000015",
    ]
    said = capsys.readouterr().out
    assert "missing (all in missing.txt): 2" in said
    assert "classes without videos in train.txt: 1\n  abseiling" in said
    # When they have come, nothing is missing.
    touch(root, "train/gone_000000_000010.mp4", "train/also_000005_000015.mp4")
    assert prepare(*words, "--output", root) == 0
    assert not (root / "missing.txt").exists()


def test_kinetics_of_files_by_the_column_of_the_split(root, tmp_path, capsys):
    touch(root, "a_000001_000011.mp4", "b_000001_000011.mp4")
    both, other = tmp_path / "kinetics.csv", tmp_path / "more.csv"
    both.write_text("\ufeff" + KINETICS + "x,a,1,11,train\ny,b,1,11,val\n", encoding="utf-8")
    other.write_text(KINETICS + "z,a,1,11,test\n")
    assert prepare("list", "kinetics", root, "--annotations", both, other) == 0
    assert listed(root) == [("a_000001_000011.mp4", 0)]
    assert listed(root, "test.txt") == [("b_000001_000011.mp4", 1)]
    for text, reason in [
        ("id,label\n1,x\n", "expected a first line label,youtube_id"),
        (KINETICS + "x,a,one,11,train\n", ":2: expected two times"),
        (KINETICS + "x,a,1,11,other\n", ":2: expected two times"),
        (KINETICS + "x,a,1,11,train\n", "got 1 and 0"),
        (KINETICS + "x,q,1,11,train\ny,r,1,11,val\n", "none of the 2 videos"),
    ]:
        other.write_text(text)
        assert reason in refusal(capsys, "list", "kinetics", root, "--annotations", other)


def test_kinetics_of_a_folder_by_the_ends_of_names(root, tmp_path, capsys):
    touch(root, "a_000001_000011.mp4", "b_000001_000011.mp4")
    folder = tmp_path / "csv"
    touch(folder, "readme.csv", "contrain.csv")
    words = ("list", "kinetics", root, "--annotations", folder)
    assert refusal(capsys, *words) == f"{folder}: there is no train.csv or val.csv in it"
    for name, video in (("kinetics_train", "a"), ("Kinetics-400-VAL", "b")):
        text = f"label,youtube_id,time_start,time_end\nx,{video},1,11\n"
        (folder / f"{name}.csv").write_text(text)
    assert prepare(*words) == 0
    assert listed(root) == [("a_000001_000011.mp4", 0)]
    assert listed(root, "test.txt") == [("b_000001_000011.mp4", 0)]


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
def test_sthv2(root, tmp_path, capsys, prefix):
    folder = root if prefix else root / "20bn-something-something-v2"
    touch(folder, "10.webm", "9.mp4", "77.webm")
    labels = {"Dropping something": "1", "Putting something on something": "0", "Ünused": "2"}
    entries = {
        "train": [
            {"id": "10", "label": "x", "template": "Putting [something] on [something]"},
            {"id": "9", "label": "y", "template": "Dropping [something]"},
        ],
        "validation": [
            {"id": "77", "label": "z", "template": "Putting [something] on [something]"},
            {"id": "78", "label": "z", "template": "Dropping [something]"},
        ],
    }
    for name, content in {"labels": labels, **entries}.items():
        (tmp_path / f"{prefix}{name}.json").write_text(json.dumps(content), encoding="utf-8")
    words = ("list", "sthv2", root, "--annotations", tmp_path)
    assert prepare(*words) == 0
    assert lines(root / "classes.txt") == [
        *("Putting something on something", "Dropping something", "Ünused")
    ]
    above = "" if prefix else "20bn-something-something-v2/"
    assert listed(root) == [(f"{above}10.webm", 0), (f"{above}9.mp4", 1)]
    assert listed(root, "test.txt") == [(f"{above}77.webm", 0)]
    assert lines(root / "missing.txt") == ["test 78"]
    entries["train"][0]["template"] = "Eating [something]"
    (tmp_path / f"{prefix}train.json").write_text(json.dumps(entries["train"]))
    assert "'Eating something', which is none of the 3 labels" in refusal(capsys, *words)
    (tmp_path / f"{prefix}train.json").write_text('["1"]')
    assert "train must list objects, got '1'" in refusal(capsys, *words)
    (tmp_path / f"{prefix}train.json").write_text("[")
    assert "not JSON" in refusal(capsys, *words)
    (tmp_path / f"{prefix}train.json").unlink()
    assert "there is neither" in refusal(capsys, *words)
    (tmp_path / f"{prefix}labels.json").write_text('{"x": "y"}')
    assert "must be numbered from 0 without gaps" in refusal(capsys, *words)


def test_ucf(root, tmp_path, capsys):
    touch(root, "Apply/v_Apply_g01_c01.avi", "YoYo/v_YoYo_g08_c02.mp4", "YoYo/v_YoYo_g09_c01.avi")
    (tmp_path / "classInd.txt").write_text("1 Apply\r\n2 YoYo\r\n")
    (tmp_path / "trainlist02.txt").write_text(
        "Apply/v_Apply_g01_c01.avi 1\nYoYo/v_YoYo_g08_c02.avi 2\nYoYo/v_YoYo_g99_c01.avi 2\n"
    )
    (tmp_path / "testlist02.txt").write_text("YoYo/v_YoYo_g09_c01.avi\n")
    words = ("list", "ucf", root, "--annotations", tmp_path)
    assert prepare(*words, "--split", 2) == 0
    assert listed(root) == [("Apply/v_Apply_g01_c01.avi", 0), ("YoYo/v_YoYo_g08_c02.mp4", 1)]
    assert listed(root, "test.txt") == [("YoYo/v_YoYo_g09_c01.avi", 1)]
    assert lines(root / "missing.txt") == ["train YoYo/v_YoYo_g99_c01"]
    assert "trainlist01.txt: no such file" in refusal(capsys, *words)
    (tmp_path / "testlist02.txt").write_text("Other/v.avi\n")
    assert "testlist02.txt:1: not as released" in refusal(capsys, *words, "--split", 2)
    (tmp_path / "classInd.txt").write_text("one Apply\n")
    assert "classInd.txt:1: not as released" in refusal(capsys, *words)


def test_annotations_of_folders_of_images(root, tmp_path):
    touch(root, "train/a_000001_000011/img_00001.jpg", "val/b_000001_000011/img_00001.jpg")
    path = tmp_path / "both.csv"
    path.write_text(KINETICS + "x,a,1,11,train\nx,b,1,11,val\n")
    assert prepare("list", "kinetics", root, "--frames", "--annotations", path) == 0
    assert listed(root, layout="frames") == [("train/a_000001_000011", 1, 0)]
