// Launches: the blocks of a grid one after another, and how that is controlled.
#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>

#include "sanitizers.h"
#include "scheduler.h"

namespace videoswin::emulation {
namespace {

constexpr size_t MOST_SHARED = 227 << 10;

std::mutex launching;
thread_local std::string last_failure;

// Tokens: what happened before the launch, and in it.
char before, within;

// What is wrong with a launch, or nothing.
std::string refusal(const Shape& wanted) {
  const dim3 &grid = wanted.grid, &threads = wanted.threads;
  const auto product = [](const dim3& size) { return uint64_t{size.x} * size.y * size.z; };
  if (threads.x > 1024 || threads.y > 1024 || threads.z > 64 || product(threads) > MOST_THREADS ||
      product(threads) == 0) {
    return "a block has 1 to 1024 threads, at most 64 in z, got " + std::to_string(threads.x) +
           " x " + std::to_string(threads.y) + " x " + std::to_string(threads.z);
  }
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return "a grid has at most 2147483647 x 65535 x 65535 blocks, got " + std::to_string(grid.x) +
           " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
  }
  if (wanted.shared_bytes > MOST_SHARED) {
    return "a block has at most 232448 bytes of shared memory, got " +
           std::to_string(wanted.shared_bytes);
  }
  return "";
}

// Under ThreadSanitizer neighbouring blocks have different ones: what one history does is in order,
// and blocks are not.
Multiprocessor& multiprocessor(uint64_t turn) {
  static Multiprocessor* all[2];
  Multiprocessor*& one = all[__tsan_create_fiber ? turn % 2 : 0];
  if (!one) {
    one = new Multiprocessor();
    char* const stacks = reserve_stacks(MOST_THREADS);
    for (unsigned i = 0; i < MOST_THREADS; ++i) give_stack(one->threads[i].fiber, stacks, i);
  }
  return *one;
}

template <typename Note>
void for_each_history(uint64_t blocks, Note note) {
  const unsigned count = shape.threads.x * shape.threads.y * shape.threads.z;
  for (unsigned turn = 0; turn < 2 && turn < blocks; ++turn) {
    for (unsigned i = 0; i < count; ++i) note(multiprocessor(turn).threads[i].fiber, i);
  }
}

// A fiber keeps its history: ThreadSanitizer has 8128 of them for a process, used up or not.
void begin_histories(uint64_t blocks) {
  if (!__tsan_create_fiber) return;
  host.history = __tsan_get_current_fiber();
  __tsan_release(&before);
  for_each_history(blocks, [](Fiber& fiber, unsigned thread) {
    if (!fiber.history) {
      fiber.history = __tsan_create_fiber(0);
      __tsan_set_fiber_name(fiber.history, ("thread " + std::to_string(thread)).c_str());
    }
    in_history(fiber.history, __tsan_acquire, &before);
  });
}

void end_histories(uint64_t blocks) {
  if (!__tsan_create_fiber) return;
  for_each_history(
      blocks, [](Fiber& fiber, unsigned) { in_history(fiber.history, __tsan_release, &within); });
  __tsan_acquire(&within);
}

// The indices of all blocks, one after another.
class BlockOrder {
 public:
  explicit BlockOrder(uint64_t blocks) : blocks(blocks) {
    if (active.order == Order::backward) at = stride = blocks - 1;
    if (active.order == Order::newest) at = blocks / 2;
    if (active.order == Order::random) {
      at = random_number() % blocks;
      do {
        stride = 1 + random_number() % blocks;
      } while (std::gcd(stride, blocks) != 1);
    }
  }

  uint3 next() {
    const uint64_t x = at % shape.grid.x, y = at / shape.grid.x % shape.grid.y;
    const uint64_t z = at / shape.grid.x / shape.grid.y;
    at = (at + stride) % blocks;
    return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  }

 private:
  uint64_t blocks, at = 0, stride = 1;
};

// A block's shared memory. AddressSanitizer knows its end; else some bytes lie behind it that
// nobody may write.
class Shared {
 public:
  Shared() : beyond(__asan_storeN ? 0 : 64) {
    // Ignored by ThreadSanitizer, for which memory is fresh then: that two blocks are given the
    // same one after the other is neither a race of theirs nor an order.
    if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    if (posix_memalign(&memory, 1024, shape.shared_bytes + beyond)) std::abort();
    shared_memory = static_cast<unsigned char*>(memory);
    std::memset(memory, active.poison ? 0xff : 0, shape.shared_bytes);
    std::memset(shared_memory + shape.shared_bytes, 0xff, beyond);
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }

  bool is_whole() const {
    for (size_t i = 0; i < beyond; ++i) {
      if (shared_memory[shape.shared_bytes + i] != 0xff) return false;
    }
    return true;
  }

  ~Shared() {
    if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    std::free(memory);
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }

 private:
  size_t beyond;
  void* memory;
};

}  // namespace

int run(const Shape& wanted, void (*kernel)(void*), void* arguments) {
  const dim3& grid = wanted.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  last_failure = refusal(wanted);
  if (!last_failure.empty()) return 1;

  const std::lock_guard<std::mutex> lock(launching);
  std::fenv_t environment;
  std::fegetenv(&environment);
  std::fesetenv(FE_DFL_ENV);
  failure.clear();
  shape = wanted;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  block_size = shape.threads;
  grid_size = shape.grid;
  seed_random_numbers(active.seed);
  BlockOrder order(blocks);
  begin_histories(blocks);
  for (uint64_t i = 0; i < blocks && failure.empty(); ++i) {
    const Shared shared;
    block_index = order.next();
    run_block(multiprocessor(i), kernel, arguments);
    if (failure.empty() && !shared.is_whole()) {
      failure = in_block("wrote beyond its " + std::to_string(shape.shared_bytes) +
                         " bytes of shared memory");
    }
  }
  end_histories(blocks);
  for (unsigned i = 0; i < block->count; ++i) {
    if (!block->threads[i].has_ended) give_up(block->threads[i].fiber);
  }
  std::fesetenv(&environment);
  last_failure = failure;
  return failure.empty() ? 0 : 1;
}

Settings settings() {
  const std::lock_guard<std::mutex> lock(launching);
  return active;
}

void set_settings(Settings settings) {
  const std::lock_guard<std::mutex> lock(launching);
  active = settings;
}

uint64_t switches() {
  const std::lock_guard<std::mutex> lock(launching);
  return num_switches;
}

}  // namespace videoswin::emulation

namespace videoswin {

const char* launch_error(int number) {
  return number == 0 ? "no error" : emulation::last_failure.c_str();
}

}  // namespace videoswin
