"""The smaller benches on a CPU: whole models, training steps, ceilings, variants of kernels."""

import functools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton

from bench import ceilings, train_step, tune, whole_model
from bench.harness import Rows
from bench.model_options import run
from bench.model_providers import THEIRS, AbsentError, Judge, build, random_clips

CPU = torch.device("cpu")
# An operator of the kernels' own, which no other test changes.
CONFIGURATION = "attention.configuration"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("script", [whole_model, train_step])
def test_models_are_measured_and_what_cannot_run_says_why(script, tmp_path, capsys):
    words = ["--device", "cpu", "--batch", "1", "--modes", "eager", "--json"]
    assert script.main([*words, str(tmp_path / "rows.jsonl")]) == 0
    rows = {row["provider"]: row for row in rows_of(tmp_path / "rows.jsonl")}
    assert rows["reference"]["ms"] > 0
    assert rows["reference"]["clips_per_s"] == pytest.approx(1e3 / rows["reference"]["ms"])
    assert rows["torchvision"]["reason"] == "torchvision has no swin_nano"
    assert "clips_per_s" not in rows["fused"]
    if not torch.cuda.is_available():
        assert "kernels='fused' cannot run" in rows["fused"]["reason"]
    # Called again, it measures nothing.
    capsys.readouterr()
    assert script.main([*words, str(tmp_path / "rows.jsonl")]) == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 3
    assert "reference" in capsys.readouterr().out


def test_a_wrong_model_is_seen():
    clips, labels = random_clips(2, (3, 4, 16, 16), CPU)
    judge = Judge(build("swin_nano", "reference", CPU), clips, labels)
    model = build("swin_nano", "reference", CPU)
    assert "wrong" not in judge.check(model)
    assert judge.agree(model, model, clips) == {}
    other = build("swin_nano", "reference", CPU)
    with torch.no_grad():
        other.backbone.layers[0].blocks[0].attn.relative_position_bias_table.add_(
            torch.randn(7**3, 2)
        )
    assert "logits" in judge.check(other)["wrong"]
    assert "gradients" in judge.check(other)["wrong"]
    assert "wrong" in judge.agree(model, other, clips)


def test_torchvisions_model_has_our_weights(monkeypatch):
    video = pytest.importorskip("torchvision.models.video.swin_transformer")
    sizes = {"patch_size": [2, 4, 4], "embed_dim": 64, "window_size": [4, 4, 4]}
    nano = functools.partial(video.SwinTransformer3d, depths=[2, 2], num_heads=[2, 4], **sizes)
    monkeypatch.setattr("torchvision.models.video.nano", nano, raising=False)
    monkeypatch.setitem(THEIRS, "swin_nano", "nano")
    clips = torch.randn(1, 3, 5, 30, 32)
    ours, theirs = (build("swin_nano", who, CPU).eval() for who in ("reference", "torchvision"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(clips), ours(clips))
    with pytest.raises(AbsentError, match="torchvision has no swin_l"):
        build("swin_l", "torchvision", CPU)


def test_minutes_end_a_bench_between_its_groups(tmp_path, capsys):
    options = type("Options", (), {"providers": ["one"], "minutes": 0.0, "device": "cpu"})
    rows = Rows(tmp_path / "rows.jsonl", {"card": "a card"})
    assert run("model", [{"model": "a"}], lambda group: [], rows, options) == 0
    assert "1 groups are left after" in capsys.readouterr().out


def test_ceilings_of_a_cpu(tmp_path, capsys):
    assert ceilings.main(["--device", "cpu", "--json", str(tmp_path / "rows.jsonl")]) == 0
    rows = {row["what"]: row for row in rows_of(tmp_path / "rows.jsonl")}
    assert rows["device copy"]["value"] > 0
    assert rows["matrix product in torch"]["value"] > 0
    assert {name for name, row in rows.items() if "reason" in row} == {
        "exp2 in Triton",
        *ceilings.OF_CUDA,
    }


def test_without_a_compiler_each_of_its_ceilings_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    rows = list(ceilings.cuda_rates(CPU))
    assert [row["what"] for row in rows] == list(ceilings.OF_CUDA)
    assert {row["reason"] for row in rows} == {"nvcc is not installed"}


def test_ceilings_compile_to_the_instructions_they_are_named_for(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    binary = tmp_path / "ceilings"
    flags = [*ceilings.flags("90a", True), "-Xptxas", "-warn-spills,-Werror"]
    ceilings.run([nvcc, *flags, "-o", binary, ceilings.SOURCE])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True)
    for instruction in ("MUFU.EX2", "LDS.128", "HMMA.16816.F32.BF16", "HGMMA.64x128x16.F32.BF16"):
        assert instruction in code.stdout


def test_a_compiler_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3: no good"):
        ceilings.run(["sh", "-c", "echo no good >&2; exit 3"])


def variants(tmp_path, *lines):
    path = tmp_path / "variants.jsonl"
    path.write_text("\n".join(lines))
    return path


def variant(**items):
    plain = {"name": "small", "predicted": 0.5, "stage": 1, "direction": "forward"}
    return json.dumps({**plain, "set": {CONFIGURATION: {"block_queries": 16}}, **items})


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "no variants"),
        (["{"], "line 1"),
        (["[]"], "line 1: a variant is a JSON object"),
        (['{"name": "a"}'], "missing .*predicted"),
        ([variant(colour="red")], r"unknown \['colour'\]"),
        ([variant(direction="up")], "direction must be one of forward"),
        ([variant(stage=5)], "stage must be 1 to 4, got 5"),
        ([variant(name="as it is")], "there are two of 'as it is'"),
        ([variant(), "", variant()], "line 3: there are two of 'small'"),
        ([variant(set={CONFIGURATION: {"speed": 9}})], r"attention.configuration has no .'speed'"),
        ([variant(set={"attention.nothing": {"num_warps": 9}})], "attention.nothing has no"),
        ([variant(set={"no_file.configuration": {"num_warps": 9}})], "no_file"),
    ],
)
def test_a_file_of_variants_is_checked(lines, sentence, tmp_path):
    with pytest.raises(tune.VariantError, match=sentence):
        tune.read(variants(tmp_path, *lines))


