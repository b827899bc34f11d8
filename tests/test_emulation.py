"""The emulator of CUDA sources: what it promises, and which mistake in a kernel it shows, and how.

`emulation/faults.cu` is a correct kernel with mistakes that can be planted, one at a time.
"""

import json
import re

import pytest
from emulation_suite import BUILDS, HERE, runner

ORDERS = ["forward", "backward", "newest", "random"]
SEEDS = [f"random,{seed}" for seed in range(1, 9)]
FIXED = [f"{order},0" for order in ORDERS]
COPIES = ["late", "early"]
SOURCE = (HERE / "faults.cu").read_text().splitlines()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return runner(tmp_path_factory)


def line_of(comment):
    (line,) = [i for i, text in enumerate(SOURCE, 1) if text.endswith(f"// {comment}")]
    return f"faults.cu:{line}"


def names(text, comment):
    """Whether a report shows that line."""
    return re.search(rf"{line_of(comment)}\b", text) is not None


def results(run, build, fault, orders=FIXED, copies=COPIES):
    """What the program says of each schedule, in one process: nothing ends it."""
    asked = [f"{fault},{order},{copy}" for order in orders for copy in copies]
    done = run("faults", build, *asked)
    assert done.returncode == 0, done.stderr.decode()
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(asked)
    return said


def report(run, build, fault, order):
    """What a sanitizer writes when it ends the program."""
    done = run("faults", build, f"{fault},{order},0,late")
    assert done.returncode != 0, (fault, order)
    return done.stderr.decode()


@pytest.mark.parametrize("build", BUILDS)
def test_the_correct_kernel_is_clean_in_every_schedule(run, build):
    for said in results(run, build, "none", FIXED + SEEDS):
        assert said == {"error": 0, "sentence": "no error", "wrong": 0}


# In which orders the numbers are wrong. Where not, ThreadSanitizer alone knows.
WRONG = {
    "read_before_write": {"backward", "newest", "random"},
    "write_before_read": {"newest", "random"},
    "removed_syncwarp": set(ORDERS),
    "shuffle_instead": set(),
    "unwritten": set(ORDERS),
    "wrong_fragment": set(ORDERS),
    "block_race": set(),
    "global_overrun": set(),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_numbers(run, fault):
    for build in "plain", "ucontext":
        said = results(run, build, fault, copies=["late"])
        assert all(one["error"] == 0 for one in said)
        wrong = {order for order, one in zip(ORDERS, said, strict=True) if one["wrong"]}
        assert wrong == WRONG[fault]
    if "random" in wrong:
        assert any(one["wrong"] for one in results(run, "plain", fault, SEEDS))


def test_a_copy_waited_for_too_late_is_wrong_if_copies_are_late(run):
    assert all(one["wrong"] for one in results(run, "plain", "late_wait", copies=["late"]))
    assert not any(one["wrong"] for one in results(run, "plain", "late_wait", copies=["early"]))


RACES = {
    "read_before_write": {"copy", "load of a"},
    "write_before_read": {"copy", "load of a"},
    "removed_syncwarp": {"write of sums", "read of sums"},
    "shuffle_instead": {"write of sums", "read of sums"},
    "block_race": {"race of blocks"},
}


@pytest.mark.parametrize("fault", RACES)
@pytest.mark.parametrize("order", ORDERS)
def test_thread_sanitizer_names_both_lines_of_a_race_in_every_order(run, fault, order):
    text = report(run, "thread", fault, order)
    assert "ThreadSanitizer: data race" in text
    assert all(names(text, line) for line in RACES[fault])


ADDRESSES = {
    "short_shared": ("heap-buffer-overflow", "write of sums"),
    "global_overrun": ("heap-buffer-overflow", "global overrun"),
    "copy_outside": ("heap-buffer-overflow", "copy"),
    "row_outside": ("heap-buffer-overflow", "load of a"),
    "row_cut_off": ("heap-buffer-overflow", "load of a"),
    "unaligned_load": ("misaligned address", "unaligned load"),
}


@pytest.mark.parametrize("fault", ADDRESSES)
def test_address_sanitizers_name_the_line_in_every_order(run, fault):
    what, line = ADDRESSES[fault]
    for order in ORDERS:
        text = report(run, "address", fault, order)
        assert what in text
        assert names(text, line)


# What a launch fails with: T any thread, and the lines by what stands beside them.
SENTENCES = {
    "removed_wait": "T: cp.async at <copy> is never waited for",
    "short_shared": "wrote beyond its 1276 bytes of shared memory",
    "unaligned_copy": "thread (5,0,0): cp.async at <copy> "
    "needs a global address aligned to 16 bytes",
    "unaligned_row": "thread (40,0,0): ldmatrix at <load of a> "
    "needs a shared address aligned to 16 bytes",
    "copy_outside": "thread (63,0,0): cp.async at <copy> leaves the shared memory of its block",
    "row_outside": "thread (40,0,0): ldmatrix at <load of a> leaves the shared memory of its block",
    "row_cut_off": "thread (40,0,0): ldmatrix at <load of a> leaves the shared memory of its block",
    "two_barriers": "T is in __syncthreads at L while T waits in __syncthreads at L",
    "two_collectives": "T is in C at L while T waits in C at L",
    "foreign_mask": "T: __syncwarp at <foreign mask> is called by a thread that is not in its mask",
    "ended_lanes": "T waits in __shfl_xor_sync at <shuffle> for T, which has ended",
    "deadlock": "deadlock: thread (0,0,0) and 31 more wait in __shfl_xor_sync at <shuffle>, "
    "thread (16,0,0) and 31 more wait in __syncthreads at <deadlocked barrier>",
}
LINES = {
    "two_barriers": {"barrier", "other barrier"},
    "two_collectives": {"ballot", "shuffle"},
}


def pattern(sentence):
    sentence = re.escape(re.sub("<(.*?)>", lambda found: line_of(found[1]), sentence))
    for letter, text in {
        "T": r"thread \\(\\d+,0,0\\)",
        "L": r"faults.cu:\\d+",
        "C": r"__\\w+",
    }.items():
        sentence = re.sub(rf"\b{letter}\b", text, sentence)
    return rf"block \([012],0,0\): {sentence}"


@pytest.mark.parametrize("fault", SENTENCES)
def test_a_launch_says_who_where_and_why(run, fault):
    # In one process: after a launch that failed, the next one runs.
    for build in "plain", "ucontext":
        for one in results(run, build, fault, FIXED + SEEDS):
            assert one["error"] != 0
            assert re.fullmatch(pattern(SENTENCES[fault]), one["sentence"]), one["sentence"]
            for line in LINES.get(fault, ()):
                assert names(one["sentence"], line)


@pytest.mark.parametrize("build", ["address", "thread"])
def test_sanitizers_follow_launches_that_fail_and_go_on(run, build):
    faults = ["two_barriers", "none", "removed_wait", "deadlock", "none", "ended_lanes", "none"]
    done = run("faults", build, *[f"{fault},random,5,late" for fault in faults])
    assert (done.returncode, done.stderr) == (0, b"")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["error"] == 0 for one in said] == [fault == "none" for fault in faults]
    assert [one["wrong"] == 0 for one in said] == [fault == "none" for fault in faults]


