// What a launch fails with: one sentence that says which block, thread and line of the kernel.
#include <cstring>

#include "scheduler.h"

namespace videoswin::emulation {
namespace {

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

std::string name(const Thread& thread) {
  return "thread " + triple(thread.index.x, thread.index.y, thread.index.z);
}

std::string name(const Place& place) {
  const char* const slash = std::strrchr(place.file, '/');
  return std::string(place.name) + " at " + (slash ? slash + 1 : place.file) + ":" +
         std::to_string(place.line);
}

// Each place where threads wait, the first of them, and how many do.
std::string all_that_wait() {
  std::vector<const Thread*> firsts;
  std::vector<unsigned> counts;
  for (unsigned i = 0; i < block->count; ++i) {
    const Thread& thread = block->threads[i];
    if (thread.has_ended) continue;
    size_t at = 0;
    while (at < firsts.size() && !(*firsts[at]->waits_in == *thread.waits_in)) ++at;
    if (at == firsts.size()) {
      firsts.push_back(&thread);
      counts.push_back(0);
    }
    ++counts[at];
  }
  std::string all;
  for (size_t i = 0; i < firsts.size(); ++i) {
    if (i > 0) all += ", ";
    all += name(*firsts[i]);
    if (counts[i] > 1) all += " and " + std::to_string(counts[i] - 1) + " more";
    all += (counts[i] > 1 ? " wait in " : " waits in ") + name(*firsts[i]->waits_in);
  }
  return all;
}

}  // namespace

bool operator==(const Place& a, const Place& b) {
  return a.line == b.line && is_same(a.name, b.name) && is_same(a.file, b.file);
}

std::string in_block(const std::string& sentence) {
  return "block " + triple(block_index.x, block_index.y, block_index.z) + ": " + sentence;
}

// The fiber is left with nothing in it that wants to be destroyed: each sentence is by then.
void fail(const Place& place, const char* sentence) {
  failure = in_block(name(*self) + ": " + name(place) + " " + sentence);
  leave_fiber(self->fiber, host);
}

void fail_in_another_place(const Place& place, const Thread& other) {
  const bool is_same_place = place == *other.waits_in;
  failure =
      in_block(name(*self) + " is in " + name(place) + " while " + name(other) + " waits in " +
               name(*other.waits_in) + (is_same_place ? " with another mask" : ""));
  leave_fiber(self->fiber, host);
}

void fail_for_the_ended(const Thread& waiting, const Place& place, const Thread& ended) {
  failure = in_block(name(waiting) + " waits in " + name(place) + " for " + name(ended) +
                     ", which has ended");
  leave_fiber(self->fiber, host);
}

void fail_in_deadlock() {
  failure = in_block("deadlock: " + all_that_wait());
  leave_fiber(self->fiber, host);
}

}  // namespace videoswin::emulation
