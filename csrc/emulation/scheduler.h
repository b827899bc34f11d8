// The threads of a block as the emulator keeps them. All of this belongs to the launch that runs:
// there is one at a time.
#pragma once

#include <string>
#include <vector>

#include "collectives.h"
#include "control.h"
#include "fibers.h"

namespace videoswin::emulation {

constexpr unsigned MOST_THREADS = 1024;

struct Warp;

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned lane;
  Warp* warp;
  bool has_ended;
  const Place* waits_in;  // null while it could go on
  std::vector<Copy> copies;
  size_t copies_taken;  // of `copies`
  uint64_t groups;      // that were closed
};

// Lanes that wait for each other.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  const Place* place;
};

struct Warp {
  Thread* threads;
  unsigned lanes;    // that the block has
  unsigned running;  // of them, that have not ended
  // By the lowest lane of the mask: that of masks that have no lane in common differs.
  Meeting meetings[32];
  unsigned going_on;  // of `meetings`
  void* arguments[32];
};

// Where a block runs.
struct Multiprocessor {
  Thread threads[MOST_THREADS];
  Warp warps[MOST_THREADS / 32];
  unsigned count;    // of threads
  unsigned running;  // of them, that have not ended
  unsigned at_barrier;
  const Place* barrier;
};

extern Multiprocessor* block;  // that runs
extern Thread* self;           // that runs
extern Fiber host;             // that launched
extern Settings active;
extern Shape shape;
extern std::string failure;  // empty while there is none
extern uint64_t num_switches;

uint64_t random_number();
void seed_random_numbers(uint64_t seed);

// Runs a block whose threads have stacks until all have ended or one has failed.
void run_block(Multiprocessor& where, void (*kernel)(void*), void* arguments);

// Sentences about who waits where. Those that fail end the launch, as `fail` does.
bool operator==(const Place& a, const Place& b);
std::string in_block(const std::string& sentence);
[[noreturn]] void fail_in_another_place(const Place& place, const Thread& other);
[[noreturn]] void fail_for_the_ended(const Thread& waiting, const Place& place,
                                     const Thread& ended);
[[noreturn]] void fail_in_deadlock();

}  // namespace videoswin::emulation
