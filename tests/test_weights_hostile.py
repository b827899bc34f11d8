"""Files that are no weights, files that would run code, and files with harmless leftovers."""

import argparse
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights_suite import (
    assert_holds,
    imagenet_dict,
    model_of,
    official_dict,
    own_dict,
    refusal,
    snapshot,
)

from model import load_weights


def zipped(content, path):
    torch.save(content, path)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ""])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n" * 50,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b'{"message": "Not Found"}',
        b"\x80\x02.",
        b"PK\x03\x04",
        bytes(64),
        bytes(range(256)) * 8,
    ],
    ids=["empty", "newline", "html", "git-lfs", "json", "pickle", "zip", "zeros", "bytes"],
)
def test_what_holds_no_weights_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refusal(model_of(), path)
    refusal(model_of(), str(path))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ""])
def test_a_folder_and_a_missing_file_are_refused(suffix, tmp_path):
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    refusal(model_of(), folder)
    refusal(model_of(), tmp_path / f"missing{suffix}")
    refusal(model_of(), tmp_path / "no folder" / f"missing{suffix}")


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), "text", 5, None])
@pytest.mark.parametrize("write", [zipped, legacy])
def test_a_file_of_something_else_is_refused(content, write, tmp_path):
    write(content, tmp_path / "weights.pth")
    refusal(model_of(), tmp_path / "weights.pth")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("write", [zipped, legacy, save_file])
