// Element-wise activations and their derivatives, written so that the compiler turns the loops into vector code.
#pragma once
#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>

#include "scalar.h"

namespace tutelx {

// exp within 2 ulp for x <= 0, or NaN: x = n*ln2 + r, polynomial in r (Cephes coefficients), scaled by 2^n through the
// exponent bits. All that is needed here: softmax is relative to its largest logit, the others use symmetry.
TUTELX_INLINE float exp_negative(float x) {
  constexpr float lowest = -87.0f;      // 2^n stays a normal number
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting rounds to an integer
  const float v = x < lowest ? lowest : x;
  const float n = (v * 1.44269504f + round) - round;
  const float r = v - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < lowest ? 0.0f : p * scale;
}
TUTELX_INLINE double exp_negative(double x) { return std::exp(x); }

template <class W>
TUTELX_INLINE W sigmoid(W x) {
  const W e = exp_negative(x < W(0) ? x : -x);
  return (x < W(0) ? e : W(1)) / (W(1) + e);
}

template <class W>
struct ValueAndSlope {
  W value, slope;
};

// The normal distribution function and exp(-x^2/2). In float erfc is fitted as in Abramowitz and Stegun 7.1.26 (error
// below 1.5e-7), which takes one exponential for both.
struct Normal {
  template <class W>
  struct Pair {
    W cdf, bell;
  };
  static TUTELX_INLINE Pair<float> at(float x) {
    const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * (x < 0.0f ? -x : x));
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float bell = exp_negative(-0.5f * x * x), tail = 0.5f * t * p * bell;
    return {x < 0.0f ? tail : 1.0f - tail, bell};
  }
  static TUTELX_INLINE Pair<double> at(double x) { return {0.5 * std::erfc(-x * M_SQRT1_2), std::exp(-0.5 * x * x)}; }
};

// Each activation gives its value at x, or value and derivative together.
struct Silu {
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x * sigmoid(x);
  }
  template <class W>
  static TUTELX_INLINE ValueAndSlope<W> both(W x) {
    const W s = sigmoid(x);
    return {x * s, s * (W(1) + x * (W(1) - s))};
  }
};
struct Gelu {
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x * Normal::at(x).cdf;
  }
  template <class W>
  static TUTELX_INLINE ValueAndSlope<W> both(W x) {
    const auto [cdf, bell] = Normal::at(x);
    return {x * cdf, cdf + x * bell * W(0.3989422804014327)};  // 1/sqrt(2 pi)
  }
};
// gelu's tanh form is x * sigmoid(2 u(x)) with u = sqrt(2/pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr double a = 1.5957691216057308, b = 0.044715;  // a = 2 sqrt(2/pi)
  template <class W>
  static TUTELX_INLINE W gate(W x) {
    return sigmoid(W(a) * (x + W(b) * x * x * x));
  }
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x * gate(x);
  }
  template <class W>
  static TUTELX_INLINE ValueAndSlope<W> both(W x) {
    const W s = gate(x);
    return {x * s, s + x * s * (W(1) - s) * W(a) * (W(1) + W(3 * b) * x * x)};
  }
};
struct Relu {
  template <class W>
  static TUTELX_INLINE W value(W x) {
    return x > W(0) || x != x ? x : W(0);
  }
  template <class W>
  static TUTELX_INLINE ValueAndSlope<W> both(W x) {
    return {value(x), x > W(0) ? W(1) : W(0)};
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
