// Instructions that move and multiply matrices: cp.async, ldmatrix, mma.sync.
#pragma once

#include "collectives.h"
#include "numbers.h"
#include "sanitizers.h"

namespace videoswin::emulation {

// Reads `count` 8 x 8 matrices of 16 bits into r[count].
void load_matrix(uint32_t* r, const void* row, int count, bool is_transposed, const Place& place);

template <typename T>
void multiply(float* d, const uint32_t* a, const uint32_t* b, const Place& place);

inline __attribute__((always_inline)) void do_copy(const Copy& copy) {
  uint4* const to = static_cast<uint4*>(copy.shared);
  *to = copy.is_valid ? *static_cast<const uint4*>(copy.global) : uint4{0, 0, 0, 0};
}

}  // namespace videoswin::emulation

namespace videoswin {
inline namespace emulated {

inline void copy_async_16(void* shared, const void* global, bool is_valid,
                          emulation::Place place = "cp.async") {
  const emulation::Copy copy{shared, global, is_valid, false, 0, place};
  // Others must not read or write these bytes from now until the wait.
  if (is_valid) emulation::note_read(global);
  emulation::note_write(shared);
  if (emulation::begin_copy(copy)) emulation::do_copy(copy);
}

inline void copy_async_16(void* shared, const void* global, emulation::Place place = "cp.async") {
  copy_async_16(shared, global, true, place);
}

inline void copy_async_commit() { emulation::end_group(); }

template <int N>
void copy_async_wait() {
  while (const emulation::Copy* const copy = emulation::next_copy(N)) {
    if (!copy->is_done) emulation::do_copy(*copy);
  }
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row, emulation::Place place = "ldmatrix") {
  emulation::note_read(row);
  emulation::load_matrix(r, row, 4, false, place);
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row,
                                      emulation::Place place = "ldmatrix") {
  emulation::note_read(row);
  emulation::load_matrix(r, row, 4, true, place);
}

inline void load_matrix_x2(uint32_t (&r)[2], const void* row, emulation::Place place = "ldmatrix") {
  if (emulation::lane() < 16) emulation::note_read(row);
  emulation::load_matrix(r, row, 2, false, place);
}

inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row,
                                      emulation::Place place = "ldmatrix") {
  if (emulation::lane() < 16) emulation::note_read(row);
  emulation::load_matrix(r, row, 2, true, place);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulation::Place place = "mma") {
  emulation::multiply<T>(d, a, b, place);
}

}  // namespace emulated
}  // namespace videoswin
