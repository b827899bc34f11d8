// Every intrinsic that kernels use, alone in a kernel that turns words into words, so that the
// emulation and a device can be compared. No include guard: one program may ask for both.
#ifndef VIDEOSWIN_BUILD
#error "VIDEOSWIN_BUILD says which: native or emulated"
#endif

namespace videoswin {
inline namespace VIDEOSWIN_BUILD {

#define VIDEOSWIN_EXPORT __attribute__((visibility("default")))

VIDEOSWIN_EXPORT int intrinsic_count();
VIDEOSWIN_EXPORT const char* intrinsic_name(int which);

// Words of 32 bits that one run reads and writes.
VIDEOSWIN_EXPORT int intrinsic_words_in(int which);
VIDEOSWIN_EXPORT int intrinsic_words_out(int which);

// Returns 0 or an error number for `launch_error`. The memory is aligned to 16 bytes.
VIDEOSWIN_EXPORT int run_intrinsic(int which, void* out, const void* in, void* stream);

#undef VIDEOSWIN_EXPORT

}  // namespace VIDEOSWIN_BUILD
}  // namespace videoswin
