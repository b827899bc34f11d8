// The kernels of csrc/cpu, of the level that this is compiled for, on small shapes.
//
// Ends with a sentence at the first number that is wrong; else prints the level.
#include "check.h"

int main() {
  check::check_rows();
  check::check_attention();
  std::puts(check::KERNELS.level);
}