REFUSED = [
    "no error",
    *(
        f"a block has 1 to 1024 threads, at most 64 in z, got {size}"
        for size in ("1025 x 1 x 1", "1 x 1 x 65", "64 x 17 x 1", "0 x 1 x 1")
    ),
    *(
        f"a grid has at most 2147483647 x 65535 x 65535 blocks, got {size}"
        for size in ("2147483648 x 1 x 1", "1 x 65536 x 1", "1 x 1 x 65536")
    ),
    "a block has at most 232448 bytes of shared memory, got 232449",
    "0",
]
# What each check of launches.cu says: mostly how many things were wrong.
LAUNCHES = {
    "many_blocks": "0",
    "wide_blocks": "0",
    "three_dimensions": "0",
    "blocks_once_in_each_order": "0",
    "short_warps": "0",
    "ended_threads": "0",
    "lanes_outside_the_mask": "0",
    "stack_after_a_failure": "0",
    "two_launching_threads": "0",
    "rounding": "0",
    "fresh_shared_memory": "0",
    "converted_arguments": "0",
    "switches": "1000",
    "refusals": ". ".join(REFUSED),
}
# ThreadSanitizer takes seconds for a thousand threads.
SLOW = {"thread": {"wide_blocks"}}


@pytest.mark.parametrize("build", BUILDS)
def test_launches(run, build):
    checks = LAUNCHES.keys() - SLOW.get(build, set())
    done = run("launches", build, *sorted(checks))
    assert (done.returncode, done.stderr) == (0, b"")
    said = {
        key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()
    }
    assert said == {name: LAUNCHES[name] for name in checks}


@pytest.mark.parametrize("build", BUILDS)
def test_after_a_launch_that_failed_the_next_one_runs(run, build):
    (line,) = run("launches", build, "after_a_failure").stdout.splitlines()
    failed = re.escape("block (0,0,0): thread (1,0,0) waits in __syncwarp at launches.cu:")
    failed += r"\d+ for thread \(0,0,0\), which has ended"
    assert re.fullmatch(
        f"({failed}; 0 wrong; no error\n){{2}}", json.loads(line)["after_a_failure"]
    )


def test_blocks_in_order_backwards_from_the_middle_and_shuffled(run):
    (line,) = run("launches", "plain", "block_order").stdout.splitlines()
    forward, backward, middle, shuffled = json.loads(line)["block_order"].split()
    assert (forward, backward, middle) == ("0123456", "6543210", "3456012")
    assert shuffled not in (forward, backward, middle)
    assert sorted(shuffled) == list(forward)


def test_a_stack_that_overflows_ends_the_process_instead_of_writing_elsewhere(run):
    for build in "plain", "ucontext":
        assert run("launches", build, "stack_overflow").returncode == -11
