"""What a release says of itself: one version, one list of what is public, and how it is made."""

import inspect
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
import typing
from importlib import import_module, util
from pathlib import Path

import pytest

import videoswin_kernels

ROOT = Path(__file__).parents[1]
VERSION = videoswin_kernels.__version__
# Which files .ci/tag.py reads.
NAMING = ("videoswin_kernels/__init__.py", "CHANGELOG.md", "CITATION.cff", ".ci/tag.py")
ACTION = r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v\d+"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def documented(row: str) -> list[str]:
    """The names in the second column of a row of docs/stability.md."""
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.+) \|$", text("docs/stability.md"), re.M)
    return [name.strip('"') for name in re.findall(r"`([^`]+)`", cells)]


def test_one_version_in_all_places():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert f'\nversion = {{ attr = "{videoswin_kernels.__name__}.__version__" }}\n' in text(
        "pyproject.toml"
    )
    assert re.findall(r"^version: (.+)$", text("CITATION.cff"), re.M) == [VERSION]
    name, day = re.search(r"^## (.+) \((.+)\)$", text("CHANGELOG.md"), re.M).groups()
    assert name == VERSION
    released = re.findall(r"^date-released: (.+)$", text("CITATION.cff"), re.M)
    assert released == ([] if day == "unreleased" else [day])


@pytest.mark.parametrize("name", ["videoswin_kernels", "model", "model.weights"])
def test_what_is_public_is_what_stability_names_and_help_shows(name):
    module = import_module(name)
    assert documented(f"`{name}`") == sorted(module.__all__)
    shown = pydoc.plain(pydoc.render_doc(module))
    sections = dict(re.findall(r"^([A-Z ]+)\n((?:    .*\n|\n)+)", shown, re.M))
    lists = sections.get("CLASSES", "") + sections.get("FUNCTIONS", "")
    told = set(re.findall(r"^    (?:class )?(\w+)\(", lists, re.M))
    assert set(module.__all__) <= told
    assert all(inspect.getdoc(getattr(module, public)) for public in module.__all__)


def test_the_words_of_stability_are_those_of_the_code():
    from videoswin_kernels.selection import WORDS

    assert documented("the words of `kernels=`") == list(WORDS)
    assert issubclass(videoswin_kernels.selection.UnavailableError, RuntimeError)
    setup = text("setup.py")
    for name in documented("the build's environment"):
        assert f'"{name}"' in setup


def test_the_commands_of_stability_are_all_there_are():
    found = set()
    for package in ("videoswin_kernels", "model", "train"):
        for path in (ROOT / package).rglob("*.py"):
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.add(name.removesuffix(".__main__"))
    assert sorted(documented("commands, `python -m`")) == sorted(found)
    assert all(util.find_spec(name) for name in found)


@pytest.mark.parametrize("name", videoswin_kernels.__all__)
def test_public_functions_say_the_types_of_all_they_take_and_give(name):
    public = getattr(videoswin_kernels, name)
    if inspect.isclass(public):
        public = public.build
    hints = typing.get_type_hints(public)
    assert set(hints) == {*inspect.signature(public).parameters, "return"}


@pytest.fixture
def released(tmp_path):
    """The files that name a version, as the commit of a release has them."""
    for name in NAMING:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    change(tmp_path, "CHANGELOG.md", r"^## .+$", f"## {VERSION} (2030-12-31)")
    change(tmp_path, "CITATION.cff", r"^date-released: .+\n", "")
    change(tmp_path, "CITATION.cff", r"^license:", "date-released: 2030-12-31\nlicense:")
    return tmp_path


def change(tree: Path, name: str, pattern: str, replacement: str) -> None:
    path = tree / name
    path.write_text(re.sub(pattern, replacement, path.read_text(), count=1, flags=re.M))


