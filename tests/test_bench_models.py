"""bench/whole_model.py and bench/train_step.py on a CPU, and the judge of whole models."""

import sys
from types import SimpleNamespace

import pytest
import torch
from bench_suite import MACHINE, rows_of

from bench import model_options, train_step, whole_model
from bench.attention_options import parse, settings
from bench.harness import Rows
from bench.model_options import run
from bench.model_providers import AbsentError, Judge, build, random_clips
from videoswin_kernels import explain, extension
from videoswin_kernels.testing import PRODUCTION, Case

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("script", [whole_model, train_step])
def test_models_are_measured_and_what_cannot_run_says_why(script, tmp_path, capsys):
    words = [*MACHINE, "--batch", "1", "--modes", "eager", "--json"]
    assert script.main([*words, str(tmp_path / "rows.jsonl")]) == 0
    ceilings, *found = rows_of(tmp_path / "rows.jsonl")
    assert ceilings["bench"] == "ceilings"
    rows = {row["provider"]: row for row in found}
    assert rows["reference"]["ms"] > 0
    assert rows["reference"]["preset"] == "small"
    floor, ms = rows["reference"]["floor_ms"], rows["reference"]["ms"]
    assert 0 < rows["reference"]["floor_percent"] == pytest.approx(100 * floor / ms)
    assert rows["reference"]["clips_per_s"] == pytest.approx(1e3 / rows["reference"]["ms"])
    assert rows["torchvision"]["error"] < 1e-4
    assert rows["reference"]["peak_mb"] > 0
    assert rows["reference"]["latency_ms"] == rows["reference"]["ms"]
    if extension.why_not("_ops_cpu") is None:
        assert rows["fused"]["clips_per_s"] > 0
        assert rows["fused"]["error"] < 1e-4
        assert rows["accelerated"]["clips_per_s"] > 0
    else:
        for provider in ("fused", "accelerated"):
            assert "clips_per_s" not in rows[provider]
            assert "kernels='fused' cannot run" in rows[provider]["reason"]
    # Called again, it measures nothing.
    capsys.readouterr()
    assert script.main([*words, str(tmp_path / "rows.jsonl")]) == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 5
    assert "reference" in capsys.readouterr().out
    # Another precision is another measurement.
    words += [str(tmp_path / "rows.jsonl"), "--precision", "bfloat16", "--providers", "reference"]
    assert script.main(words) == 0
    last = rows_of(tmp_path / "rows.jsonl")[-1]
    assert last["precision"] == "bfloat16"
    assert last["error"] > 1e-4


def test_presets_of_a_cpu():
    def parsed(*words):
        return whole_model.parse_words([*MACHINE, *words])

    options = parsed()
    assert (options.preset, options.precision, options.modes) == ("small", "float32", ("eager",))
    options = parsed("--preset", "clip", "--precision", "bfloat16")
    (group,) = model_options.groups_of(options, whole_model.shapes(options))
    assert (group["model"], group["batch"], group["clip"]) == ("swin_t", 1, (3, 32, 224, 224))
    assert (group["precision"], group["preset"]) == ("bfloat16", "clip")
    words = ["--preset", "clip", "--stage", "1", "--shifted", "no"]
    (attention,) = settings(parse([*MACHINE, *words]))
    assert (attention.batch, attention.stage) == (
        1,
        PRODUCTION["swin_t stage 1"]._replace(case=Case((16, 56, 56), (8, 7, 7), (0, 0, 0))),
    )


def test_sweeps_let_one_thing_grow():
    def shapes(*words):
        return whole_model.shapes(whole_model.parse_words([*MACHINE, "--preset", "full", *words]))

    clip = (3, 32, 224, 224)
    assert shapes() == [(clip, 8), (clip, 1)]
    assert shapes("--sweep", "batch") == [(clip, n) for n in (1, 2, 4, 8, 16, 32)]
    assert shapes("--sweep", "frames", "--batch", "2") == [
        ((3, n, 224, 224), 2) for n in (16, 32, 64)
    ]
    assert shapes("--sweep", "size") == [((3, 32, n, n), 8) for n in (112, 224, 336)]


def test_a_sweep_measures_each_of_its_sizes(tmp_path, capsys):
    words = [*MACHINE, "--sweep", "frames", "--batch", "1", "--providers", "reference"]
    assert whole_model.main([*words, "--json", str(tmp_path / "rows.jsonl")]) == 0
    rows = [row for row in rows_of(tmp_path / "rows.jsonl") if row["bench"] == "model"]
    assert [row["frames"] for row in rows] == [4, 8, 16]
    assert all(row["ms"] > 0 and row["floor_percent"] > 0 for row in rows)
    # As many tokens, and windows, as there are frames.
    assert rows[2]["floor_ms"] == pytest.approx(2 * rows[1]["floor_ms"], rel=0.2)


def test_a_cpu_has_no_most_clips(tmp_path, capsys):
    assert whole_model.main([*MACHINE, "--largest", "--providers", "reference"]) == 0
    assert "a CPU has no memory of its own that clips could fill" in capsys.readouterr().out


