// What a launch promises besides right numbers. Prints a line of JSON for each name it is given.
#include <cfenv>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cuda/common.cuh"
#include "../../csrc/emulation/control.h"

namespace videoswin {
namespace {

__device__ int block_number() {
  return static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
}

__device__ int thread_number() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

__device__ int block_threads() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

// Each thread adds 1 to its own count.
__global__ void visit(int* visits) {
  visits[block_number() * block_threads() + thread_number()] += 1;
}

// The order of blocks.
__global__ void number_blocks(int* number, int* next) {
  number[block_number()] = atomicAdd(next, 1);
}

// In [blocks, threads], out: each block reversed.
__global__ void reverse(int* out, const int* in) {
  int* const shared = dynamic_shared<int>();
  const int i = thread_number(), first = block_number() * block_threads();
  shared[i] = in[first + i];
  __syncthreads();
  out[first + i] = shared[block_threads() - 1 - i];
}

// The sum of threads up to and with each one of its warp, of warps that may be short of lanes.
__global__ void sum_up(int* out) {
  int sum = thread_number();
  for (int apart = 1; apart < 32; apart *= 2) {
    const int below = __shfl_up_sync(~0u, sum, apart);
    if (thread_number() % 32 >= apart) sum += below;
  }
  __syncwarp();
  out[thread_number()] = sum;
}

__global__ void leave_out_a_barrier(int* out) {
  if (thread_number() % 2 == 0) return;
  __syncwarp();
  out[thread_number()] = 1;
}

// Threads that ended are not waited for.
__global__ void wait_for_the_rest(int* out) {
  if (thread_number() >= 40) return;
  __syncthreads();
  out[thread_number()] = 1;
}

// Of a lane that is not in the mask there is nothing to read.
__global__ void read_outside_the_mask(int* out) {
  const int i = thread_number();
  out[i] = i < 16 ? __shfl_sync(0xffffu, i, i + 8) : 0;
}

// The nearest float to 1 / 3 is above it, that to 5 / 3 below; 3 times the nearest long double
// is 1. Volatile, so that no division crosses a change of the rounding.
float third_of(float x) {
  volatile float number = x, third = number / 3;
  return third;
}

bool is_one_in_three_thirds() {
  volatile long double one = 1, third = one / 3, product = third * 3;
  return product == 1;
}

// Thread 0 rounds down; 1e-39 is subnormal.
__global__ void round_differently(float* out) {
  if (thread_number() == 0) std::fesetround(FE_DOWNWARD);
  __syncthreads();
  volatile float subnormal = 1e-39f;
  const float results[4] = {third_of(1), third_of(5), is_one_in_three_thirds() ? 1.0f : 0.0f,
                            subnormal * 2};
  for (int i = 0; i < 4; ++i) out[4 * thread_number() + i] = results[i];
}

__global__ void read_fresh(unsigned* out) {
  out[thread_number()] = dynamic_shared<unsigned>()[thread_number()];
}

__global__ void take(int* out, int64_t wide, float number, dim3 size) {
  out[0] = wide == -5 && number == 2.5f && size.x == 7 && size.y == 1;
}

// Of the second thread, a write between the end of its stack and that of the first.
__global__ void overflow(int* out) {
  if (thread_number() == 0) return;
  volatile char large[66 << 10];
  large[0] = 1;
  out[0] = large[0];
}

// Fails with many small arrays on the stack.
__attribute__((noinline)) void fail_below(int depth) {
  volatile int small[8];
  small[depth % 8] = depth;
  if (depth > 0) return fail_below(small[depth % 8] - 1);
  __syncwarp(0);
}

__global__ void fail_deep() { fail_below(20); }

// Has one large one.
__global__ void write_stack(int* out) {
  volatile char large[32 << 10];
  for (size_t i = 0; i < sizeof large; ++i) large[i] = 1;
  out[thread_number()] = large[thread_number()];
}

int wrong_reversals(dim3 grid, dim3 threads) {
  const int size = static_cast<int>(threads.x * threads.y * threads.z);
  const int count = static_cast<int>(grid.x * grid.y * grid.z) * size;
  std::vector<int> in(count), out(count, -1);
  for (int i = 0; i < count; ++i) in[i] = i;
  int wrong = launch(reverse, grid, threads, sizeof(int) * size, nullptr, out.data(), in.data());
  for (int i = 0; i < count; ++i) wrong += out[i] != i / size * size + size - 1 - i % size;
  return wrong;
}

int wrong_visits(dim3 grid, dim3 threads) {
  std::vector<int> visits(uint64_t{grid.x} * grid.y * grid.z * threads.x * threads.y * threads.z);
  int wrong = launch(visit, grid, threads, 0, nullptr, visits.data());
  for (const int count : visits) wrong += count != 1;
  return wrong;
}

std::string text(int number) { return std::to_string(number); }

std::string blocks_once_in_each_order() {
  int wrong = 0;
  for (int order = 0; order < 4; ++order) {
    for (unsigned blocks : {1u, 2u, 7u, 12u, 60u}) {
      emulation::Settings settings;
      settings.order = static_cast<emulation::Order>(order);
      settings.seed = blocks;
      emulation::set_settings(settings);
      wrong += wrong_visits(blocks, 2) + wrong_visits(dim3(blocks, 3, 2), dim3(2, 1, 3));
    }
  }
  return text(wrong);
}

std::string block_order() {
  std::string orders;
  for (int order = 0; order < 4; ++order) {
    emulation::Settings settings;
    settings.order = static_cast<emulation::Order>(order);
    settings.seed = 3;
    emulation::set_settings(settings);
    std::vector<int> number(7), blocks(7);
    int next = 0;
    launch(number_blocks, 7, 1, 0, nullptr, number.data(), &next);
    for (int i = 0; i < 7; ++i) blocks[number[i]] = i;
    for (const int block : blocks) orders += text(block);
    orders += ' ';
  }
  return orders;
}

std::string short_warps() {
  std::vector<int> out(80);
  int wrong = launch(sum_up, 1, dim3(20, 2, 2), 0, nullptr, out.data());
  for (int i = 0, sum = 0; i < 80; ++i) {
    sum = i % 32 == 0 ? i : sum + i;
    wrong += out[i] != sum;
  }
  return text(wrong);
}

std::string ended_threads() {
  std::vector<int> out(70);
  int wrong = launch(wait_for_the_rest, 1, 70, 0, nullptr, out.data());
  for (int i = 0; i < 70; ++i) wrong += out[i] != (i < 40);
  return text(wrong);
}

std::string lanes_outside_the_mask() {
  std::vector<int> out(32);
  int wrong = launch(read_outside_the_mask, 1, 32, 0, nullptr, out.data());
  for (int i = 0; i < 16; ++i) wrong += out[i] != (i < 8 ? i + 8 : -1);
  return text(wrong);
}

// Twice: a launch that fails, one that does not.
std::string after_a_failure() {
  std::vector<int> out(64);
  std::string sentences;
  for (int i = 0; i < 2; ++i) {
    const int error = launch(leave_out_a_barrier, 3, 64, 0, nullptr, out.data());
    sentences += launch_error(error);
    sentences += "; " + text(wrong_reversals(3, 64)) + " wrong; " + launch_error(0) + "\\n";
  }
  return sentences;
}

std::string stack_after_a_failure() {
  std::vector<int> out(32);
  int wrong = launch(fail_deep, 1, 32, 0, nullptr) == 0;
  wrong += launch(write_stack, 1, 32, 0, nullptr, out.data());
  for (const int one : out) wrong += one != 1;
  return text(wrong);
}

std::string two_launching_threads() {
  int wrong[2] = {};
  const auto many = [&wrong](int which) {
    for (int i = 0; i < 50; ++i) {
      wrong[which] += wrong_reversals(3, 40 + 40 * which);
      std::vector<int> out(64);
      const int error = launch(leave_out_a_barrier, 1, 64, 0, nullptr, out.data());
      wrong[which] += !std::strstr(launch_error(error), "thread (0,0,0), which has ended");
    }
  };
  std::thread first(many, 0), second(many, 1);
  first.join();
  second.join();
  return text(wrong[0] + wrong[1]);
}

// The launching thread rounds up: a kernel does not, and a thread of it that rounds down is alone.
std::string rounding() {
  std::vector<float> out(4 * 64);
  const float above = third_of(1), below = third_of(5);
  std::fesetround(FE_UPWARD);
  int wrong = launch(round_differently, 1, 64, 0, nullptr, out.data());
  wrong += third_of(5) == below;
  std::fesetround(FE_TONEAREST);
  for (int i = 0; i < 64; ++i) {
    wrong += (out[4 * i] == above) != (i > 0) || out[4 * i + 1] != below;
    wrong += out[4 * i + 2] != (i > 0) || out[4 * i + 3] != 2e-39f;
  }
  return text(wrong);
}

std::string fresh_shared_memory() {
  unsigned first[32], second[32];
  launch(read_fresh, 1, 32, 128, nullptr, first);
  emulation::Settings settings;
  settings.poison = false;
  emulation::set_settings(settings);
  launch(read_fresh, 1, 32, 128, nullptr, second);
  int wrong = 0;
  for (int i = 0; i < 32; ++i) wrong += first[i] != ~0u || second[i] != 0;
  return text(wrong);
}

std::string converted_arguments() {
  int taken = 0;
  const int error = launch(take, 1, 1, 0, nullptr, &taken, -5, 2.5, 7u);
  return text(error == 0 && taken == 1 ? 0 : 1);
}

// A thread for a switch, one back to who launched.
std::string switches() {
  const uint64_t before = emulation::switches();
  wrong_visits(10, 100);
  return text(static_cast<int>(emulation::switches() - before));
}

std::string refusals() {
  std::string sentences;
  int visits = 0;
  const auto refused = [&](dim3 grid, dim3 threads, size_t shared) {
    sentences += launch_error(launch(visit, grid, threads, shared, nullptr, &visits));
    sentences += ". ";
  };
  refused(dim3(1, 0, 1), 2000, 0);
  refused(1, 1025, 0);
  refused(1, dim3(1, 1, 65), 0);
  refused(1, dim3(64, 17), 0);
  refused(1, 0, 0);
  refused(1u << 31, 1, 0);
  refused(dim3(1, 65536), 1, 0);
  refused(dim3(1, 1, 65536), 1, 0);
  refused(1, 1, (227 << 10) + 1);
  return sentences + text(visits);
}

std::string stack_overflow() {
  int out;
  return text(launch(overflow, 1, 2, 0, nullptr, &out));
}

struct Check {
  const char* name;
  std::string (*run)();
};

const Check CHECKS[] = {
    {"many_blocks", [] { return text(wrong_visits(70000, 3)); }},
    {"wide_blocks", [] { return text(wrong_reversals(2, 1024) + wrong_reversals(2, 993)); }},
    {"three_dimensions", [] { return text(wrong_reversals(dim3(3, 4, 5), dim3(4, 3, 7))); }},
    {"blocks_once_in_each_order", blocks_once_in_each_order},
    {"block_order", block_order},
    {"short_warps", short_warps},
    {"ended_threads", ended_threads},
    {"lanes_outside_the_mask", lanes_outside_the_mask},
    {"after_a_failure", after_a_failure},
    {"stack_after_a_failure", stack_after_a_failure},
    {"two_launching_threads", two_launching_threads},
    {"rounding", rounding},
    {"fresh_shared_memory", fresh_shared_memory},
    {"converted_arguments", converted_arguments},
    {"switches", switches},
    {"refusals", refusals},
    {"stack_overflow", stack_overflow},
};

}  // namespace
}  // namespace videoswin

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    for (const auto& check : videoswin::CHECKS) {
      if (std::strcmp(check.name, names[i]) != 0) continue;
      videoswin::emulation::set_settings({});
      std::printf("{\"%s\": \"%s\"}\n", check.name, check.run().c_str());
      std::fflush(stdout);
    }
  }
}
