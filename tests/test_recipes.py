"""The recipes by name: the released numbers, and two steps of each from real video files."""

from math import isfinite

import pytest
import train_suite as suite

from train.batches import EpochBatches
from train.recipes import RECIPES, SOURCES, listing

# Of upstream's configs/recognition/swin, read there and written down by hand: model, weights, drop
# path, classes' data, rate, decay, epochs, clips of a GPU in a pass; and mmaction2's for swin_l.
RELEASED = {
    "swin_t_k400_1k": ("swin_t", "in1k", 0.1, "kinetics400", 1e-3, 0.02, 30, 2),
    "swin_s_k400_1k": ("swin_s", "in1k", 0.1, "kinetics400", 1e-3, 0.02, 30, 1),
    "swin_b_k400_1k": ("swin_b", "in1k", 0.3, "kinetics400", 1e-3, 0.05, 30, 1),
    "swin_b_k400_22k": ("swin_b", "in22k", 0.2, "kinetics400", 3e-4, 0.05, 30, 1),
    "swin_b_k600_22k": ("swin_b", "in22k", 0.2, "kinetics600", 3e-4, 0.05, 30, 1),
    "swin_b_w1677_sthv2": ("swin_b_w1677", "k400_22k", 0.4, "sthv2", 3e-4, 0.05, 60, 1),
    "swin_l_k400_22k": ("swin_l", "in22k", 0.4, "kinetics400", 1e-3, 0.05, 30, 8),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_numbers_are_the_released_ones(name):
    recipe = RECIPES[name]
    model, data, optim, loop = recipe.model, recipe.data, recipe.optim, recipe.loop
    assert (
        *(model.name, model.weights, model.drop_path_rate, data.root.removeprefix("data/")),
        *(optim.lr, optim.weight_decay, loop.epochs, loop.clips_per_pass),
    ) == RELEASED[name]
    assert (optim.betas, optim.backbone_lr, optim.clip_norm) == ((0.9, 0.999), 0.1, 0)
    assert (optim.schedule, optim.warmup_epochs, optim.warmup_start) == ("official", 2.5, 0.1)
    assert optim.groups == ("mmaction2" if name.startswith("swin_l") else "official")
    assert model.dropout == 0.5
    assert (data.clip_len, data.interval, data.short_side, data.crop) == (32, 2, 256, 224)
    assert (data.area, data.aspect) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (data.test_crops, data.test_short_side) == (3, 224)
    assert data.val_views == (1, 1, 256)
    # Upstream's max_testing_views.
    assert loop.views_per_pass == (
        4 if name.endswith("_1k") else {"swin_l_k400_22k": 0}.get(name, 2)
    )
    assert data.offsets == ("mmaction2" if name.startswith("swin_l") else "official")
    is_sthv2 = name.endswith("sthv2")
    augmented = ("randaugment", 0.5, 0.25) if is_sthv2 else ("none", 0.5, 0.0)
    assert (data.augment, data.augment_flip, data.erase) == augmented
    assert (data.sampling, data.flip, data.test_clips, optim.label_smoothing, model.fresh) == (
        ("uniform", 0.0, 1, 0.1, ("cls_head",)) if is_sthv2 else ("interval", 0.5, 4, 0.0, ())
    )


@pytest.mark.parametrize("name", RELEASED)
def test_eight_gpus_give_eight_clips_each_to_a_step(name):
    """Upstream's videos_per_gpu, in update_interval passes."""
    loop = RECIPES[name].loop
    assert loop.batch_size == 64
    shares = [EpochBatches(640, 64, 0, 1, 0, rank, 8) for rank in range(8)]
    assert {len(keys) for share in shares for keys in share} == {8}
    update_interval = {"swin_t_k400_1k": 4, "swin_l_k400_22k": 1}.get(name, 8)
    assert loop.clips_per_pass * update_interval == 8


def test_the_list_names_each_recipe_and_where_its_numbers_are_from(capsys):
    assert RECIPES.keys() == SOURCES.keys()
    assert suite.train_main(["--list"]) == 0
    said = capsys.readouterr().out
    assert said == f"{listing()}\n"
    rows = said.splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(RECIPES)
    assert all(row.endswith(source) for row, source in zip(rows, SOURCES.values(), strict=True))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "videos"
    suite.write_videos(folder)
    for split, count in (("train", 4), ("test", 1)):
        path = folder / f"{split}.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_each_on_a_shrunk_model_through_its_own_pipeline(name, videos, tmp_path):
    recipe = suite.changed(
        RECIPES[name],
        model={"name": "swin_nano", "weights": "", "fresh": ()},
        # As many frames, a quarter as high and as wide.
        data={"root": str(videos), "workers": 0, "short_side": 64, "crop": 56}
        | {"test_short_side": 56, "val_short_side": 64},
        # In float16 the scale of the loss has to find its size first, and steps are skipped.
        loop={"epochs": 1, "batch_size": 2, "clips_per_pass": 1, "report_every": 1}
        | {"precision": "bfloat16"},
    )
    assert suite.train(recipe, tmp_path / "run") == 0
    rows = [line for line in suite.metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [(row["step"], row["clips"]) for row in rows] == [(1, 2), (2, 2)]
    assert all(isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)
