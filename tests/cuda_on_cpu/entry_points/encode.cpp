#include "kernels/encode.cu"

using namespace tutelx::kernels;

extern "C" int encode(const void* x, const int32_t* dest, const int32_t* source, void* rows, int64_t T, int64_t K,
                      int64_t R, int64_t D, int64_t dtype) {
  return launch_encode(x, dest, source, rows, T, K, R, D, static_cast<DType>(dtype), nullptr);
}

extern "C" int encode_backward(const void* drows, const int32_t* dest, void* dx, int64_t T, int64_t K, int64_t R,
                               int64_t D, int64_t dtype) {
  return launch_encode_backward(drows, dest, dx, T, K, R, D, static_cast<DType>(dtype), nullptr);
}
