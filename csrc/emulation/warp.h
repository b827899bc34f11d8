// Intrinsics of a warp: synchronisation, shuffles, votes.
#pragma once

#include "collectives.h"
#include "numbers.h"

namespace videoswin::emulation {

// What lane `source` passed as `value`; all bits set if the mask lacks it.
uint32_t exchange(unsigned mask, uint32_t value, unsigned source, const Place& place);
unsigned ballot(unsigned mask, bool predicate, const Place& place);

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Place& place) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, float>);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = exchange(mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Of the lane's segment of `width` lanes: the first, and `source` if it is there, else the lane.
inline unsigned first_of(unsigned width) { return lane() & ~(width - 1); }
inline unsigned in_segment(unsigned source, unsigned width) {
  return source - first_of(width) < width ? source : lane();
}

}  // namespace videoswin::emulation

inline void __syncthreads(videoswin::emulation::Place place = "__syncthreads") {
  videoswin::emulation::barrier(place);
}

inline void __syncwarp(unsigned mask = ~0u, videoswin::emulation::Place place = "__syncwarp") {
  videoswin::emulation::meet(mask, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              videoswin::emulation::Place place = "__shfl_sync") {
  using namespace videoswin::emulation;
  return shuffle(mask, value, first_of(width) | (source & (width - 1)), place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 videoswin::emulation::Place place = "__shfl_up_sync") {
  using namespace videoswin::emulation;
  return shuffle(mask, value, in_segment(lane() - delta % 32, width), place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   videoswin::emulation::Place place = "__shfl_down_sync") {
  using namespace videoswin::emulation;
  return shuffle(mask, value, in_segment(lane() + delta % 32, width), place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  videoswin::emulation::Place place = "__shfl_xor_sync") {
  using namespace videoswin::emulation;
  const unsigned source = lane() ^ (lane_mask % 32);
  // Lanes of a lower segment can be read.
  return shuffle(mask, value, source < first_of(width) + width ? source : lane(), place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              videoswin::emulation::Place place = "__ballot_sync") {
  return videoswin::emulation::ballot(mask, predicate, place);
}

inline int __any_sync(unsigned mask, int predicate,
                      videoswin::emulation::Place place = "__any_sync") {
  return videoswin::emulation::ballot(mask, predicate, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      videoswin::emulation::Place place = "__all_sync") {
  return videoswin::emulation::ballot(mask, !predicate, place) == 0;
}
