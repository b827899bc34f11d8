"""`python -m model.weights`, and models that `create` fills by name or URL."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from http_suite import Reply, digest, running_server
from safetensors.torch import load_file
from torchvision.models import video
from weights_suite import (
    SMALL,
    assert_holds,
    assert_same_dict,
    imagenet_dict,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    torchvision_dict,
)

from model import SwinTransformer3D, create
from model.variants import VARIANTS
from model.weights import WeightsError, download, load_weights, save_weights
from model.weights.__main__ import main
from model.weights.download import destination

ROOT = Path(__file__).parents[1]
STORAGE = "https://github.com/SwinTransformer/storage/releases/download/"


def saved(state, path):
    torch.save(state, path)
    return path


def run(capsys, *words):
    """(exit code, lines on stdout, lines on stderr)."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def fields(lines):
    """What is printed, by the first word of its line."""
    pairs = [re.fullmatch(r"(\w+)\W+(.*)", line).groups() for line in lines]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_inspected(capsys, source, **expected):
    code, out, err = run(capsys, source)
    assert (code, err) == (0, [])
    got = fields(out)
    assert re.sub(r"\D", "", got.pop("parameters")) == str(expected.pop("parameters"))
    assert {name: got[name] for name in expected} == expected


def assert_refused(capsys, *words):
    code, _, err = run(capsys, *words)
    assert (code, len(err)) == (1, 1), err
    return err[0]


SWIN_T = {"variant": "swin_t", "window": "8x7x7", "patch": "2x4x4", "dtype": "float32"}


@pytest.fixture(scope="module")
def swin_t():
    return video.swin3d_t(weights=None)


def test_torchvisions_model_is_recognised(swin_t, tmp_path, capsys):
    path = saved(swin_t.state_dict(), tmp_path / "model.pth")
    expected = dict(SWIN_T, format="torchvision", classes="400", parameters=28_158_070)
    assert_inspected(capsys, path, **expected)


def test_an_official_file_is_recognised(tmp_path, capsys):
    state = official_dict(VARIANTS["swin_t"], 174)
    path = saved({"meta": {}, "state_dict": state}, tmp_path / "model.pth")
    expected = dict(SWIN_T, format="official", classes="174", parameters=27_984_276)
    assert_inspected(capsys, path, **expected)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_file_of_ours_is_recognised(tmp_path, capsys, suffix):
    path = tmp_path / f"model{suffix}"
    save_weights(create("swin_t", num_classes=600), path)
    expected = dict(SWIN_T, format="own", classes="600", parameters=28_311_870)
    assert_inspected(capsys, path, **expected)


def test_a_two_dimensional_file_is_recognised(tmp_path, capsys):
    state = imagenet_dict(VARIANTS["swin_t"], window=7, classes=1000)
    path = saved({"model": state}, tmp_path / "model.pth")
    held = sum(value.numel() for value in parameters_of(state).values())
    assert held == 28_288_354
    code, out, err = run(capsys, path)
    assert (code, err) == (0, [])
    got = fields(out)
    assert got["format"].startswith("imagenet")
    assert got["variant"].startswith("swin_t")
    assert got["window"].startswith("7x7")
    assert got["patch"].startswith("4x4")
    assert got["classes"].startswith("1000")
    assert re.sub(r"\D", "", got["parameters"]) == str(held)


@pytest.mark.parametrize("make", [official_dict, torchvision_dict])
def test_a_file_of_no_released_model_is_read_too(tmp_path, capsys, make):
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in make().items()
    }
    parameters = sum(value.numel() for value in parameters_of(state).values())
    assert_inspected(
        capsys,
        saved(state, tmp_path / "model.pth"),
        variant="none of the released",
        window="2x3x3",
        patch="2x4x4",
        classes="5",
        dtype="float16",
        parameters=parameters,
    )


def test_the_window_of_something_something_is_told(tmp_path, capsys):
    state = official_dict(VARIANTS["swin_b_w1677"], 174)
    expected = dict(SWIN_T, variant="swin_b_w1677", window="16x7x7", parameters=88_834_038)
    assert_inspected(capsys, saved(state, tmp_path / "model.pth"), **expected)


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, weights_only=True)
    return state.get("state_dict", state)


