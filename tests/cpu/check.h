// What the checks of csrc/cpu share: memory of the exact size, workers, and comparison.
//
// Numbers that go in are small multiples of 1/32, which each of the four types holds as they are;
// memory that nobody has written is NaN in all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu/level.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {
extern const Kernels KERNELS;
}

namespace check {

using namespace videoswin::cpu;
using VIDEOSWIN_LEVEL::KERNELS;

constexpr Type TYPES[] = {Type::float64, Type::float32, Type::float16, Type::bfloat16};
constexpr const char* NAMES[] = {"float64", "float32", "float16", "bfloat16"};
constexpr int64_t SIZES[] = {8, 4, 2, 2};
// Of the largest number that should come out, or of 1.
constexpr double TOLERANCES[] = {1e-10, 1e-4, 2e-3, 1e-2};

inline int number_of(Type type) { return static_cast<int>(type); }
inline Type wide(Type type) { return type == Type::float64 ? type : Type::float32; }

[[noreturn]] inline void fail(const std::string& sentence) {
  std::fprintf(stderr, "%s: %s\n", KERNELS.level, sentence.c_str());
  std::exit(1);
}

// How many bits of a 16-bit type are its fraction.
inline int fraction_of(Type type) { return type == Type::float16 ? 10 : 7; }

inline double widened(uint16_t bits, int fraction) {
  const int bias = (1 << (14 - fraction)) - 1, exponent = (bits & 0x7fff) >> fraction;
  const int rest = bits & ((1 << fraction) - 1);
  if (exponent > 2 * bias) return rest ? NAN : INFINITY;
  const int lowest = 1 - bias - fraction;
  const double size = exponent ? std::ldexp(rest + (1 << fraction), lowest + exponent - 1)
                               : std::ldexp(rest, lowest);
  return bits & 0x8000 ? -size : size;
}

// The bits of a normal number, or 0, that needs no rounding.
inline uint16_t narrowed(double x, int fraction) {
  if (x == 0) return 0;
  const int bias = (1 << (14 - fraction)) - 1, exponent = std::ilogb(x);
  const int rest = static_cast<int>(std::ldexp(std::fabs(x), fraction - exponent));
  const int bits = ((exponent + bias) << fraction) + rest - (1 << fraction);
  return static_cast<uint16_t>(bits | (x < 0 ? 0x8000 : 0));
}

// Numbers of one type in memory of exactly their size; NaN until they are set.
class Array {
 public:
  Array(Type type, int64_t count)
      : type_(type),
        count_(count),
        memory_(static_cast<char*>(count ? std::malloc(bytes()) : nullptr), &std::free) {
    if (count) std::memset(memory_.get(), 0xff, bytes());
  }
  Array(Type type, const std::vector<double>& numbers)
      : Array(type, static_cast<int64_t>(numbers.size())) {
    for (int64_t i = 0; i < count_; ++i) set(i, numbers[i]);
  }

  int64_t bytes() const { return count_ * SIZES[number_of(type_)]; }
  Type type() const { return type_; }
  char* data() const { return memory_.get(); }
  Input input() const { return {data(), type_}; }
  Output output() const { return {data(), type_}; }

  double operator[](int64_t i) const {
    if (type_ == Type::float64) return at<double>(i);
    if (type_ == Type::float32) return at<float>(i);
    return widened(at<uint16_t>(i), fraction_of(type_));
  }

  std::vector<double> numbers() const {
    std::vector<double> all(count_);
    for (int64_t i = 0; i < count_; ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  void set(int64_t i, double x) {
    if (type_ == Type::float64) return void(at<double>(i) = x);
    if (type_ == Type::float32) return void(at<float>(i) = static_cast<float>(x));
    at<uint16_t>(i) = narrowed(x, fraction_of(type_));
  }
  template <typename T>
  T& at(int64_t i) const {
    return reinterpret_cast<T*>(memory_.get())[i];
  }

  Type type_;
  int64_t count_;
  std::unique_ptr<char, decltype(&std::free)> memory_;
};

using Arrays = std::vector<Array>;

// One after another, of a fixed beginning.
class Random {
 public:
  uint32_t below(uint32_t end) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state_ >> 40) % end);
  }
  Array array(Type type, int64_t count) {
    std::vector<double> numbers(count);
    for (double& x : numbers) x = (static_cast<int>(below(129)) - 64) / 32.0;
    return Array(type, numbers);
  }

 private:
  uint64_t state_ = 1;
};

inline void serially(int64_t count, Part part, const void* context) { part(context, 0, count); }

inline void in_threads(int64_t count, Part part, const void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(part, context, i, i + 1);
  for (std::thread& thread : threads) thread.join();
}

// What `call` makes with the memory of a team, which must not depend on who is in it.
//
// Memory of workers is what csrc/library_cpu.cpp gives them, to the byte.
template <typename F>
Arrays run(const std::string& name, int64_t chunks, int64_t bytes, const F& call) {
  const std::pair<int64_t, Parallel> teams[] = {
      {1, serially}, {2, in_threads}, {5, in_threads}, {5, serially}};
  Arrays first;
  for (const auto& [most, parallel] : teams) {
    Workers workers;
    workers.parallel = parallel;
    workers.count = most < chunks ? most : chunks;
    workers.bytes = (bytes + 63) / 64 * 64;
    const int64_t all = workers.count * workers.bytes;
    const std::unique_ptr<char, decltype(&std::free)> scratch(
        static_cast<char*>(all ? std::aligned_alloc(64, all) : nullptr), &std::free);
    workers.scratch = scratch.get();
    if (all) std::memset(workers.scratch, 0xff, all);
    Arrays outputs = call(workers);
    if (first.empty()) {
      first = std::move(outputs);
      continue;
    }
    for (size_t i = 0; i < outputs.size(); ++i)
      if (outputs[i].data() && std::memcmp(outputs[i].data(), first[i].data(), outputs[i].bytes()))
        fail(name + ": output " + std::to_string(i) + " depends on who works");
  }
  return first;
}

// Compares what arithmetic of a type has made; nothing where nothing was asked for.
inline void expect(const std::string& name, Type arithmetic, const Array& found,
                   const std::vector<double>& expected) {
  if (!found.data()) return;
  const double tolerance =
      std::fmax(TOLERANCES[number_of(found.type())], TOLERANCES[number_of(wide(arithmetic))]);
  double largest = 1;
  for (double x : expected) largest = std::fmax(largest, std::fabs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double x = found[static_cast<int64_t>(i)];
    if (std::fabs(x - expected[i]) <= tolerance * largest) continue;
    fail(name + "[" + std::to_string(i) + "] must be " + std::to_string(expected[i]) + ", got " +
         std::to_string(x));
  }
}

void check_attention();
void check_rows();

}  // namespace check
