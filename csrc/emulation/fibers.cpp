#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "sanitizers.h"

namespace videoswin::emulation {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;

Fiber* left;  // by the last switch

size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

#ifndef VIDEOSWIN_UCONTEXT
// Keeps what a function keeps for its caller, the control words of floating point among it.
__attribute__((naked, noinline)) void switch_stacks(void** /* rdi: from */, void* /* rsi: to */) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
#endif

void switch_to(Fiber& from, Fiber& to, void** fake_stack) {
  left = &from;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(fake_stack, to.stack, to.stack_bytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.history, UNORDERED);
#ifdef VIDEOSWIN_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
}

}  // namespace

char* reserve_stacks(size_t count) {
  void* const stacks = mmap(nullptr, count * (page() + STACK_BYTES), PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  return static_cast<char*>(stacks);
}

void give_stack(Fiber& fiber, char* stacks, size_t index) {
  char* const stack = stacks + index * (page() + STACK_BYTES) + page();
  if (mprotect(stack, STACK_BYTES, PROT_READ | PROT_WRITE)) std::abort();
  fiber.stack = stack;
  fiber.stack_bytes = STACK_BYTES;
}

void prepare(Fiber& fiber, void (*entry)()) {
  char* const stack = static_cast<char*>(const_cast<void*>(fiber.stack));
#ifdef VIDEOSWIN_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // What switch_stacks takes from a stack: control words, six registers, where to go on. Below it
  // lies where `entry` would return to, which ends what a debugger shows.
  uint64_t* const top = reinterpret_cast<uint64_t*>(stack + fiber.stack_bytes);
  for (int i = 1; i <= 8; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<uint64_t>(entry);
  top[-9] = 0x1f80 | uint64_t{0x037f} << 32;
  fiber.stack_pointer = top - 9;
#endif
  fiber.fake_stack = nullptr;
}

// Where the stack lies that a thread of the machine came with, only the sanitizer can tell.
void arrived(Fiber& self) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self.fake_stack, &left->stack, &left->stack_bytes);
  }
}

void switch_fibers(Fiber& from, Fiber& to) {
  switch_to(from, to, &from.fake_stack);
  arrived(from);
}

void leave_fiber(Fiber& from, Fiber& to) {
  switch_to(from, to, nullptr);
  __builtin_unreachable();
}

void give_up(Fiber& fiber) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
  if (__tsan_destroy_fiber) __tsan_destroy_fiber(fiber.history);
  fiber.history = nullptr;
}

}  // namespace videoswin::emulation
