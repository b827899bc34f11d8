// Stacks, one for each thread of a block, between which a thread of the machine switches.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(VIDEOSWIN_UCONTEXT)
#define VIDEOSWIN_UCONTEXT
#endif
#ifdef VIDEOSWIN_UCONTEXT
#include <ucontext.h>
#endif

namespace videoswin::emulation {

struct Fiber {
#ifdef VIDEOSWIN_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // its lowest byte
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
  void* history = nullptr;     // of ThreadSanitizer: what it knows to have happened before
};

// Room for so many stacks, each above a page that nobody may touch.
char* reserve_stacks(size_t count);
void give_stack(Fiber& fiber, char* stacks, size_t index);

// The next switch to it calls `entry`, which first calls `arrived` and never returns.
void prepare(Fiber& fiber, void (*entry)());
void arrived(Fiber& self);

void switch_fibers(Fiber& from, Fiber& to);
// The same for the last time: `from` has ended, or is given up.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);
// Forgets what a fiber was doing that did not end.
void give_up(Fiber& fiber);

}  // namespace videoswin::emulation
