"""Each intrinsic of CUDA as emulated, against what the manuals say, written out again in NumPy.

`csrc/emulation/intrinsics.cu` runs each alone: words of 32 bits in, words out.
"""

import numpy as np
import pytest
import torch
from emulation_suite import runner

ALL = 0xFFFFFFFF
LANES = np.arange(32)
PATTERNS = np.arange(1 << 16, dtype=np.uint32)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return runner(tmp_path_factory)


@pytest.fixture(scope="session")
def table(run):
    rows = [line.split() for line in run("intrinsics", "plain").stdout.decode().splitlines()]
    return {name: (i, int(given), int(made)) for i, (name, given, made) in enumerate(rows)}


@pytest.fixture(scope="session")
def intrinsic(run, table):
    """intrinsic(name, *numbers) is what it makes of numbers of 32 bits, one array after another."""

    def made_of(name, *given, dtype=np.uint32):
        which, words_in, words_out = table[name]
        given = b"".join(part.tobytes() for part in given)
        assert len(given) == 4 * words_in
        made = np.frombuffer(output(run, "plain", [which], given), dtype)
        assert len(made) == words_out
        return made

    return made_of


def output(run, build, which, given):
    done = run("intrinsics", build, *map(str, which), given=given)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.fixture
def random():
    return np.random.default_rng(0)


def any_words(random, count):
    return random.integers(0, 1 << 32, count, dtype=np.uint32)


def float_words(random, count, low=-8, high=8):
    """Small whole numbers: sums of products are exact."""
    return random.integers(low, high, count).astype(np.float32)


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
def test_shuffles(intrinsic, random, width):
    value = any_words(random, 32)
    operand = random.integers(0, 32, 32).astype(np.uint32)
    first = LANES // width * width
    last = first + width - 1
    sources = {
        "shuffle": first + operand % width,
        "shuffle_up": np.where(LANES - operand.astype(int) >= first, LANES - operand, LANES),
        "shuffle_down": np.where(LANES + operand <= last, LANES + operand, LANES),
        "shuffle_xor": np.where(LANES ^ operand <= last, LANES ^ operand, LANES),
    }
    for name, source in sources.items():
        made = intrinsic(name, value, operand, np.uint32([width]))
        np.testing.assert_array_equal(made, value[source], err_msg=name)


def test_shuffles_of_other_types_among_half_a_warp(intrinsic, random):
    value = any_words(random, 32)
    integer = np.where(LANES < 16, LANES ^ 5, 21)
    down = np.where(LANES + 3 < 16, LANES + 3, LANES)
    up = np.where(LANES - 3 >= 16, LANES - 3, LANES)
    number = np.where(LANES < 16, down, up)
    made = intrinsic("shuffle_in_halves", value)
    np.testing.assert_array_equal(made, np.concatenate([value[integer], value[number]]))


@pytest.mark.parametrize("predicates", ["none", "all", "one", "some"])
def test_votes(intrinsic, random, predicates):
    of = {"none": LANES * 0, "all": LANES + 1, "one": LANES == 17, "some": LANES % 3 * (LANES > 8)}
    vote = of[predicates].astype(np.uint32)
    bits = sum(1 << lane for lane in range(32) if vote[lane])
    expected = []
    for masks in ([ALL] * 32, [0x55555555, 0xAAAAAAAA] * 16):
        expected += [bits & mask for mask in masks]
        expected += [int(bits & mask != 0) for mask in masks]
        expected += [int(bits & mask == mask) for mask in masks]
    np.testing.assert_array_equal(intrinsic("votes", vote), np.array(expected, np.uint32))


def test_synchronisation_of_a_warp_and_of_a_block(intrinsic, random):
    value = any_words(random, 256)
    of_warps = value.reshape(8, 32)[:, ::-1].reshape(-1)
    made = intrinsic("synchronise", value)
    np.testing.assert_array_equal(made, np.concatenate([of_warps, of_warps[::-1]]))