def refusals(tree: Path, tag: str) -> list[str]:
    command = [sys.executable, tree / ".ci/tag.py", tag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == bool(done.stderr)
    return done.stderr.splitlines()


def test_a_tag_that_names_its_commit_passes(released):
    assert refusals(released, f"v{VERSION}") == []


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "sentence"),
    [
        ("CHANGELOG.md", "2030-12-31", "unreleased", "the first section of CHANGELOG.md must be"),
        ("CHANGELOG.md", r"^## .+$", "## 9.9.9 (2030-12-31)", "the first section of CHANGELOG.md"),
        ("CITATION.cff", r"^version: .+$", "version: 9.9.9", "the version of CITATION.cff must be"),
        ("CITATION.cff", "2030-12-31", "2030-12-30", "date-released of CITATION.cff must be 2030"),
    ],
)
def test_a_tag_is_refused_where_a_file_says_something_else(
    released, name, pattern, replacement, sentence
):
    change(released, name, pattern, replacement)
    (told,) = refusals(released, f"v{VERSION}")
    assert told.startswith(f"v{VERSION}: {sentence}")


@pytest.mark.parametrize("tag", ["v9.9.9", VERSION, "v", f"v{VERSION}.post1"])
def test_a_tag_of_another_version_is_refused(released, tag):
    (told,) = refusals(released, tag)
    assert told.startswith(f"{tag}: videoswin_kernels.__version__ is {VERSION}")


@pytest.fixture
def jobs():
    """The jobs of wheels.yml by name."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(text(".github/workflows/wheels.yml"))
    # Of YAML 1.1, which is read here, `on` is a word for true.
    assert workflow[True] == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}
    assert workflow["permissions"] == {"contents": "read"}
    return workflow["jobs"]


def test_the_workflow_asks_builds_tries_and_publishes_in_this_order(jobs):
    assert list(jobs) == ["tag", "build", "try", "publish"]
    assert [job.get("needs") for job in jobs.values()] == [None, "tag", "build", "try"]
    assert jobs["build"]["container"].endswith("/manylinux_2_28_x86_64")
    assert "PLATFORM:-manylinux_2_28_x86_64" in text(".ci/wheel")


def test_only_publishing_may_publish_and_only_a_tag(jobs):
    trusted = [name for name, job in jobs.items() if job.keys() & {"environment", "permissions"}]
    assert trusted == ["publish"]
    publish = jobs["publish"]
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["if"] == "github.ref_type == 'tag'"
    # No code of the repository runs where there is the right to publish.
    assert [step["uses"].partition("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]


def test_the_steps_of_the_workflow_name_what_there_is(jobs):
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    for step in steps:
        assert re.fullmatch(ACTION, step.get("uses", "actions/none@v1")), step
    scripts = "\n".join(step.get("run", "") for step in steps)
    names = re.findall(r"(?:^|[ /])(\.ci/[\w.]+)", scripts, re.M)
    assert sorted(set(names)) == [".ci/installed.py", ".ci/tag.py", ".ci/wheel"]
    assert all((ROOT / name).is_file() for name in names)
    assert os.access(ROOT / ".ci/wheel", os.X_OK)
    handed = [s["with"] for s in steps if re.search("(up|down)load-artifact", s.get("uses", ""))]
    assert {each["name"] for each in handed} == {"dist"}
    # The checkout must not stand in for what is installed.
    (tried,) = [step for step in steps if "installed.py" in step.get("run", "")]
    assert tried["working-directory"] == "${{ runner.temp }}"


def test_a_build_for_release_takes_its_tools_from_requirements():
    listed = re.search(r"grep -E '(.+)' requirements\.txt", text(".ci/wheel"))[1]
    found = [line for line in text("requirements.txt").splitlines() if re.match(listed, line)]
    names = {line.partition("==")[0] for line in found}
    assert names == {"torch", "cmake", "ninja", "pybind11", "setuptools"}
    assert subprocess.run(["bash", "-n", ROOT / ".ci/wheel"]).returncode == 0
    commands = shlex.split(text(".ci/wheel"), comments=True)
    assert commands[commands.index("--exclude") + 1] == "libtorch.so"


def test_the_citation_names_the_paper():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load(text("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["authors"] == [{"name": "The videoswin-kernels authors"}]
    assert f'license = "{cited["license"]}"' in text("pyproject.toml")
    (paper,) = cited["references"]
    assert paper["title"] == "Video Swin Transformer"
    names = [f"{one['given-names']} {one['family-names']}" for one in paper["authors"]]
    assert ", ".join(names) in text("NOTICE")
