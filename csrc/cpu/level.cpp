// The kernels of one level, as a table.
#include "level.h"

namespace videoswin::cpu::VIDEOSWIN_LEVEL {

#define VIDEOSWIN_NAME(level) #level
#define VIDEOSWIN_NAME_OF(level) VIDEOSWIN_NAME(level)

void attention(const Attention&, void* out, void* log_sum_exp, const Workers&);
void attention_backward(const Attention&, const AttentionGradients&, const Workers&);
void residual_norm(const Norm&, const Residual&, const Workers&);
void residual_norm_backward(const Norm&, const ResidualGradients&, const AffineGradients&,
                            const Workers&);
void patch_merging(const Norm&, const Merging&, Output out, const Workers&);
void patch_merging_backward(const Norm&, const Merging&, Input grad, Output grad_x,
                            const AffineGradients&, const Workers&);
void exponentials(Output values, int64_t count);

extern const Kernels KERNELS;
const Kernels KERNELS = {VIDEOSWIN_NAME_OF(VIDEOSWIN_LEVEL),
                         attention,
                         attention_backward,
                         residual_norm,
                         residual_norm_backward,
                         patch_merging,
                         patch_merging_backward,
                         exponentials};

}  // namespace videoswin::cpu::VIDEOSWIN_LEVEL