@pytest.mark.parametrize("count", [4, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(intrinsic, random, count, transposed):
    halves = random.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    row = random.permutation(32).astype(np.uint32)
    # Matrix m is made of the rows that lanes 8 m to 8 m + 7 point to.
    matrices = halves[row].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    expected = np.empty((32, count), np.uint32)
    for lane in range(32):
        for m in range(count):
            low, high = matrices[m, lane // 4, lane % 4 * 2 :][:2].astype(np.uint32)
            expected[lane, m] = low | high << 16
    name = f"load_matrix_x{count}" + "_transposed" * transposed
    made = intrinsic(name, halves.reshape(-1).view(np.uint32), row)
    np.testing.assert_array_equal(made.reshape(32, count), expected)


def fragments(lane):
    """PTX, mma.m16n8k16: the elements (row, column) of a, b and d that a lane holds."""
    group, thread = lane >> 2, lane % 4
    a = [
        (
            group if i < 2 or 4 <= i < 6 else group + 8,
            thread * 2 + (i & 1) + (0 if i < 4 else 8),
        )
        for i in range(8)
    ]
    b = [(thread * 2 + (i & 1) + (0 if i < 2 else 8), group) for i in range(4)]
    d = [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]
    return a, b, d


def held(matrix, operand):
    return np.stack([[matrix[at] for at in fragments(lane)[operand]] for lane in range(32)])


def multiplied(intrinsic, dtype, a, b, d):
    """d + a b by the instruction, from matrices of whole numbers or of any floats."""
    words = []
    for operand, matrix in enumerate((a, b)):
        halves = torch.from_numpy(held(matrix, operand).astype(np.float32)).to(dtype)
        words.append(halves.contiguous().view(torch.int16).numpy().reshape(-1).view(np.uint32))
    name = "mma_" + str(dtype).removeprefix("torch.")
    made = intrinsic(name, *words, held(d, 2).astype(np.float32), dtype=np.float32)
    product = np.empty((16, 8), np.float32)
    for lane in range(32):
        for i, at in enumerate(fragments(lane)[2]):
            product[at] = made.reshape(32, 4)[lane, i]
    return product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_product(intrinsic, random, dtype):
    a, b, d = (float_words(random, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    np.testing.assert_array_equal(multiplied(intrinsic, dtype, a, b, d), d + a @ b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_product_adds_in_float_along_k(intrinsic, random, dtype):
    a, b, d = (random.standard_normal(shape) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    a[3, 5], b[7, 2] = np.inf, np.nan
    expected = d.astype(np.float32)
    for k in range(16):
        with np.errstate(invalid="ignore"):
            expected = expected + np.outer(a[:, k], b[k]).astype(np.float32)
    np.testing.assert_array_equal(multiplied(intrinsic, dtype, a, b, d), expected)


def test_copies(intrinsic, random):
    value = any_words(random, 128)
    valid = np.array([0, 1, 2, 0] * 8, np.uint32)
    kept = value.reshape(32, 4) * (valid != 0)[:, None]
    made = intrinsic("copy_async", value, valid)
    np.testing.assert_array_equal(made, np.concatenate([kept.reshape(-1), value]))


def test_groups_of_copies_are_there_when_they_are_waited_for(intrinsic, random):
    value = any_words(random, 384)
    np.testing.assert_array_equal(intrinsic("copy_async_groups", value), value)


def floats_about(dtype):
    """Around every number of the type: itself, the midpoint to the next, their neighbours."""
    exact = torch.from_numpy(PATTERNS.astype(np.uint16).view(np.int16)).view(dtype)
    number = exact.float().numpy()
    above = (exact.view(torch.int16) + 1).view(dtype).float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        middle = ((number.astype(np.float64) + above) / 2).astype(np.float32)
        return [
            number,
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
        ]


def rounded(number, dtype):
    """By torch, but for NaN, of which a device makes 0x7fff."""
    bits = torch.from_numpy(number.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(number), 0x7FFF, bits).astype(np.uint32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(intrinsic, random, dtype):
    kind = str(dtype).removeprefix("torch.")
    anything = any_words(random, 1 << 16).view(np.float32)
    for number in [*floats_about(dtype), anything]:
        expected = rounded(number, dtype)
        np.testing.assert_array_equal(intrinsic(f"round_to_{kind}", number), expected)
        low, high = number[0::2], number[1::2]
        both = np.stack([np.tile(low, 2), np.tile(high, 2)], axis=1)
        packed = np.tile(expected[0::2] | expected[1::2] << 16, 2)
        np.testing.assert_array_equal(intrinsic(f"pack_{kind}", both), packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_widened_exactly(intrinsic, dtype):
    number = torch.from_numpy(PATTERNS.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
    expected = np.where(np.isnan(number), 0x7FFFFFFF, number.view(np.uint32))
    made = intrinsic(f"to_float_of_{str(dtype).removeprefix('torch.')}", PATTERNS)
    np.testing.assert_array_equal(made, expected)


def test_powers_of_two(intrinsic, random):
    x = np.linspace(-160, 140, 1 << 16, dtype=np.float32)
    x[:8] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, -126]
    power = intrinsic("exp2_approx", x, dtype=np.float32)
    expected = np.exp2(x.astype(np.float64))
    expected[expected < 2.0**-126] = 0
    expected[expected > np.finfo(np.float32).max] = np.inf
    np.testing.assert_allclose(power, expected, rtol=2.0**-22, atol=0)
    np.testing.assert_array_equal(power == 0, expected == 0)


@pytest.mark.parametrize("kind", ["int", "unsigned", "float"])
def test_atomic_sums(intrinsic, random, kind):
    dtype = {"int": np.int32, "unsigned": np.uint32, "float": np.float32}[kind]
    value = random.integers(0 if kind == "unsigned" else -1000, 1000, 256).astype(dtype)
    sums = value.reshape(32, 8).sum(0, dtype=dtype)
    made = intrinsic(f"atomic_add_{kind}", value, dtype=dtype)
    np.testing.assert_array_equal(made, np.tile(sums, 2))


def test_counts_and_extremes(intrinsic, random):
    a, b = any_words(random, 256), any_words(random, 256)
    a[:6] = [0, 1, ALL, 0x80000000, 0x7FC00000, 0x3F800000]
    b[:6] = [1, 0, 0, 0x00000001, 0x40000000, 0x7FC00000]
    ones = [bin(word).count("1") for word in a.tolist()]
    firsts = [(word & -word).bit_length() for word in a.tolist()]
    made = intrinsic("compare_and_count", a, b).reshape(8, 256)
    np.testing.assert_array_equal(made[:2], np.array([ones, firsts], np.uint32))
    for row, dtype in (2, np.int32), (4, np.uint32), (6, np.float32):
        one, other = a.view(dtype), b.view(dtype)
        np.testing.assert_array_equal(made[row].view(dtype), np.fmin(one, other))
        np.testing.assert_array_equal(made[row + 1].view(dtype), np.fmax(one, other))


def test_multiply_and_add_rounds_once(intrinsic, random):
    # Of 12 bits each: the product and the sum are exact in float64, which is then rounded once.
    a, b, c = (float_words(random, 256, -4095, 4096) for _ in range(3))
    a *= np.float32(2) ** random.integers(-6, 6, 256).astype(np.float32)
    expected = (a.astype(np.float64) * b + c).astype(np.float32)
    made = intrinsic("multiply_and_add", a, b, c, dtype=np.float32)
    np.testing.assert_array_equal(made, expected)


def test_indices(intrinsic):
    grid, threads = (4, 3, 2), (5, 3, 2)
    expected = [
        [t[axis] | b[axis] << 8 | threads[axis] << 16 | grid[axis] << 24 for axis in range(3)]
        for b in indices_of(grid)
        for t in indices_of(threads)
    ]
    made = intrinsic("indices").reshape(-1, 3)
    np.testing.assert_array_equal(made, np.array(expected, np.uint32))


def indices_of(size):
    """All (x, y, z), x fastest."""
    return [index[::-1] for index in np.ndindex(*size[::-1])]


def test_much_shared_memory(intrinsic, random):
    value = any_words(random, 64)
    np.testing.assert_array_equal(intrinsic("large_shared_memory", value), value[::-1])


@pytest.mark.parametrize("build", ["ucontext", "address", "thread"])
def test_every_build_makes_the_same_words(run, table, random, build):
    given = []
    for _, words_in, _ in table.values():
        # Lanes, rows and predicates are below 32; a width is a power of two.
        given.append(any_words(random, words_in) % 32)
        given[-1][64:65] = 16
    made = [
        output(run, build, range(len(table)), np.concatenate(given).tobytes())
        for build in ("plain", build)
    ]
    assert made[0] == made[1]
    assert len(made[0]) == 4 * sum(words_out for _, _, words_out in table.values())
