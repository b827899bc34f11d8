"""Recipes: through JSON and back, changed from the command line, compared."""

import json
from dataclasses import asdict, fields, replace

import pytest

pytest.importorskip("tyro")

from train.recipe import (
    FREE_FIELDS,
    Recipe,
    differences,
    from_dict,
    resolve_recipe,
    to_dict,
)
from train.recipes import RECIPES

# Upstream's settings, which nobody tunes.
PLAIN = Recipe()


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Make `PLAIN` a recipe by name."""
    monkeypatch.setitem(RECIPES, "plain", PLAIN)


def changed(recipe: Recipe, part: str, **values) -> Recipe:
    return replace(recipe, **{part: replace(getattr(recipe, part), **values)})


@pytest.mark.parametrize("recipe", [*RECIPES.values(), Recipe()], ids=[*RECIPES, "defaults"])
def test_a_recipe_survives_json(recipe):
    values = json.loads(json.dumps(to_dict(recipe)))
    assert from_dict(values) == recipe
    assert hash(from_dict(values)) == hash(recipe)
    # What is kept is what JSON gives back, so that a checkpoint and recipe.json say the same.
    assert values == to_dict(recipe)


def test_a_recipe_is_kept_whole():
    values = to_dict(PLAIN)
    assert values.keys() == {field.name for field in fields(Recipe)}
    for part in values:
        assert values[part].keys() == asdict(getattr(PLAIN, part)).keys()


@pytest.mark.parametrize("part", ["optim", None])
def test_an_unknown_field_is_refused_by_name(part):
    values = to_dict(PLAIN)
    (values[part] if part else values)["momentum"] = 0.9
    where = "OptimSettings" if part else "Recipe"
    with pytest.raises(TypeError, match=rf"^{where}: unknown fields momentum$"):
        from_dict(values)


def test_without_overrides_the_recipe_is_the_named_one():
    for name, recipe in RECIPES.items():
        assert resolve_recipe(RECIPES[name], []) == recipe


# Values that no recipe has, of each kind of field.
@pytest.mark.parametrize(
    ("part", "field", "words", "value"),
    [
        ("optim", "lr", ["--optim.lr=0.0123"], 0.0123),
        ("optim", "betas", ["--optim.betas", "0.7", "0.77"], (0.7, 0.77)),
        ("loop", "epochs", ["--loop.epochs", "1234"], 1234),
        ("data", "root", ["--data.root=a folder"], "a folder"),
        ("data", "sampling", ["--data.sampling=uniform"], "uniform"),
        ("data", "test_crops", ["--data.test_crops=1"], 1),
        ("model", "use_checkpoint", ["--model.use-checkpoint"], True),
        ("model", "frozen_stages", ["--model.frozen_stages", "2"], 2),
    ],
)
def test_an_override_changes_the_named_field_only(part, field, words, value):
    resolved = resolve_recipe(RECIPES["plain"], words)
    assert resolved == changed(PLAIN, part, **{field: value})
    assert type(getattr(getattr(resolved, part), field)) is type(value)
    (difference,) = differences(PLAIN, resolved)
    assert difference.startswith(f"{part}.{field}: ")


def test_an_unknown_override_ends_the_program_and_names_a_valid_field(capsys):
    with pytest.raises(SystemExit) as caught:
        resolve_recipe(RECIPES["plain"], ["--optim.learning-rat=0.1"])
    assert caught.value.code != 0
    said = capsys.readouterr().err
    assert "--optim.learning-rat" in said
    with pytest.raises(SystemExit):
        resolve_recipe(RECIPES["plain"], ["--loop.epoch=3"])
    assert "--loop.epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--loop.epochs=many"],
        ["--loop.epochs=1.5"],
        ["--optim.lr=fast"],
        ["--optim.betas", "0.9"],
        ["--data.sampling=random"],
        ["--data.test_crops=2"],
        ["--loop.epochs"],
        ["12"],
    ],
    ids=" ".join,
)
def test_a_value_of_the_wrong_type_ends_the_program(words, capsys):
    with pytest.raises(SystemExit) as caught:
        resolve_recipe(RECIPES["plain"], words)
    assert caught.value.code != 0
    assert words[-1].partition("=")[2] in capsys.readouterr().err


def test_differences_name_every_changed_field_and_both_values():
    assert differences(PLAIN, PLAIN) == []
    first = changed(PLAIN, "optim", lr=0.5, betas=(0.1, 0.2))
    second = changed(changed(first, "optim", lr=0.25), "data", root="elsewhere")
    assert differences(first, second) == [
        f"data.root: {PLAIN.data.root!r} -> 'elsewhere'",
        "optim.lr: 0.5 -> 0.25",
    ]
    assert differences(second, first)[1] == "optim.lr: 0.25 -> 0.5"


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("loop", "batch_size", 0),
        ("loop", "epochs", 0),
        ("loop", "evaluate_every", 0),
        ("loop", "checkpoint_every", -1),
        ("loop", "seed", -1),
        ("loop", "seed", 2**31),
        ("data", "clip_len", 0),
        ("data", "workers", -1),
        ("data", "test_short_side", 100),
        ("data", "val_short_side", 100),
        ("data", "val_clips", 0),
        ("data", "erase", 1.5),
        ("data", "augment_flip", -0.5),
        ("loop", "views_per_pass", -1),
    ],
)
def test_a_value_no_run_could_use_is_refused_in_a_sentence(part, field, value, capsys):
    with pytest.raises(ValueError, match=rf"^{part}\.{field} must be .*, got {value}$"):
        changed(PLAIN, part, **{field: value})
    with pytest.raises(SystemExit):
        resolve_recipe(RECIPES["plain"], [f"--{part}.{field}={value}"])
    assert f"{part}.{field} must be" in capsys.readouterr().err


def test_a_run_may_go_on_from_another_folder_with_other_workers():
    moved = changed(changed(PLAIN, "data", root="elsewhere", workers=7), "loop", report_every=3)
    assert len(differences(PLAIN, moved)) == 3
    assert differences(PLAIN, moved, FREE_FIELDS) == []
    for name in FREE_FIELDS:
        part, _, field = name.partition(".")
        assert hasattr(getattr(PLAIN, part), field), name