def test_a_truncated_file_is_refused(write, share, tmp_path):
    path = tmp_path / ("weights.safetensors" if write is save_file else "weights.pth")
    write(official_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refusal(model_of(), path)


def test_an_archive_that_is_not_of_torch_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    np.savez(path.with_suffix(".npz"), weight=np.zeros(3))
    path.with_suffix(".npz").rename(path)
    refusal(model_of(), path)


class Intruder:
    """Unpickling one makes a file through a shell: it could do anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


class Evaluation:
    """Unpickling one evaluates Python."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return eval, (f"open({self.path!r}, 'w').close()",)


def in_the_meta(intruder):
    return {"state_dict": official_dict(), "meta": {"hooks": [intruder]}}


def in_the_weights(intruder):
    return {**official_dict(), "backbone.norm.weight": intruder}


def in_a_leftover(intruder):
    return {"model": imagenet_dict(), "config": argparse.Namespace(lr=0.1, hook=intruder)}


def in_a_key(intruder):
    return {"model": own_dict(), intruder: 1}


@pytest.mark.parametrize("hide", [in_the_meta, in_the_weights, in_a_leftover, in_a_key])
@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize(
    ("kind", "name"), [(Intruder, "posix.system"), (Evaluation, "eval")], ids=["system", "eval"]
)
def test_code_in_a_file_does_not_run_and_is_named(kind, name, write, hide, tmp_path):
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    write(hide(kind(made)), path)
    assert name in refusal(model_of(), path).replace(str(tmp_path), "")
    assert not made.exists()
    # The intruder is real: a careless reader would have run it.
    torch.load(path, weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("kind", "name"), [(Intruder, "posix.system"), (Evaluation, "eval")], ids=["system", "eval"]
)
def test_code_in_a_plain_pickle_does_not_run(kind, name, protocol, tmp_path):
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    path.write_bytes(pickle.dumps({"state_dict": kind(made)}, protocol))
    # torch reads the protocols that it writes; of the later ones it cannot say what they call.
    expected = name if protocol < 4 else "its pickle is none that can be read without running"
    assert expected in refusal(model_of(), path).replace(str(tmp_path), "")
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists()


def test_a_file_does_not_choose_what_a_harmless_name_is_called_with(tmp_path):
    """`getattr` is in files of mmengine, and with it every function is in reach."""

    class Reach:
        def __reduce__(self):
            return getattr, (Intruder, "__init__")

    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": official_dict(), "meta": Reach()}, path)
    assert "Intruder" in refusal(model_of(), path)


# Classes of other programs, as far as it matters to a pickle. `ran` tells whether they were used.
EARLY_HISTORY_BUFFER = """
import numpy as np
ran = []
class HistoryBuffer:
    def __init__(self):
        self._log_history = np.array([0.5, 0.25], dtype=np.float32)
        self._count_history = np.array([1, 1])
"""
# Later ones also hold their own functions, which a pickle of protocol 2 reaches by `getattr`.
HISTORY_BUFFER = (
    EARLY_HISTORY_BUFFER
    + """
    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"min": HistoryBuffer.min}}
    def __setstate__(self, state):
        ran.append("setstate")
    def min(self):
        return self._log_history.min()
"""
)
CFG_NODE = """
ran = []
class CfgNode(dict):
    def __init__(self, content):
        super().__init__(content)
        self.__dict__["__immutable__"] = False
        self.__dict__["__deprecated_keys__"] = set()
    def __setitem__(self, key, value):
        ran.append(key)
        super().__setitem__(key, value)
    def __setstate__(self, state):
        ran.append("setstate")
"""


def install(monkeypatch, name, source):
    """The module `name` with `source`, importable as if its program were installed."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    module = sys.modules[name]
    exec(source, vars(module))
    return module


def mmengine(monkeypatch, source=HISTORY_BUFFER):
    module = install(monkeypatch, "mmengine.logging.history_buffer", source)
    scalars = {"train/loss": module.HistoryBuffer(), "train/lr": module.HistoryBuffer()}
    runtime = {"iter": 7, "loss": np.float64(0.5), "epochs": np.int64(3)}
    hub = {"log_scalars": scalars, "runtime_info": runtime, "resumed_keys": {"train/loss": True}}
    return module, {"message_hub": hub, "meta": {"seed": 0}, "state_dict": official_dict()}


def early_mmengine(monkeypatch):
    return mmengine(monkeypatch, EARLY_HISTORY_BUFFER)


def yacs(monkeypatch):
    module = install(monkeypatch, "yacs.config", CFG_NODE)
    inner = module.CfgNode({"TYPE": "swin", "HEADS": [3, 6], "DROP": 0.2})
    config = module.CfgNode({"MODEL": inner, "OUTPUT": "", "TAGS": ("a", "b")})
    return module, {"model": official_dict(), "epoch": 299, "config": config, "max_accuracy": 81.3}


def namespace(monkeypatch):
    arguments = argparse.Namespace(lr=1e-3, milestones=(1, 2), nested=argparse.Namespace(x=None))
    return None, {"state_dict": official_dict(), "args": arguments}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("leave", [mmengine, early_mmengine, yacs, namespace])
def test_harmless_leftovers_load_and_are_never_run(leave, write, installed, tmp_path, monkeypatch):
    module, content = leave(monkeypatch)
    write(content, tmp_path / "epoch_30.pth")
    if module:
        module.ran.clear()
    if module and not installed:
        for name in [name for name in sys.modules if f"{module.__name__}.".startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, name)
    allowed = set(torch.serialization.get_safe_globals())
    net = model_of()
    load_weights(net, tmp_path / "epoch_30.pth")
    assert_holds(net, own_dict())
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert not module or module.ran == []
    # The leftover is real: a careless reader fails without its program, or runs it.
    if module and not installed:
        with pytest.raises((ImportError, AttributeError)):
            torch.load(tmp_path / "epoch_30.pth", weights_only=False)
    elif module and leave is not early_mmengine:
        torch.load(tmp_path / "epoch_30.pth", weights_only=False)
        assert module.ran


def test_arrays_as_the_first_numpy_spelled_them_load(tmp_path, monkeypatch):
    _, content = mmengine(monkeypatch)
    path = tmp_path / "epoch_30.pth"
    legacy(content, path)
    whole = path.read_bytes()
    # The names in a pickle of protocol 2 end with their line, so they may change length.
    spelled = whole.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert spelled != whole or b"cnumpy.core.multiarray\n" in whole
    path.write_bytes(spelled)
    net = model_of()
    load_weights(net, path)
    assert_holds(net, own_dict())


def test_a_leftover_of_an_unknown_program_is_named(tmp_path, monkeypatch):
    module = install(monkeypatch, "someones.program", "class Settings: pass")
    content = {"state_dict": official_dict(), "settings": module.Settings()}
    torch.save(content, tmp_path / "a.pth")
    assert "someones.program.Settings" in refusal(model_of(), tmp_path / "a.pth")


def test_leftovers_prevent_nothing_in_weights_that_do_not_fit(tmp_path, monkeypatch):
    _, content = mmengine(monkeypatch)
    del content["state_dict"]["backbone.norm.bias"]
    torch.save(content, tmp_path / "a.pth")
    net = model_of()
    before = snapshot(net)
    assert "backbone.norm.bias" in refusal(net, tmp_path / "a.pth")
    assert_holds(net, before)
