// Runs the kernel of faults.cu as each argument says, FAULT,ORDER,SEED,COPIES, and prints a line of
// JSON for each: what the launch returned, and how many results are wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/emulation/control.h"
#include "faults.h"

using namespace videoswin;

namespace {

constexpr int BLOCKS = 3, ROWS = 16 * BLOCKS;

const char* const FAULTS[] = {"none",
                              "read_before_write",
                              "write_before_read",
                              "removed_syncwarp",
                              "shuffle_instead",
                              "removed_wait",
                              "late_wait",
                              "short_shared",
                              "global_overrun",
                              "unaligned_load",
                              "unaligned_copy",
                              "unaligned_row",
                              "copy_outside",
                              "row_outside",
                              "row_cut_off",
                              "unwritten",
                              "wrong_fragment",
                              "two_barriers",
                              "two_collectives",
                              "foreign_mask",
                              "ended_lanes",
                              "deadlock",
                              "block_race"};
const char* const ORDERS[] = {"forward", "backward", "newest", "random"};

template <size_t N>
int find(const char* const (&names)[N], const char* name) {
  for (size_t i = 0; i < N; ++i) {
    if (!std::strcmp(names[i], name)) return static_cast<int>(i);
  }
  std::fprintf(stderr, "no %s here\n", name);
  std::exit(2);
}

// Small whole numbers, whose sums are exact in any order.
int number(int row, int k) { return (7 * row + 3 * k + row * k) % 11 - 5; }

uint16_t float16_of(int x) {
  const unsigned magnitude = static_cast<unsigned>(std::abs(x));
  if (magnitude == 0) return 0;
  const int exponent = 31 - __builtin_clz(magnitude);
  const unsigned bits =
      static_cast<unsigned>(exponent + 15) << 10 | (magnitude << (10 - exponent) & 0x3ff);
  return static_cast<uint16_t>(bits | (x < 0 ? 0x8000u : 0u));
}

struct Problem {
  // On the heap, of the exact size: AddressSanitizer watches the end.
  std::vector<float> out = std::vector<float>(ROWS * 16, NAN);
  std::vector<float> pairs = std::vector<float>(64 * BLOCKS, NAN);
  std::vector<float> total = {0};
  std::vector<uint16_t> a, b;
  std::vector<float> bias = {2, 2, 2, 2, 2};

  Problem() {
    for (int row = 0; row < ROWS; ++row) {
      for (int k = 0; k < DEPTH; ++k) a.push_back(float16_of(number(row, k)));
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < DEPTH; ++k) b.push_back(float16_of(number(row + 100, k)));
    }
  }

  float expected(int row, int column) const {
    int sum = 2;
    for (int k = 0; k < DEPTH; ++k) sum += number(row, k) * number(column + 100, k);
    return static_cast<float>(sum);
  }

  // Of a thread: two neighbours in each of two rows, 8 apart.
  float expected_sum(int block, int thread) const {
    const int row = 16 * block + thread % 32 / 4, column = thread / 32 * 8 + thread % 4 * 2;
    return expected(row, column) + expected(row, column + 1) + expected(row + 8, column) +
           expected(row + 8, column + 1);
  }

  int num_wrong() const {
    int wrong = 0;
    float sum = 0;
    for (int i = 0; i < ROWS * 16; ++i) {
      wrong += !(out[i] == expected(i / 16, i % 16));
      if (i % 16 < 8) sum += expected(i / 16, i % 16);
    }
    for (int i = 0; i < 64 * BLOCKS; ++i) {
      const float pair = expected_sum(i / 64, i % 64) + expected_sum(i / 64, i % 64 ^ 1);
      wrong += !(pairs[i] == pair);
    }
    return wrong + !(total[0] == sum);
  }
};

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    const Fault fault = static_cast<Fault>(find(FAULTS, std::strtok(arguments[i], ",")));
    emulation::Settings settings;
    settings.order = static_cast<emulation::Order>(find(ORDERS, std::strtok(nullptr, ",")));
    settings.seed = std::strtoull(std::strtok(nullptr, ","), nullptr, 10);
    settings.late_copies = !std::strcmp(std::strtok(nullptr, ","), "late");
    emulation::set_settings(settings);

    Problem problem;
    const Arrays arrays{problem.out.data(), problem.pairs.data(), problem.total.data(),
                        problem.a.data(),   problem.b.data(),     problem.bias.data()};
    const int error = run_product(arrays, BLOCKS, fault);
    std::printf("{\"error\": %d, \"sentence\": \"%s\", \"wrong\": %d}\n", error,
                launch_error(error), problem.num_wrong());
    std::fflush(stdout);
  }
}
