// cp.async: copies that a thread begins, closes into groups, and waits for.
#include "scheduler.h"

namespace videoswin::emulation {

void check_shared(const void* address, const Place& place) {
  const size_t offset =
      static_cast<size_t>(static_cast<const unsigned char*>(address) - shared_memory);
  if (offset % 16) fail(place, "needs a shared address aligned to 16 bytes");
  if (offset >= shape.shared_bytes || shape.shared_bytes - offset < 16) {
    fail(place, "leaves the shared memory of its block");
  }
}

bool begin_copy(const Copy& copy) {
  check_shared(copy.shared, copy.place);
  if (reinterpret_cast<uintptr_t>(copy.global) % 16) {
    fail(copy.place, "needs a global address aligned to 16 bytes");
  }
  const bool is_done = !active.late_copies;
  self->copies.push_back(copy);
  self->copies.back().is_done = is_done;
  self->copies.back().group = self->groups;
  return is_done;
}

void end_group() { ++self->groups; }

const Copy* next_copy(unsigned groups) {
  Thread& thread = *self;
  if (thread.copies_taken == thread.copies.size()) return nullptr;
  const Copy& copy = thread.copies[thread.copies_taken];
  if (copy.group + groups >= thread.groups) return nullptr;
  ++thread.copies_taken;
  return &copy;
}

}  // namespace videoswin::emulation
