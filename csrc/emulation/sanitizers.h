// What the sanitizers' libraries offer: null where they are not in the process. That is asked when
// the program runs, so that one object file serves every build.
#pragma once

#include <cstddef>

#define WEAK __attribute__((weak))

extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
WEAK void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
WEAK void __asan_loadN(const void* begin, size_t bytes);
WEAK void __asan_storeN(void* begin, size_t bytes);

WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* token);
WEAK void __tsan_release(void* token);
WEAK void __tsan_read_range(void* begin, size_t bytes);
WEAK void __tsan_write_range(void* begin, size_t bytes);
WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
}

#undef WEAK

namespace videoswin::emulation {

// Of a switch that orders nothing by itself.
constexpr unsigned UNORDERED = 1;

// Notes an acquire or a release on behalf of another fiber.
inline void in_history(void* history, void (*note)(void*), void* token) {
  if (!note) return;
  void* const here = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(history, UNORDERED);
  note(token);
  __tsan_switch_to_fiber(here, UNORDERED);
}

inline void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

// Accesses to 16 bytes that the emulator makes for a thread. Inlined into the kernel, so that a
// report shows its line.
inline __attribute__((always_inline)) void note_read(const void* address) {
  if (__asan_loadN) __asan_loadN(address, 16);
  if (__tsan_read_range) __tsan_read_range(const_cast<void*>(address), 16);
}

inline __attribute__((always_inline)) void note_write(void* address) {
  if (__asan_storeN) __asan_storeN(address, 16);
  if (__tsan_write_range) __tsan_write_range(address, 16);
}

}  // namespace videoswin::emulation
