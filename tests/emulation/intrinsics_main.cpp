// Without arguments, prints the name of each intrinsic and how many words it reads and writes. With
// their indices, runs one after another on words of standard input, and writes words to standard
// output.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define VIDEOSWIN_BUILD emulated
#include "../../csrc/emulation/intrinsics.h"

using namespace videoswin::emulated;

int main(int count, char** arguments) {
  for (int i = 0; count == 1 && i < intrinsic_count(); ++i) {
    std::printf("%s %d %d\n", intrinsic_name(i), intrinsic_words_in(i), intrinsic_words_out(i));
  }
  for (int i = 1; i < count; ++i) {
    const int which = std::atoi(arguments[i]);
    std::vector<uint32_t> in(intrinsic_words_in(which)), out(intrinsic_words_out(which));
    if (std::fread(in.data(), 4, in.size(), stdin) != in.size()) return 2;
    if (run_intrinsic(which, out.data(), in.data(), nullptr) != 0) return 3;
    std::fwrite(out.data(), 4, out.size(), stdout);
  }
}
