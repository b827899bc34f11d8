#include "attention.cuh"

namespace videoswin {

int attention_forward(const Attention& call, void* out, float* log_sum_exp, void* stream) {
  return attention_generic(call, out, log_sum_exp, stream);
}

}  // namespace videoswin