def test_a_variant_changes_what_is_launched_and_no_more():
    module, name = tune.locate(CONFIGURATION)
    original = getattr(module, name)
    arguments = (90, torch.float16, 392, 32)
    before = original(*arguments)
    kernels = tune.Kernels([json.loads(variant())])
    try:
        kernels.become({CONFIGURATION: {"block_queries": 16}})
        assert getattr(module, name)(*arguments) == before._replace(block_queries=16)
        kernels.become({CONFIGURATION: {"num_warps": 1}})
        assert getattr(module, name)(*arguments) == before._replace(num_warps=1)
    finally:
        kernels.become({})
    assert getattr(module, name) is original


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
def test_variants_are_judged_timed_and_told(tmp_path, capsys):
    lines = [
        variant(),
        variant(name="impossible", set={CONFIGURATION: {"block_queries": 48}}),
    ]
    words = [str(variants(tmp_path, *lines)), "--device", "cpu", "--preset", "tiny"]
    output = tmp_path / "rows.jsonl"
    assert tune.main([*words, "--json", str(output)]) == 0
    rows = {row["variant"]: row for row in rows_of(output) if row["bench"] == "tune"}
    assert list(rows) == ["as it is", "small", "impossible"]
    assert rows["small"]["predicted"] == 0.5
    assert rows["small"]["ms"] > 0
    assert "power of 2" in rows["impossible"]["reason"]
    assert "small" in capsys.readouterr().out
    # Called again, it measures nothing; a CPU is not timed but for this.
    assert tune.main([*words, "--json", str(output)]) == 0
    assert len(rows_of(output)) == 4
    with pytest.raises(SystemExit):
        tune.main([words[0], "--device", "cpu"])
    assert "interpreted kernels are not timed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
def test_a_wrong_variant_has_no_time(tmp_path, monkeypatch, capsys):
    module, name = tune.locate(CONFIGURATION)
    launch = module.launch_window_attention

    def broken(out, *arguments):
        launch(out, *arguments)
        if getattr(module, name)(90, torch.float32, 392, 32).num_stages == 7:
            out.mul_(1.01)

    monkeypatch.setattr(module, "launch_window_attention", broken)
    file = variants(tmp_path, variant(set={CONFIGURATION: {"num_stages": 7}}))
    output = tmp_path / "rows.jsonl"
    words = [str(file), "--device", "cpu", "--preset", "tiny", "--json", str(output)]
    assert tune.main(words) == 1
    row = next(row for row in rows_of(output) if row.get("variant") == "small")
    assert "the output is off" in row["wrong"]
    assert "ms" not in row
