// Rows copied by an index; the standard library's copy is that of this processor already.
#include <cstring>

#include "operators.h"

namespace videoswin::cpu {

void gather_rows(char* out, const char* x, const int32_t* index, int64_t clips, int64_t num_x,
                 int64_t num_out, int64_t row_bytes, const Workers& workers) {
  struct Context {
    char* out;
    const char* x;
    const int32_t* index;
    int64_t num_x, num_out, row_bytes, all, shares;
  };
  const int64_t all = clips * num_out;
  const Context context{out,     x,         index, num_x,
                        num_out, row_bytes, all,   workers.count < all ? workers.count : all};
  const Part part = [](const void* pointer, int64_t begin, int64_t end) {
    const Context& own = *static_cast<const Context*>(pointer);
    const int64_t last = end * own.all / own.shares;
    for (int64_t row = begin * own.all / own.shares; row < last; ++row) {
      const int64_t clip = row / own.num_out, from = own.index[row % own.num_out];
      char* const to = own.out + row * own.row_bytes;
      if (from < 0)
        std::memset(to, 0, own.row_bytes);
      else
        std::memcpy(to, own.x + (clip * own.num_x + from) * own.row_bytes, own.row_bytes);
    }
  };
  workers.parallel(context.shares, part, &context);
}

}  // namespace videoswin::cpu
