// How the emulator runs what is launched. Any plain C++ code may include this.
#pragma once

#include <cstdint>

namespace videoswin::emulation {

// Which of the threads that could go on goes on. Blocks run one after another: in order, backwards,
// from the middle, shuffled.
enum class Order { forward, backward, newest, random };

struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;        // of Order::random
  bool poison = true;       // fresh shared memory is 0xff, NaN in every type, instead of 0
  bool late_copies = true;  // cp.async copies when it is waited for, instead of at once
};

#define VIDEOSWIN_EXPORT __attribute__((visibility("default")))

VIDEOSWIN_EXPORT Settings settings();
VIDEOSWIN_EXPORT void set_settings(Settings settings);

// Switches between threads since the process began.
VIDEOSWIN_EXPORT uint64_t switches();

#undef VIDEOSWIN_EXPORT

}  // namespace videoswin::emulation
