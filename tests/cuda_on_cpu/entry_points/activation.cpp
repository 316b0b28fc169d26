#include "kernels/activation.cu"

using namespace tutelx::kernels;

extern "C" int activation(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
                          int64_t out_stride, int64_t N, int64_t H, int64_t kind, int64_t dtype) {
  const ActivationArguments a{
      gate, up, gate_stride, up_stride, N, H, static_cast<Activation>(kind), static_cast<DType>(dtype)};
  return launch_activation(a, out, out_stride, nullptr);
}

extern "C" int activation_backward(const void* dout, int64_t dout_stride, const void* gate, int64_t gate_stride,
                                   const void* up, int64_t up_stride, void* dgate, int64_t dgate_stride, void* dup,
                                   int64_t dup_stride, int64_t N, int64_t H, int64_t kind, int64_t dtype) {
  const ActivationArguments a{
      gate, up, gate_stride, up_stride, N, H, static_cast<Activation>(kind), static_cast<DType>(dtype)};
  return launch_activation_backward(a, dout, dout_stride, dgate, dgate_stride, dup, dup_stride, nullptr);
}
