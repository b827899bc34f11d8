"""The arithmetic of bench/attention_estimate.py on machine code written by hand, and its page."""

import re
from collections import Counter

import pytest

from bench import attention_estimate as estimate
from bench import floors, machine_code
from bench import sass as listing
from videoswin_kernels import extension
from videoswin_kernels.testing import Case, Stage

NAME = "_ZN9videoswin12_GLOBAL__N_16loop_kernelI13__nv_bfloat16Li32EEEvi"
PLAIN = "FADD R0, R0, R1"
PRODUCT = "HMMA.16816.F32.BF16 R4, R8, R2, R4"
COPY = "LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64]"


def sass(*lines):
    """As cuobjdump prints it; a branch is written with the number of the line it goes to."""
    text = [f"\t\tFunction : {NAME}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for number, line in enumerate(lines):
        target = re.search(r"BRA (\d+)$", line)
        if target:
            line = line[: target.start(1)] + hex(16 * int(target[1]))
        guard, _, rest = line.rpartition("| ")
        text += [
            f"        /*{16 * number:04x}*/ {guard:>18} {rest} ;     /* 0x000000ff007f7424 */",
            "                                               /* 0x000fe400078e00ff */",
        ]
    return "\n".join(text)


def code(*lines):
    return listing.parse(sass(*lines))["loop_kernel<bfloat16, 32>"]


def kernel(**facts):
    return estimate.Kernel(
        "loop_kernel<bfloat16, 32>", **{"products": 4, "rows": 64, "columns": 64, **facts}
    )


def test_an_instruction_is_read_with_its_guard_and_target():
    found = code(
        "@!P0| BRA 3", "@UP1| UIADD3 UR4, UR4, 0x1, URZ", "NOP", "@PT| LDS.64 R2, [R0+0x20]"
    )
    assert found == [
        (0, "@!P0", "BRA", 48),
        (16, "@UP1", "UIADD3", None),
        (32, "", "NOP", None),
        (48, "@PT", "LDS.64", None),
    ]
    # Of a branch with a second predicate; and no number of another instruction is a target.
    text = sass("@!P1| BRA P2, 0x890", "IADD3 R2, R2, 0x10")
    assert [each.target for each in listing.parse(text)["loop_kernel<bfloat16, 32>"]] == [
        0x890,
        None,
    ]


@pytest.mark.parametrize(
    ("instruction", "unit", "amount"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R2, RZ", "tensor", 1),
        ("MUFU.EX2 R0, R1", "special", 1),
        ("I2F.U32.RP R0, R1", "special", 1),
        ("I2FP.F32.S32 R0, R1", "other", 1),
        ("FFMA R0, R1, R2, R3", "float32", 1),
        ("IMAD.MOV.U32 R0, RZ, RZ, R1", "float32", 1),
        ("FMNMX R0, R1, R2, !PT", "other", 1),
        ("FSETP.GT.AND P0, PT, R8, 8, PT", "other", 1),
        ("IADD3 R0, R1, R2, RZ", "other", 1),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", "other", 1),
        ("LDS R0, [R1]", "shared", 1),
        ("LDS.64 R0, [R1]", "shared", 2),
        ("LDS.128 R0, [R1]", "shared", 4),
        ("STS.64 [R1], R2", "shared", 2),
        ("LDSM.16.M88 R0, [R1]", "shared", 1),
        ("LDSM.16.MT88.2 R0, [R1]", "shared", 2),
        ("LDSM.16.MT88.4 R0, [R1]", "shared", 4),
        (COPY, "shared", 4),
        ("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", "shared", 1),
        # Never done, but issued; uniform, and control.
        ("@!PT| LDS RZ, [RZ]", None, 0),
        ("UIADD3 UR4, UR4, 0x1, URZ", None, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", None, 0),
        ("LDG.E.128 R0, desc[UR6][R2.64]", None, 0),
    ],
)  # fmt: skip
def test_an_instruction_takes_a_slot_and_its_unit(instruction, unit, amount):
    (read,) = code(instruction)
    assert listing.units(read) == Counter({"issue": 1, **({unit: amount} if unit else {})})


def test_an_unknown_instruction_is_refused():
    (read,) = code("FROB R0, R1")
    with pytest.raises(ValueError, match="FROB"):
        listing.units(read)


def test_rates_are_those_of_the_page():
    assert listing.CLOCKS["issue"] * 4 == listing.CLOCKS["float32"] * 4 == 1
    assert listing.CLOCKS["special"] == 2
    assert listing.CLOCKS["other"] == 0.5
    # The exponentials of the floor are as many a second.
    rate = 32 / listing.CLOCKS["special"] * estimate.MULTIPROCESSORS * estimate.CLOCK
    assert rate == pytest.approx(floors.H200.exps)
    # A product has 4096 operations, which take a dense clock and 0.63 of its rate.
    assert listing.CLOCKS["tensor"] == pytest.approx(1 / 0.63)


def test_the_innermost_loop_that_multiplies_is_found():
    found = code(
        PLAIN, PLAIN, "@P1| BRA 1", PLAIN,  # multiplies nothing
        PLAIN, PRODUCT, "@P2| BRA 5", PLAIN,  # the inner loop
        PLAIN, "@P0| BRA 3", "BRA 10",  # the outer one, and a branch to itself
    )  # fmt: skip
    assert listing.loops(found) == [(1, 2), (5, 6), (3, 9)]
    assert listing.inner_loop(found) == (5, 6)
    # Two ways back to one beginning are one loop.
    assert listing.inner_loop(code(PRODUCT, "@P0| BRA 0", PLAIN, "@P1| BRA 0")) == (0, 3)


@pytest.mark.parametrize(
    ("lines", "number"),
    [([PLAIN, "@P0| BRA 0", PRODUCT], 0), ([PRODUCT, "@P0| BRA 0", PRODUCT, "@P0| BRA 2"], 2)],
)
def test_one_loop_must_multiply(lines, number):
    with pytest.raises(ValueError, match=f"{number} innermost loops"):
        listing.inner_loop(code(*lines))


@pytest.mark.parametrize(
    ("skip", "skipped", "rare"),
    [
        ("@P0| BRA 10", [PLAIN] * 8, 8),
        ("@!UP0| BRA 10", [PLAIN] * 8, 8),
        ("@P0| BRA 9", [PLAIN] * 8, 0),  # 7 of them
        ("BRA 10", [PLAIN] * 8, 0),  # always
        ("@PT| BRA 10", [PLAIN] * 8, 0),
        ("@P0| BRA 10", [*[PLAIN] * 7, PRODUCT], 0),
        ("@P0| BRA 13", [PLAIN] * 8, 0),  # leaves the loop
    ],
)
def test_what_a_branch_can_skip_is_rare(skip, skipped, rare):
    found = code(PRODUCT, skip, *skipped, PLAIN, "@P1| BRA 0", "EXIT", "EXIT")
    body = listing.body(found, 0, 11)
    assert body.rare["issue"] == rare
    assert body.scores["issue"] == 12 - rare


def test_the_usual_one_of_two_paths_is_counted():
    # if (rare) { 8 additions } else { 9 exponentials }
    found = code(
        PRODUCT, "@!P0| BRA 11", *[PLAIN] * 8, "@P3| BRA 20", *["MUFU.EX2 R0, R1"] * 9,
        "@P1| BRA 0",
    )  # fmt: skip
    body = listing.body(found, 0, 20)
    assert body.scores == {"issue": 12, "tensor": 1, "special": 9, "pieces": 0}
    assert body.rare["issue"] == 9


def test_loops_that_copy_are_told_from_others():
    found = code(
        PRODUCT,
        "@P4| BRA 14",  # all of it once in a while: what is in loops is theirs
        PLAIN, COPY, "@!PT| LDS RZ, [RZ]", "@P1| BRA 2",
        PLAIN, "STS [R1], R2", "@P2| BRA 6", *[PLAIN] * 5,
        PLAIN, "@P3| BRA 0",
    )  # fmt: skip
    body = listing.body(found, 0, 15)
    assert body.copies == {"issue": 4, "shared": 4, "float32": 1, "pieces": 1}
    assert body.loops == {"issue": 3, "shared": 1, "float32": 1, "pieces": 0}
    assert body.rare["issue"] == 5
    assert body.scores["issue"] == 4


def test_scores_follow_from_products_and_copies_from_pieces():
    found = code(
        *[PRODUCT] * 8, *[PLAIN] * 6, "LDS.128 R0, [R1]",
        COPY, PLAIN, "@P0| BRA 15", COPY, PLAIN, "@P0| BRA 18",
        "@P1| BRA 0", "STL [R1], R2",
    )  # fmt: skip
    # 8 products are 256 scores; 6 pieces in 2 loops of one are 3 turns of each.
    of = estimate.cost(kernel(copies=6), found)
    assert of.turn == 256
    assert of.counts == {
        "issue": (8 + 6 + 1 + 1 + 3 * 6) / 2, "tensor": 4, "special": 0,
        "float32": (6 + 3 * 2) / 2, "other": 0, "shared": (4 + 3 * 8) / 2,
    }  # fmt: skip
    assert of.copies == 3 * 6 / 2
    assert of.spills == 1
    assert of.bound == (14, "shared")
    # Twice as many products for a score: half as many scores.
    assert estimate.cost(kernel(copies=6, products=8), found).turn == 128
    with pytest.raises(ValueError, match="does not copy as it is said to"):
        estimate.cost(kernel(), found)


def test_a_unit_is_its_turns_and_what_is_beside_them():
    found = code(
        *[PLAIN] * 5,  # before all
        *["IADD3 R0, R1, R2, RZ"] * 3, *[PRODUCT] * 4, PLAIN, "@P0| BRA 8",
        *[PRODUCT] * 2, "MUFU.EX2 R0, R1", "@P1| BRA 5", "EXIT",
    )  # fmt: skip
    # 128 scores a turn: of 448 three turns, the other 64 outside.
    of = estimate.cost(kernel(unit=448), found)
    share = 128 / 448
    assert of.counts == pytest.approx({
        "issue": share * (3 * 6 + 7), "tensor": share * (3 * 4 + 2), "special": share,
        "float32": share * 3, "other": share * 3, "shared": 0,
    })  # fmt: skip


def test_padding_is_of_the_tiles():
    for depth, tiles in ((8, (24.5, 26)), (16, (49, 50))):
        assert estimate.CANONICAL[depth].lanes(49 * depth) == pytest.approx(tiles[0] / tiles[1])
    assert estimate.GENERIC.lanes(392) == pytest.approx((392 / 448) ** 2)
    for each in estimate.BACKWARD.values():
        assert each.lanes(392) == pytest.approx(392 / 448 * 392 / 416)
        assert each.lanes(784) == pytest.approx(784 / 832 * 784 / 800)


def test_a_time_is_scores_by_the_slowest_unit():
    stage = Stage(Case((16, 14, 7), (8, 7, 7), (0, 0, 0)), 96, 3)
    counts = dict.fromkeys(listing.CLOCKS, 0.0) | {"issue": 40.0, "special": 4.0}
    of = estimate.Cost(counts, 0, 0, 0, 128, 0)
    assert of.bound == (10, "issue")
    # 5 clips, 2 windows deep and 2 high, 3 heads; 392 x 416 scores each, 10 clocks for 128.
    clocks = 5 * 4 * 3 * 392 * 416 / 128 * 10
    expected = clocks / (132 * 1.98e9) * 1e6
    found = estimate.microseconds(estimate.CANONICAL[8], of, stage, batch=5)
    assert found == pytest.approx(expected)


def test_stages_are_those_of_the_models():
    tiny, base = (estimate.stages(name, (8, 7, 7)) for name in ("swin_t", "swin_b"))
    assert [(stage.channels, stage.heads) for stage in tiny] == [
        (96, 3),
        (192, 6),
        (384, 12),
        (768, 24),
    ]
    assert [stage.case.grid for stage in base] == [(16, n, n) for n in (56, 28, 14, 7)]
    assert all(stage.channels == 32 * stage.heads for stage in (*tiny, *base))


FACTS = extension.build_facts("_ops")
needs_library = pytest.mark.skipif(
    FACTS.get("cuda") is None or machine_code.cuobjdump() is None,
    reason="_ops.so has no CUDA kernels, or there is no cuobjdump here",
)


@pytest.fixture(scope="module")
def costs():
    return estimate.library_costs()


@needs_library
def test_turns_have_the_scores_that_the_sources_say(costs):
    """16 rows a warp by a tile of columns; of the canonical kernels 32 by 14 tiles of 8 keys."""
    turns = {re.match(r"\w+", name)[0]: of.turn for name, of in costs.items()}
    assert turns == {
        "attention_canonical_kernel": 32 * 14 * 8,
        "attention_forward_kernel": 16 * 64,
        "query_gradient_kernel": 16 * 32,
        "key_value_gradient_kernel": 16 * 32,
        "bias_gradient_kernel": 16 * 32,
    }
    for name, of in costs.items():
        assert of.spills == 0
        # A score is one exponential, but for what 32 queries of a canonical kernel end with.
        assert 4 <= of.counts["special"] < 5, name


@needs_library
def test_the_page_has_the_rows_of_these_kernels(costs):
    page = estimate.PAGE.read_text(encoding="utf-8")
    for line in estimate.count_table(costs):
        if line.startswith("| `"):
            name = line.split("|")[1]
            assert f"\n|{name}|" in page, "python bench/attention_estimate.py --write"
            # Another compiler makes other code.
            if f"nvcc {FACTS['cuda']}," in page:
                assert line in page.splitlines(), "python bench/attention_estimate.py --write"
    for stage in estimate.time_rows(costs):
        assert f"\n| {stage[0]} |" in page
    default = estimate.default_fraction()
    assert f"the library has {default}." in page
    assert f"| {default} of 8 |" in page
