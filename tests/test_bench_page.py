"""docs/performance.md: what the rows say is what the page says, and nothing else is."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench import page

DOCS = Path(__file__).parents[1] / "docs"
HEADER = {
    "card": "a card",
    "device": "cuda",
    "threads": 8,
    "allocator": "native",
    "torch": "2.11",
    "driver": "580",
    "commit": "0123456789ab",
    "date": "2026-01-02",
}
PLACE = {
    **{"bench": "attention", "preset": "full", "model": "swin_t", "window": [8, 7, 7]},
    **{"dtype": "bfloat16", "batch": 8, "stage": 1, "shifted": True, "direction": "forward"},
}


def row(provider, ms=None, **items):
    timed = {"ms": ms, "low": ms, "high": ms, "floor_ms": 0.1, "noise_percent": 1.0} if ms else {}
    return {**HEADER, **PLACE, "provider": provider, **timed, **items}


def written(tmp_path, rows):
    """The page of these rows."""
    results = tmp_path / "results"
    results.mkdir()
    text = "".join(json.dumps(each) + "\n" for each in rows)
    (results / "a_card.jsonl").write_text(text, encoding="utf-8")
    words = ["--results", str(results), "--output", str(tmp_path / "docs" / "performance.md")]
    assert page.main(words) == 0
    return (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_page_is_that_of_the_results(tmp_path):
    plots = tmp_path / "performance"
    plots.mkdir()
    text = page.page(page.read(page.ROOT / "bench" / "results"), plots)
    assert text == (DOCS / "performance.md").read_text(encoding="utf-8")
    names, expected = (
        {file.name for file in folder.iterdir()} for folder in (plots, DOCS / plots.name)
    )
    assert names == expected


def test_a_line_has_every_provider_the_lost_ones_and_those_that_cannot_run(tmp_path):
    text = written(
        tmp_path,
        [row("eager", 3.0), row("cuda", 1.0), row("sdpa", 2.0), row("cpu", reason="no vectors")],
    )
    head, line = lines_of(text)
    assert head == "| stage | shifted | direction | eager | cuda | sdpa | cpu | floor |"
    assert line == (
        "| 1 | yes | forward | 3.00 ±1.0% | **1.00** ±1.0% | 2.00 ±1.0% | [1] | 0.100 |"
    )
    assert "[1] no vectors" in text
    for said in ("## a card", "commit 0123456789ab", "driver 580", "model swin_t", "batch 8"):
        assert said in text
    (plot,) = (tmp_path / "docs" / "performance").glob("*.png")
    assert f"performance/{plot.name}" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_bold_where_the_difference_is_noise(tmp_path):
    text = written(tmp_path, [row("eager", 1.009), row("cuda", 1.0)])
    assert "**" not in lines_of(text)[1]
    assert "1.00 ±1.0%" in text


def test_small_rows_never_enter_the_page_and_later_rows_replace_earlier_ones(tmp_path):
    later = row("cuda", 2.0, commit="ba9876543210", date="2026-01-03")
    small = row("cuda", 0.5, preset="small", date="2026-01-04")
    text = written(tmp_path, [later, row("cuda", 1.0), small, row("sdpa", 9.0)])
    head, line = lines_of(text)
    assert head.split(" | ")[3:5] == ["cuda", "sdpa"]
    # Nothing is bold: they were not measured together.
    assert line.split(" | ")[3:5] == ["2.00 ±1.0%", "9.00 ±1.0%"]
    # Both commits are of rows of this table.
    assert "commit ba9876543210, 0123456789ab" in text


def test_a_row_of_unknown_size_is_no_row_of_the_page(tmp_path, capsys):
    unknown = {name: item for name, item in row("cuda", 1.0).items() if name != "preset"}
    with pytest.raises(SystemExit):
        written(tmp_path, [row("cuda", 1.0), unknown])
    assert "a_card.jsonl: line 2 names no preset; measure it again" in capsys.readouterr().err


def test_where_nobody_could_run_there_is_nothing_to_plot(tmp_path):
    text = written(tmp_path, [row("cuda", reason="no GPU"), row("cpu", reason="no vectors")])
    assert lines_of(text)[1] == "| 1 | yes | forward | [1] | [2] |"
    assert not list((tmp_path / "docs" / "performance").iterdir())


def test_memory_has_no_noise(tmp_path):
    of_step = {"bench": "step", "precision": "bfloat16", "mode": "eager", "frames": 32}
    rows = [
        row(provider, 1.0, peak_mb=size, **of_step)
        for provider, size in (("fused", 100.0), ("reference", 100.5))
    ]
    assert "**100**" in written(tmp_path, rows)


def test_operators_in_other_windows_have_a_table_of_their_own(tmp_path):
    place = {"bench": "operators", "operator": "window_partition"}
    rows = [row("cuda", 1.0, **place), row("cuda", 2.0, window=[16, 7, 7], **place)]
    text = written(tmp_path, rows)
    assert "window 8x7x7" in text
    assert "window 16x7x7" in text


def test_dtypes_and_states_of_the_allocator_have_tables_of_their_own(tmp_path):
    rows = [row("cuda", 1.0), row("cuda", 2.0, dtype="float16"), row("cuda", 3.0, allocator="x")]
    text = written(tmp_path, rows)
    assert text.count("### Window attention: ") == 3
    assert "dtype float16" in text


def test_the_control_is_told(tmp_path):
    rows = [
        row("cuda", 1.0, aa_ratio=[0.9, 1.1]),
        row("sdpa", 1.0, aa_ratio=[1.01, 1.1]),
        row("eager", 1.0, aa_ratio=None),
    ]
    assert "The A/A interval contains 1 in 1 of 2 rows (50.0 %)." in written(tmp_path, rows)


def test_without_rows_there_is_no_page(tmp_path, capsys):
    with pytest.raises(SystemExit):
        written(tmp_path, [row("cuda", 1.0, preset="small")])
    assert "has no rows of full or clip" in capsys.readouterr().err
