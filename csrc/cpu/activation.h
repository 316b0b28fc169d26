// Element-wise activations and their derivatives, written so that the compiler turns the loops into vector code.
#pragma once
#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>

#include "scalar.h"

namespace tutelx {

// exp within 2 ulp: split x = n*ln2 + r, polynomial in r (Cephes coefficients), scale by 2^n through the exponent bits.
TUTELX_INLINE float fast_exp(float x) {
  constexpr float lowest = -87.33654f, highest = 88.72283f;
  float v = x > lowest ? x : lowest;
  v = v < highest ? v : highest;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting rounds to an integer
  float n = v * 1.44269504f + round;
  n -= round;
  const float r = v - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, so that n = 128 does not overflow the exponent field.
  const int32_t half = static_cast<int32_t>(n) >> 1, rest = static_cast<int32_t>(n) - half;
  const int32_t bits_half = (half + 127) << 23, bits_rest = (rest + 127) << 23;
  float scale_half, scale_rest;
  std::memcpy(&scale_half, &bits_half, sizeof scale_half);
  std::memcpy(&scale_rest, &bits_rest, sizeof scale_rest);
  float out = p * scale_half * scale_rest;
  out = x < lowest ? 0.0f : out;
  out = x > highest ? INFINITY : out;
  return x == x ? out : x;
}
TUTELX_INLINE double fast_exp(double x) { return std::exp(x); }

// Each activation gives value and derivative at x.
struct Silu {
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x / (W(1) + fast_exp(-x));
  }
  template <class W>
  static TUTELX_INLINE W slope(W x) {
    const W s = W(1) / (W(1) + fast_exp(-x));
    return s * (W(1) + x * (W(1) - s));
  }
};
struct Gelu {
  template <class W>
  static TUTELX_INLINE W cdf(W x) {
    return W(0.5) * (W(1) + std::erf(x * W(M_SQRT1_2)));
  }
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x * cdf(x);
  }
  template <class W>
  static TUTELX_INLINE W slope(W x) {
    return cdf(x) + x * fast_exp(W(-0.5) * x * x) * W(0.3989422804014327);  // 1/sqrt(2 pi)
  }
};
// gelu's tanh form is x * sigmoid(2 u(x)) with u = sqrt(2/pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr double a = 1.5957691216057308, b = 0.044715;  // a = 2 sqrt(2/pi)
  template <class W>
  static TUTELX_INLINE W gate(W x) {
    return W(1) / (W(1) + fast_exp(-W(a) * (x + W(b) * x * x * x)));
  }
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x * gate(x);
  }
  template <class W>
  static TUTELX_INLINE W slope(W x) {
    const W s = gate(x);
    return s + x * s * (W(1) - s) * W(a) * (W(1) + W(3 * b) * x * x);
  }
};
struct Relu {
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x > W(0) || x != x ? x : W(0);
  }
  template <class W>
  static TUTELX_INLINE W slope(W x) {
    return x > W(0) ? W(1) : W(0);
  }
};

enum class Act { silu, gelu, gelu_tanh, relu };

inline Act parse_activation(std::string_view kind) {
  if (kind == "silu") return Act::silu;
  if (kind == "gelu") return Act::gelu;
  if (kind == "gelu_tanh") return Act::gelu_tanh;
  if (kind == "relu") return Act::relu;
  TORCH_CHECK_VALUE(false, "activation='", kind, "' is none of silu, gelu, gelu_tanh, relu");
}

// Calls fn with the activation as a type.
template <class Fn>
TUTELX_INLINE void with_activation(Act act, const Fn& fn) {
  switch (act) {
    case Act::silu:
      return fn(Silu{});
    case Act::gelu:
      return fn(Gelu{});
    case Act::gelu_tanh:
      return fn(GeluTanh{});
    case Act::relu:
      return fn(Relu{});
  }
}

// out = act(gate) * up over n elements; up null: act(gate) alone.
template <class T>
void activate(Act act, const T* gate, const T* up, T* out, int64_t n);

// From grad = d(out): grad_gate, grad_up (both may alias grad) and, if asked for, out itself again.
template <class T>
void activate_backward(Act act, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, T* out, int64_t n);

}  // namespace tutelx
