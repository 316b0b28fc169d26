#include "kernels/decode.cu"

using namespace tutelx::kernels;

extern "C" int decode(const void* rows, const int32_t* dest, const void* weights, void* y, int64_t T, int64_t K,
                      int64_t R, int64_t D, int64_t dtype, int64_t weights_dtype) {
  return launch_decode(rows, dest, weights, y, T, K, R, D, static_cast<DType>(dtype), static_cast<DType>(weights_dtype),
                       nullptr);
}

extern "C" int decode_backward(const void* dy, const void* rows, const int32_t* dest, const int32_t* source,
                               const void* weights, void* drows, void* dweights, int64_t T, int64_t K, int64_t R,
                               int64_t D, int64_t dtype, int64_t weights_dtype) {
  return launch_decode_backward(dy, rows, dest, source, weights, drows, dweights, T, K, R, D, static_cast<DType>(dtype),
                                static_cast<DType>(weights_dtype), nullptr);
}
