// What the scheduler offers to intrinsics: who runs, and where threads wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vectors.h"

namespace videoswin::emulation {

// An intrinsic where a kernel calls it: as the default of a parameter it is made there.
struct Place {
  const char* name;
  const char* file;
  int line;

  Place(const char* name, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : name(name), file(file), line(line) {}
};

// Of the thread that runs, set at every switch, and of its launch.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;
extern unsigned char* shared_memory;

// Its place in its warp, and the lanes that its warp has.
unsigned lane();
unsigned lanes();

// Returns when all threads of the block are here that have not ended.
void barrier(const Place& place);

// Returns when all lanes of `mask` are here, and the last of them has called combine(arguments)
// for all. Without `combine` it orders memory, as __syncwarp does and no other does.
using Arguments = void* const (&)[32];
using Combine = void (*)(Arguments arguments, unsigned mask);
void meet(unsigned mask, const Place& place, void* argument = nullptr, Combine combine = nullptr);

// Ends the launch, which returns an error number.
[[noreturn]] void fail(const Place& place, const char* sentence);

// A cp.async on its way.
struct Copy {
  void* shared;
  const void* global;
  bool is_valid;
  bool is_done;
  uint64_t group;
  Place place;
};

// True if the copy is to be done at once, else it is by who takes it from `next_copy`: the next
// one of the calling thread that belongs to none of its latest `groups` groups, else null.
bool begin_copy(const Copy& copy);
void end_group();
const Copy* next_copy(unsigned groups);

// Fails unless `address` is that of 16 bytes that ldmatrix and cp.async can access.
void check_shared(const void* address, const Place& place);

struct Shape {
  dim3 grid, threads;
  size_t shared_bytes;
};

// Calls kernel(arguments) for each thread.
int run(const Shape& shape, void (*kernel)(void* arguments), void* arguments);

}  // namespace videoswin::emulation
