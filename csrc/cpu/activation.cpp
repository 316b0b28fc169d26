// activation: act(gate) * up, or act(gate) alone, and its backward; one pass each.
#include "activation.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>

#include "../check.h"
#include "buffers.h"
#include "parallel.h"

namespace tutelx {
namespace {

template <class A, class T>
TUTELX_INLINE void forward_loop(const T* __restrict gate, const T* __restrict up, T* out, int64_t n) {
  if (up)
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(A::value(load(gate[i])) * load(up[i]));
  else
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(A::value(load(gate[i])));
}

// Where the loops may write over their inputs: element i is read before it is written, and nothing else is read.
#define TUTELX_IVDEP _Pragma("GCC ivdep")

// Which of the outputs there are is decided outside the loops, or they would not become vector code.
template <class A, class T>
TUTELX_INLINE void backward_gated(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t n) {
  TUTELX_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const wide_t<T> g = load(gate[i]), d = load(grad[i]), u = load(up[i]);
    const auto [value, slope] = A::both(g);
    grad_up[i] = store<T>(d * value);
    grad_gate[i] = store<T>(d * u * slope);
  }
}
template <class A, class T>
TUTELX_INLINE void backward_gated_again(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, T* out,
                                        int64_t n) {
  TUTELX_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const wide_t<T> g = load(gate[i]), d = load(grad[i]), u = load(up[i]);
    const auto [value, slope] = A::both(g);
    out[i] = store<T>(value * u);
    grad_up[i] = store<T>(d * value);
    grad_gate[i] = store<T>(d * u * slope);
  }
}
template <class A, class T>
TUTELX_INLINE void backward_plain(const T* grad, const T* gate, T* grad_gate, int64_t n) {
  TUTELX_IVDEP
  for (int64_t i = 0; i < n; ++i) grad_gate[i] = store<T>(load(grad[i]) * A::both(load(gate[i])).slope);
}
template <class A, class T>
TUTELX_INLINE void backward_plain_again(const T* grad, const T* gate, T* grad_gate, T* out, int64_t n) {
  TUTELX_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const wide_t<T> d = load(grad[i]);
    const auto [value, slope] = A::both(load(gate[i]));
    out[i] = store<T>(value);
    grad_gate[i] = store<T>(d * slope);
  }
}

// Function multi-versioning does not reach templates, hence plain functions a type.
#define TUTELX_ACTIVATION(T)                                                                                           \
  TUTELX_SIMD void forward_simd(Act act, const T* gate, const T* up, T* out, int64_t n) {                              \
    with_activation(act, [=](auto a) __attribute__((always_inline)) { forward_loop<decltype(a)>(gate, up, out, n); }); \
  }                                                                                                                    \
  TUTELX_SIMD void backward_simd(Act act, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, T* out, \
                                 int64_t n) {                                                                          \
    with_activation(act, [=](auto a) __attribute__((always_inline)) {                                                  \
      using A = decltype(a);                                                                                           \
      if (up && out)                                                                                                   \
        backward_gated_again<A>(grad, gate, up, grad_gate, grad_up, out, n);                                           \
      else if (up)                                                                                                     \
        backward_gated<A>(grad, gate, up, grad_gate, grad_up, n);                                                      \
      else if (out)                                                                                                    \
        backward_plain_again<A>(grad, gate, grad_gate, out, n);                                                        \
      else                                                                                                             \
        backward_plain<A>(grad, gate, grad_gate, n);                                                                   \
    });                                                                                                                \
  }
TUTELX_ACTIVATION(float)
TUTELX_ACTIVATION(double)
TUTELX_ACTIVATION(c10::BFloat16)
TUTELX_ACTIVATION(c10::Half)
#undef TUTELX_ACTIVATION
#undef TUTELX_IVDEP

constexpr int64_t kGrain = 16384;

void check_up(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  if (!up) return;
  TORCH_CHECK_VALUE(up->sizes() == gate.sizes(), "up has shape ", up->sizes(), ", gate has ", gate.sizes());
  check_dtype(*up, "up", gate.scalar_type());
}

at::Tensor activation(const at::Tensor& gate, const std::optional<at::Tensor>& up, c10::string_view kind) {
  check_floating(gate, "gate");
  check_up(gate, up);
  const Act act = parse_activation(kind);
  const at::Tensor g = gate.contiguous(), u = up ? up->contiguous() : at::Tensor();
  const at::Tensor out = buffer_like(g);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate.scalar_type(), "activation", [&] {
    const scalar_t* g_ptr = g.const_data_ptr<scalar_t>();
    const scalar_t* u_ptr = up ? u.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* out_ptr = out.mutable_data_ptr<scalar_t>();
    parallel_ranges(g.numel(), kGrain, [&](int64_t begin, int64_t end) {
      forward_simd(act, g_ptr + begin, u_ptr ? u_ptr + begin : nullptr, out_ptr + begin, end - begin);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> activation_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                       const std::optional<at::Tensor>& up, c10::string_view kind) {
  check_up(gate, up);
  TORCH_CHECK_VALUE(grad.sizes() == gate.sizes(), "grad has shape ", grad.sizes(), ", gate has ", gate.sizes());
  check_dtype(grad, "grad", gate.scalar_type());
  const Act act = parse_activation(kind);
  const at::Tensor d = grad.contiguous(), g = gate.contiguous(), u = up ? up->contiguous() : at::Tensor();
  const at::Tensor grad_gate = buffer_like(g), grad_up = up ? buffer_like(g) : buffer({0}, g.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate.scalar_type(), "activation_backward", [&] {
    const scalar_t *d_ptr = d.const_data_ptr<scalar_t>(), *g_ptr = g.const_data_ptr<scalar_t>();
    const scalar_t* u_ptr = up ? u.const_data_ptr<scalar_t>() : nullptr;
    scalar_t *dg_ptr = grad_gate.mutable_data_ptr<scalar_t>(), *du_ptr = grad_up.mutable_data_ptr<scalar_t>();
    parallel_ranges(g.numel(), kGrain, [&](int64_t begin, int64_t end) {
      backward_simd(act, d_ptr + begin, g_ptr + begin, u_ptr ? u_ptr + begin : nullptr, dg_ptr + begin, du_ptr + begin,
                    static_cast<scalar_t*>(nullptr), end - begin);
    });
  });
  return {grad_gate, grad_up};
}

}  // namespace

template <class T>
void activate(Act act, const T* gate, const T* up, T* out, int64_t n) {
  forward_simd(act, gate, up, out, n);
}
template <class T>
void activate_backward(Act act, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, T* out,
                       int64_t n) {
  backward_simd(act, grad, gate, up, grad_gate, grad_up, out, n);
}
#define TUTELX_INSTANTIATE(T)                                      \
  template void activate<T>(Act, const T*, const T*, T*, int64_t); \
  template void activate_backward<T>(Act, const T*, const T*, const T*, T*, T*, T*, int64_t);
TUTELX_INSTANTIATE(float)
TUTELX_INSTANTIATE(double)
TUTELX_INSTANTIATE(c10::BFloat16)
TUTELX_INSTANTIATE(c10::Half)
#undef TUTELX_INSTANTIATE

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("activation", &tutelx::activation);
  m.impl("activation_backward", &tutelx::activation_backward);
}
