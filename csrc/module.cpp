// The module _C, for tests: how the emulation of _emulated.so runs what is launched, and every
// intrinsic of kernels by itself, emulated and, where this was built with CUDA, on a GPU.
#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "emulation/control.h"

#define VIDEOSWIN_BUILD emulated
#include "emulation/intrinsics.h"
#undef VIDEOSWIN_BUILD

#ifdef VIDEOSWIN_CUDA
#define VIDEOSWIN_BUILD native
#include "emulation/intrinsics.h"
#undef VIDEOSWIN_BUILD
#endif

extern "C" const char* videoswin_build_facts();

namespace {

namespace py = pybind11;
namespace emulated = videoswin::emulated;
using videoswin::emulation::Order;

constexpr std::array<const char*, 4> ORDERS = {"forward", "backward", "newest", "random"};

Order order_of(const std::string& name) {
  for (size_t i = 0; i < ORDERS.size(); ++i) {
    if (name == ORDERS[i]) return static_cast<Order>(i);
  }
  throw py::value_error("set_settings: order must be forward, backward, newest or random, got " +
                        name);
}

void set_settings(const std::string& order, uint64_t seed, bool poison, bool late_copies) {
  videoswin::emulation::set_settings({order_of(order), seed, poison, late_copies});
}

py::dict settings() {
  const auto now = videoswin::emulation::settings();
  return py::dict(py::arg("order") = ORDERS[static_cast<size_t>(now.order)],
                  py::arg("seed") = now.seed, py::arg("poison") = now.poison,
                  py::arg("late_copies") = now.late_copies);
}

py::dict intrinsics() {
  py::dict words;
  for (int i = 0; i < emulated::intrinsic_count(); ++i) {
    words[emulated::intrinsic_name(i)] =
        py::make_tuple(emulated::intrinsic_words_in(i), emulated::intrinsic_words_out(i));
  }
  return words;
}

using Run = int(int which, void* out, const void* in, void* stream);

int run(Run* run_intrinsic, const std::string& name, uintptr_t out, uintptr_t in,
        uintptr_t stream) {
  for (int i = 0; i < emulated::intrinsic_count(); ++i) {
    if (name != emulated::intrinsic_name(i)) continue;
    return run_intrinsic(i, reinterpret_cast<void*>(out), reinterpret_cast<const void*>(in),
                         reinterpret_cast<void*>(stream));
  }
  throw py::key_error(name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("set_settings", &set_settings, py::kw_only(), py::arg("order") = "forward",
        py::arg("seed") = 0, py::arg("poison") = true, py::arg("late_copies") = true,
        "Decides how launches run from now on; what is not named is as in the beginning.");
  m.def("settings", &settings, "The arguments of the last set_settings.");
  m.def("switches", &videoswin::emulation::switches,
        "Switches between CUDA threads since the process began.");
  m.def(
      "build_facts",
      [] { return py::module_::import("json").attr("loads")(videoswin_build_facts()); },
      "What the emulation's library says of its own build.");
  m.def("intrinsics", &intrinsics, "{name: (words of 32 bits read, words written)}");
  m.def(
      "run_emulated",
      [](const std::string& name, uintptr_t out, uintptr_t in) {
        return run(&emulated::run_intrinsic, name, out, in, 0);
      },
      py::arg("name"), py::arg("out"), py::arg("words"),
      "Runs an intrinsic on the data pointers of CPU tensors; 0, or an error number.");
#ifdef VIDEOSWIN_CUDA
  m.def(
      "run_native",
      [](const std::string& name, uintptr_t out, uintptr_t in, uintptr_t stream) {
        return run(&videoswin::native::run_intrinsic, name, out, in, stream);
      },
      py::arg("name"), py::arg("out"), py::arg("words"), py::arg("stream"),
      "The same on the data pointers of CUDA tensors, queued in a stream.");
#endif
}
