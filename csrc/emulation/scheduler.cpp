// Runs the threads of a block, one at a time, each until it waits for others.
#include "scheduler.h"

#include <utility>

#include "sanitizers.h"

#ifdef __SANITIZE_THREAD__
#error "the emulator exchanges stacks, where ThreadSanitizer must not follow it"
#endif

namespace videoswin::emulation {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
unsigned char* shared_memory;

Multiprocessor* block;
Thread* self;
Fiber host;
Settings active;
Shape shape;
std::string failure;
uint64_t num_switches;

namespace {

void (*kernel)(void*);
void* kernel_arguments;

// Those that can go on, from first_ready on up to end_ready, both modulo the size.
Thread* ready[MOST_THREADS];
unsigned first_ready, end_ready;

uint64_t random_state;

void make_ready(Thread& thread) {
  thread.waits_in = nullptr;
  ready[end_ready++ % MOST_THREADS] = &thread;
}

Thread* take_ready() {
  if (first_ready == end_ready) return nullptr;
  if (active.order == Order::random) {
    const uint64_t chosen = first_ready + random_number() % (end_ready - first_ready);
    std::swap(ready[chosen % MOST_THREADS], ready[(end_ready - 1) % MOST_THREADS]);
  }
  const bool is_last = active.order == Order::random || active.order == Order::newest;
  return ready[(is_last ? --end_ready : first_ready++) % MOST_THREADS];
}

void enter(Thread& next) {
  ++num_switches;
  self = &next;
  thread_index = next.index;
}

// Lets others run until somebody makes the running thread ready.
void wait() {
  Thread& waiting = *self;
  Thread* const next = take_ready();
  if (!next) fail_in_deadlock();
  if (next == &waiting) return;
  enter(*next);
  switch_fibers(waiting.fiber, next->fiber);
}

// Makes threads ready for which the running one came last; it goes on without a switch. With a
// token all of them come after whatever was done before a release of it: what ThreadSanitizer is
// told.
template <typename IsOneOf>
void wake(Thread* threads, unsigned count, void* token, IsOneOf is_one_of) {
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[active.order == Order::backward ? count - 1 - i : i];
    if (!is_one_of(thread)) continue;
    if (token) in_history(thread.fiber.history, __tsan_acquire, token);
    if (&thread != self) make_ready(thread);
  }
}

// In random order the one that came last can be overtaken by those that it woke.
void yield() {
  if (active.order != Order::random) return;
  make_ready(*self);
  wait();
}

void open_barrier() {
  block->at_barrier = 0;
  wake(block->threads, block->count, &block->barrier,
       [](const Thread& thread) { return !thread.has_ended; });
}

void end_thread() {
  Thread& ending = *self;
  Warp& warp = *ending.warp;
  if (ending.copies_taken < ending.copies.size()) {
    fail(ending.copies[ending.copies_taken].place, "is never waited for");
  }
  for (unsigned rest = warp.going_on; rest; rest &= rest - 1) {
    const Meeting& meeting = warp.meetings[__builtin_ctz(rest)];
    if (meeting.mask >> ending.lane & 1) {
      fail_for_the_ended(warp.threads[__builtin_ctz(meeting.arrived)], *meeting.place, ending);
    }
  }
  ending.has_ended = true;
  warp.running &= ~(1u << ending.lane);
  --block->running;
  if (block->at_barrier && block->at_barrier == block->running) open_barrier();

  Thread* const next = take_ready();
  if (!next && block->running) fail_in_deadlock();
  if (!next) leave_fiber(ending.fiber, host);
  enter(*next);
  leave_fiber(ending.fiber, next->fiber);
}

void run_thread() {
  arrived(self->fiber);
  kernel(kernel_arguments);
  end_thread();
}

void set_up_threads() {
  const dim3& size = block_size;
  block->count = block->running = size.x * size.y * size.z;
  block->at_barrier = 0;
  for (unsigned first = 0; first < block->count; first += 32) {
    Warp& warp = block->warps[first / 32];
    const unsigned count = block->count - first;
    warp.threads = &block->threads[first];
    warp.lanes = warp.running = count < 32 ? (1u << count) - 1 : ~0u;
    warp.going_on = 0;
  }
  for (unsigned i = 0; i < block->count; ++i) {
    Thread& thread = block->threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.lane = i % 32;
    thread.warp = &block->warps[i / 32];
    thread.has_ended = false;
    thread.copies.clear();
    thread.copies_taken = thread.groups = 0;
    prepare(thread.fiber, run_thread);
  }
}

}  // namespace

// SplitMix64 of Steele, Lea and Flood, 2014.
uint64_t random_number() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void seed_random_numbers(uint64_t seed) { random_state = seed; }

void run_block(Multiprocessor& where, void (*body)(void*), void* arguments) {
  block = &where;
  kernel = body;
  kernel_arguments = arguments;
  set_up_threads();
  self = nullptr;
  first_ready = end_ready = 0;
  wake(block->threads, block->count, nullptr, [](const Thread&) { return true; });
  Thread& first = *take_ready();
  enter(first);
  switch_fibers(host, first.fiber);
}

unsigned lane() { return self->lane; }
unsigned lanes() { return self->warp->lanes; }

void barrier(const Place& place) {
  if (block->at_barrier++ == 0) {
    block->barrier = &place;
  } else if (!(*block->barrier == place)) {
    unsigned other = 0;
    while (block->threads[other].waits_in != block->barrier) ++other;
    fail_in_another_place(place, block->threads[other]);
  }
  release(&block->barrier);
  if (block->at_barrier == block->running) {
    open_barrier();
    return yield();
  }
  self->waits_in = &place;
  wait();
}

void meet(unsigned mask, const Place& place, void* argument, Combine combine) {
  Warp& warp = *self->warp;
  if (!(mask >> self->lane & 1)) fail(place, "is called by a thread that is not in its mask");
  // Lanes that a block does not have count as if they had come.
  mask &= warp.lanes;
  const unsigned lowest = __builtin_ctz(mask);
  Meeting& meeting = warp.meetings[lowest];
  if (!(warp.going_on >> lowest & 1)) {
    if (const unsigned ended = mask & ~warp.running) {
      fail_for_the_ended(*self, place, warp.threads[__builtin_ctz(ended)]);
    }
    meeting = {mask, 0, &place};
    warp.going_on |= 1u << lowest;
  } else if (meeting.mask != mask || !(*meeting.place == place)) {
    fail_in_another_place(place, warp.threads[__builtin_ctz(meeting.arrived)]);
  }
  meeting.arrived |= 1u << self->lane;
  warp.arguments[self->lane] = argument;
  if (!combine) release(&meeting);
  if (meeting.arrived != mask) {
    self->waits_in = &place;
    return wait();
  }
  if (combine) combine(warp.arguments, mask);
  warp.going_on &= ~(1u << lowest);
  wake(warp.threads, __builtin_popcount(warp.lanes), combine ? nullptr : &meeting,
       [mask](const Thread& thread) { return mask >> thread.lane & 1; });
  yield();
}

}  // namespace videoswin::emulation