def test_the_most_clips_of_a_gpu_are_those_that_it_has_room_for(monkeypatch, capsys):
    class Device:
        type = "cuda"

    def model(clips):
        if len(clips) > 5:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(whole_model.torch, "device", lambda name: Device)
    monkeypatch.setattr(whole_model, "build", lambda *_: SimpleNamespace(eval=lambda: model))
    monkeypatch.setattr(whole_model, "random_clips", lambda n, *_: (torch.zeros(n), None))
    monkeypatch.setattr(whole_model, "attempt", lambda make, device: make())
    options = SimpleNamespace(device="cuda", providers=["reference"])
    group = {"model": "swin_nano", "precision": "float32", "clip": (3, 8, 32, 32)}
    rows = whole_model.most_clips(group, options)
    assert rows == [{"provider": "reference", "most_clips": 5}]


def test_gradients_of_several_batches_make_a_step(tmp_path):
    words = [*MACHINE, "--batch", "1", "--providers", "reference", "--accumulate", "3"]
    assert train_step.main([*words, "--json", str(tmp_path / "rows.jsonl")]) == 0
    row = rows_of(tmp_path / "rows.jsonl")[-1]
    assert row["accumulate"] == 3
    assert row["clips_per_s"] == pytest.approx(3e3 / row["ms"])
    (works,) = {len(model_options.work_of({**row, "accumulate": n}, True)) / n for n in (1, 3)}
    assert works > 0
    with pytest.raises(SystemExit):
        train_step.main([*MACHINE, "--accumulate", "0"])


def test_a_wrong_model_is_seen():
    clips, labels = random_clips(2, (3, 4, 16, 16), CPU)
    judge = Judge(build("swin_nano", "reference", CPU), clips, labels)
    model = build("swin_nano", "reference", CPU)
    assert "wrong" not in judge.check(model)
    assert judge.agree(model, model, clips, labels) == {}
    other = build("swin_nano", "reference", CPU)
    with torch.no_grad():
        other.backbone.layers[0].blocks[0].attn.relative_position_bias_table.add_(
            torch.randn(7**3, 2)
        )
    assert "logits" in judge.check(other)["wrong"]
    assert "gradients of attn.qkv.weight" in judge.check(other)["wrong"]
    said = judge.agree(model, other, clips, labels)["wrong"]
    assert "logits" in said
    assert "gradients" in said


@pytest.mark.parametrize("kind", ["attn.relative_position_bias_table", "norm1.weight"])
def test_a_gradient_that_is_small_among_all_is_seen(kind):
    clips, labels = random_clips(2, (3, 4, 16, 16), CPU)
    model = build("swin_nano", "reference", CPU)
    judge = Judge(model, clips, labels)
    for name, parameter in model.named_parameters():
        if name.endswith(kind):
            parameter.register_hook(lambda grad: grad / 2)
    assert judge.check(model)["wrong"].startswith(f"gradients of {kind}: off by 5.0e-01")


def test_a_model_without_numbers_is_wrong_even_where_plain_pytorch_is_so(monkeypatch):
    clips, labels = random_clips(1, (3, 4, 16, 16), CPU)
    model = build("swin_nano", "reference", CPU)
    judge = Judge(model, clips, labels)
    judge.naive = dict.fromkeys(judge.naive, float("inf"))
    with torch.no_grad():
        model.cls_head.fc_cls.bias.fill_(float("nan"))
    assert "logits" in judge.check(model)["wrong"]


@pytest.mark.slow
def test_a_compiled_step_is_judged_by_its_gradients(tmp_path):
    words = [*MACHINE, "--batch", "1", "--providers", "reference", "--modes", "compiled"]
    for script in (train_step, whole_model):
        torch._dynamo.reset()
        assert script.main([*words, "--json", str(tmp_path / "rows.jsonl")]) == 0
        row = rows_of(tmp_path / "rows.jsonl")[-1]
        assert (row["mode"], row["graphs"]) == ("compiled", 1)
        assert row["ms"] > 0


def test_torchvisions_model_has_our_weights():
    pytest.importorskip("torchvision")
    clips = torch.randn(1, 3, 5, 30, 32)
    ours, theirs, fast = (
        build("swin_nano", who, CPU).eval() for who in ("reference", "torchvision", "accelerated")
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(clips), ours(clips))
    assert {choice.kernels for choice in explain(fast)} == {"cpu"}
    assert [name for name, _ in fast.named_modules()] == [
        name for name, _ in theirs.named_modules()
    ]


def test_without_torchvision_its_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.video.swin_transformer", None)
    for provider in ("torchvision", "accelerated"):
        with pytest.raises(AbsentError, match="torchvision is not installed"):
            build("swin_nano", provider, CPU)


def test_minutes_end_a_bench_between_its_groups(tmp_path, capsys):
    options = type("Options", (), {"providers": ["one"], "minutes": 0.0, "device": "cpu"})
    rows = Rows(tmp_path / "rows.jsonl", {"card": "a card"})
    assert run("model", [{"model": "a"}], lambda group: [], rows, options) == 0
    assert "1 groups are left after" in capsys.readouterr().err
