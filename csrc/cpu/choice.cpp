// Which level's kernels run: the best that this processor has, asked for once.
#include "operators.h"

namespace videoswin::cpu {

namespace baseline {
extern const Kernels KERNELS;
}

#ifdef VIDEOSWIN_X86_LEVELS
namespace v3 {
extern const Kernels KERNELS;
}
namespace v4 {
extern const Kernels KERNELS;
}

namespace {

bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace
#endif

const Kernels* kernels_of_level(int level) {
  if (level == 0) return &baseline::KERNELS;
#ifdef VIDEOSWIN_X86_LEVELS
  if (level == 1 && has_v3()) return &v3::KERNELS;
  if (level == 2 && has_v4()) return &v4::KERNELS;
#endif
  return nullptr;
}

namespace {

const Kernels* best() {
  for (int level = 2; level > 0; --level)
    if (const Kernels* found = kernels_of_level(level)) return found;
  return kernels_of_level(0);
}

const Kernels*& chosen() {
  static const Kernels* found = best();
  return found;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

bool choose_level(int level) {
  const Kernels* const found = kernels_of_level(level);
  if (found) chosen() = found;
  return found;
}

}  // namespace videoswin::cpu
