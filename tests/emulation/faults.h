#pragma once

#include <cstdint>

namespace videoswin {

constexpr int DEPTH = 48;

struct Arrays {
  float *out, *pairs, *total;
  const uint16_t *a, *b;
  const float* bias;
};

// Each a line that is missing or wrong, by the name that main.cpp takes.
enum class Fault {
  none,
  read_before_write,  // no barrier after the tile is there
  write_before_read,  // no barrier before the next tile
  removed_syncwarp,
  shuffle_instead,  // of __syncwarp: it waits as well, but orders no memory
  removed_wait,
  late_wait,
  short_shared,
  global_overrun,
  unaligned_load,
  unaligned_copy,
  unaligned_row,
  copy_outside,
  row_outside,
  row_cut_off,  // its last bytes are outside
  unwritten,
  wrong_fragment,
  two_barriers,
  two_collectives,
  foreign_mask,
  ended_lanes,
  deadlock,
  block_race,
};

int run_product(const Arrays& arrays, int blocks, Fault fault);

const char* launch_error(int number);

}  // namespace videoswin