def convert(capsys, source, layout, output):
    code, _, err = run(capsys, source, "--to", layout, "--output", output)
    assert (code, err) == (0, [])
    return output


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("layout", ["official", "torchvision", "own"])
@pytest.mark.parametrize(
    ("original", "make"), [("official", official_dict), ("torchvision", torchvision_dict)]
)
def test_there_and_back_again(tmp_path, capsys, original, make, layout, suffix):
    state = make()
    source = saved(state, tmp_path / "source.pth")
    there = convert(capsys, source, layout, tmp_path / f"there{suffix}")
    back = convert(capsys, there, original, tmp_path / f"back{suffix}")
    if suffix == ".safetensors":
        # Such files hold no order.
        state = dict(sorted(state.items()))
        assert_same_dict(dict(sorted(read(back).items())), state)
    else:
        assert_same_dict(read(back), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_loads_what_is_written_for_it(swin_t, tmp_path, capsys, suffix):
    source = saved(official_dict(VARIANTS["swin_t"], 400, seed=3), tmp_path / "source.pth")
    output = convert(capsys, source, "torchvision", tmp_path / f"model{suffix}")
    expected = torchvision_dict(VARIANTS["swin_t"], 400, seed=3)
    state = load_file(output) if suffix == ".safetensors" else torch.load(output)
    swin_t.load_state_dict(state, strict=True)
    assert_same_dict(swin_t.state_dict(), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_written_as_ours_is_loaded(tmp_path, capsys, suffix):
    source = saved(torchvision_dict(seed=3), tmp_path / "source.pth")
    output = convert(capsys, source, "own", tmp_path / f"model{suffix}")
    model = model_of()
    assert load_weights(model, output).format == "own"
    assert_holds(model, own_dict(seed=3))
    turned = model_of({**SMALL, "window_size": (3, 2, 3)})
    with pytest.raises(WeightsError, match=r"2x3x3.*3x2x3|3x2x3.*2x3x3"):
        load_weights(turned, output)


def test_an_output_that_exists_is_refused_and_kept(tmp_path, capsys):
    source = saved(torchvision_dict(), tmp_path / "source.pth")
    output = tmp_path / "output.pth"
    output.write_bytes(b"precious")
    assert str(output) in assert_refused(capsys, source, "--to", "own", "--output", output)
    assert str(source) in assert_refused(capsys, source, "--to", "own", "--output", source)
    assert output.read_bytes() == b"precious"
    assert_same_dict(read(source), torchvision_dict())


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    source = saved(torchvision_dict(), tmp_path / "source.pth")
    output = source / "output.pth"
    assert str(source) in assert_refused(capsys, source, "--to", "own", "--output", output)
    assert_same_dict(read(source), torchvision_dict())


def test_a_two_dimensional_file_is_not_converted(tmp_path, capsys):
    source = saved({"model": imagenet_dict()}, tmp_path / "source.pth")
    output = tmp_path / "output.pth"
    for layout in ("official", "torchvision", "own"):
        assert_refused(capsys, source, "--to", layout, "--output", output)
        assert not output.exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--to", "own"],
        ["--output", "output.pth"],
        ["--to", "onnx", "--output", "output.pth"],
        ["--to", "own", "--output", "output.bin"],
        ["--list", "--to", "own", "--output", "output.pth"],
    ],
)
def test_words_that_make_no_command_are_refused(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    saved(torchvision_dict(), tmp_path / "source.pth")
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(["source.pth", *words] if words else []))
    assert caught.value.code not in (None, 0)
    assert capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


DAMAGE = {
    "cut": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "empty": lambda path, _: path.write_bytes(b""),
    "page": lambda path, _: path.write_text("<!DOCTYPE html>\n<title>404</title>\n"),
    "folder": lambda path, _: path.mkdir(),
    "missing": lambda path, _: None,
    "other": lambda path, _: torch.save({"weight": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_holds_no_model_is_refused_in_a_line(tmp_path, capsys, damage):
    whole = saved(torchvision_dict(), tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "damaged.pth"
    DAMAGE[damage](path, whole)
    output = tmp_path / "output.pth"
    assert str(path) in assert_refused(capsys, path)
    assert str(path) in assert_refused(capsys, path, "--to", "own", "--output", output)
    assert not output.exists()


def python(*words):
    command = [sys.executable, "-m", "model.weights", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_says_nothing_but_what_is_asked(tmp_path):
    path = saved(torchvision_dict(), tmp_path / "model.pth")
    done = python(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "torchvision" in done.stdout
    path.write_bytes(path.read_bytes()[:5000])
    done = python(path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr


@pytest.fixture
def listed(capsys):
    code, lines, err = run(capsys, "--list")
    assert (code, err) == (0, [])
    return lines


def test_the_list_names_every_variant(listed):
    words = set(re.findall(r"\w+", "\n".join(listed)))
    assert set(VARIANTS) - {"swin_nano"} <= words
    assert {"k400", "k400_torchvision", "in1k", "in22k"} <= words


def test_the_list_has_what_was_released(listed):
    urls = set(re.findall(r"\w+://\S+", "\n".join(listed)))
    assert all(url.startswith("https://") for url in urls)
    sizes = [f"swin_{size}_patch244_window877_kinetics400_1k" for size in ("tiny", "small", "base")]
    names = [
        *sizes,
        "swin_base_patch244_window877_kinetics400_22k",
        "swin_base_patch244_window877_kinetics600_22k",
        "swin_base_patch244_window1677_sthv2",
        "swin_base_patch244_window1677_kinetics400_22k",
    ]
    assert {f"{STORAGE}v1.0.4/{name}.pth" for name in names} <= urls
    enums = (video.Swin3D_T_Weights, video.Swin3D_S_Weights, video.Swin3D_B_Weights)
    assert {weights.url for enum in enums for weights in enum} <= urls
    assert {f"{STORAGE}v1.0.0/swin_tiny_patch4_window7_224.pth"} <= urls


def test_files_of_the_list_keep_their_names(listed, tmp_path):
    urls = sorted(set(re.findall(r"\w+://\S+", "\n".join(listed))))
    for url in urls:
        assert destination(url, tmp_path) == tmp_path / url.rpartition("/")[2]
    assert len({destination(url, tmp_path) for url in urls}) == len(urls)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of downloads, with no network but this machine."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(download, "PAUSE", 0)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def small(**arguments):
    """A model of the small size by name, which `create` changes into that size."""
    return create("swin_nano", num_classes=5, **SMALL, **arguments)


def test_a_model_is_created_from_a_url(hub, tmp_path):
    content = saved({"state_dict": official_dict()}, tmp_path / "model").read_bytes()
    with running_server() as server:
        url = server.serve("/weights?id=7", content, Reply(cut=99_999))
        assert_holds(small(weights=url), own_dict())
        asked = len(server.requests)
        assert_holds(small(weights=url), own_dict())
    assert len(server.requests) == asked == 2
    assert destination(url).parent == hub


def test_a_model_is_created_from_a_file_or_a_mapping(tmp_path):
    path = saved({"state_dict": official_dict()}, tmp_path / "model.pth")
    for weights in (path, str(path), official_dict(), torchvision_dict(), own_dict()):
        assert_holds(small(weights=weights), own_dict())


def test_a_url_is_inspected(hub, tmp_path, capsys):
    content = saved(torchvision_dict(), tmp_path / "model").read_bytes()
    with running_server() as server:
        url = server.serve("/model.pth", content)
        assert_inspected(capsys, url, format="torchvision", parameters=count(torchvision_dict()))
        assert server.address + "/gone.pth" in assert_refused(capsys, server.address + "/gone.pth")
    assert_inspected(capsys, url, format="torchvision", parameters=count(torchvision_dict()))


def count(state):
    return sum(value.numel() for value in parameters_of(state).values())


def test_a_name_of_the_catalogue_uses_a_file_put_there_by_hand(hub):
    state = official_dict(VARIANTS["swin_t"], 400)
    path = hub / "swin_tiny_patch244_window877_kinetics400_1k.pth"
    saved({"meta": {}, "state_dict": state}, path)
    model = create("swin_t", num_classes=400, weights="k400")
    assert_holds(model, own_dict(VARIANTS["swin_t"], 400))
    record = path.with_name(path.name + ".sha256")
    assert record.read_text() == f"{digest(path.read_bytes())}  {path.name}\n"
    backbone = create("swin_t", weights="k400")
    assert isinstance(backbone, SwinTransformer3D)
    assert_holds(backbone, own_dict(VARIANTS["swin_t"], None, prefix=False))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_name_nobody_knows_is_refused_with_those_there_are(name, listed):
    with pytest.raises(ValueError, match="no such thing") as caught:
        create(name, weights="no such thing")
    assert not isinstance(caught.value, WeightsError)
    assert "\n" not in str(caught.value)
    if name == "swin_t":
        for known in ("k400", "k400_torchvision", "in1k", "in22k"):
            assert re.search(rf"\b{known}\b", str(caught.value))
    elif name == "swin_b_w1677":
        assert not re.search(r"\bk400_torchvision\b", str(caught.value))
