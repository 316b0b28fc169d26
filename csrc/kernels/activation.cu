// activation: act(gate) * up, or act(gate) alone, and the gradients of both.
#include "row_teams.cuh"

namespace tutelx::kernels {
namespace {

// Value and slope of each activation, in the accumulation type.
template <Activation kind, class A>
struct Act;

template <class A>
struct Act<Activation::silu, A> {
  static __device__ __forceinline__ A value(A x) { return x * sigmoid(x); }
  static __device__ __forceinline__ A slope(A x) {
    const A s = sigmoid(x);
    return s * (A(1) + x * (A(1) - s));
  }
};

template <class A>
struct Act<Activation::gelu, A> {
  static __device__ __forceinline__ A cdf(A x) { return A(0.5) * (A(1) + erf(x * A(0.70710678118654752))); }
  static __device__ __forceinline__ A value(A x) { return x * cdf(x); }
  static __device__ __forceinline__ A slope(A x) { return cdf(x) + x * A(0.39894228040143268) * exp(A(-0.5) * x * x); }
};

// The tanh form is x * sigmoid(2u) with u = sqrt(2/pi) * (x + 0.044715 x^3).
template <class A>
struct Act<Activation::gelu_tanh, A> {
  static __device__ __forceinline__ A gate(A x) {
    return sigmoid(A(1.5957691216057308) * (x + A(0.044715) * x * x * x));
  }
  static __device__ __forceinline__ A value(A x) { return x * gate(x); }
  static __device__ __forceinline__ A slope(A x) {
    const A s = gate(x);
    return s + x * s * (A(1) - s) * A(1.5957691216057308) * (A(1) + A(3 * 0.044715) * x * x);
  }
};

template <class A>
struct Act<Activation::relu, A> {
  static __device__ __forceinline__ A value(A x) { return x < A(0) ? A(0) : x; }  // NaN stays NaN
  static __device__ __forceinline__ A slope(A x) { return x > A(0) ? A(1) : A(0); }
};

template <class T>
struct Operand {
  T* data;
  int64_t stride;

  __device__ __forceinline__ T* at(int64_t row, int64_t h) const { return data + row * stride + h; }
};

template <class T, Activation kind, int W>
__global__ void __launch_bounds__(kTeamBlock)
    activation_kernel(Operand<const T> gate, Operand<const T> up, Operand<T> out, int64_t N, Teams teams) {
  using F = Act<kind, Acc<T>>;
  const bool gated = up.data != nullptr;  // the same for all: cheaper than twice the kernels
  const int64_t row = team_row(teams);
  if (row >= N) return;
#pragma unroll 2
  for (int v = team_rank(teams); v < teams.vectors; v += teams.size) {
    const int64_t h = static_cast<int64_t>(v) * W;
    const Vector<T, W> g = load<T, W>(gate.at(row, h));
    Vector<T, W> u = zero_vector<T, W>(), result;
    if (gated) u = load<T, W>(up.at(row, h));
#pragma unroll
    for (int w = 0; w < W; ++w) {
      Acc<T> y = F::value(widen(g.at[w]));
      if (gated) y *= widen(u.at[w]);
      result.at[w] = narrow<T>(y);
    }
    store<T, W>(out.at(row, h), result);
  }
}

template <class T, Activation kind, int W>
__global__ void __launch_bounds__(kTeamBlock)
    activation_backward_kernel(Operand<const T> dout, Operand<const T> gate, Operand<const T> up, Operand<T> dgate,
                               Operand<T> dup, int64_t N, Teams teams) {
  using A = Acc<T>;
  using F = Act<kind, A>;
  const bool gated = up.data != nullptr;  // the same for all: cheaper than twice the kernels
  const int64_t row = team_row(teams);
  if (row >= N) return;
  for (int v = team_rank(teams); v < teams.vectors; v += teams.size) {
    const int64_t h = static_cast<int64_t>(v) * W;
    const Vector<T, W> d = load<T, W>(dout.at(row, h)), g = load<T, W>(gate.at(row, h));
    Vector<T, W> u = zero_vector<T, W>(), for_gate, for_up = u;
    if (gated) u = load<T, W>(up.at(row, h));
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A x = widen(g.at[w]), dy = widen(d.at[w]);
      A dvalue = dy;
      if (gated) {
        dvalue *= widen(u.at[w]);
        for_up.at[w] = narrow<T>(dy * F::value(x));
      }
      for_gate.at[w] = narrow<T>(dvalue * F::slope(x));
    }
    store<T, W>(dgate.at(row, h), for_gate);
    if (gated) store<T, W>(dup.at(row, h), for_up);
  }
}

// ---- Launch --------------------------------------------------------------------------------------------------------

template <Activation kind>
struct Kind {
  static constexpr Activation value = kind;
};

// Calls launch(Kind<kind>()).
template <class Launch>
cudaError_t with_kind(Activation kind, const Launch& launch) {
  switch (kind) {
    case Activation::silu:
      return launch(Kind<Activation::silu>());
    case Activation::gelu:
      return launch(Kind<Activation::gelu>());
    case Activation::gelu_tanh:
      return launch(Kind<Activation::gelu_tanh>());
    case Activation::relu:
      return launch(Kind<Activation::relu>());
  }
  return cudaErrorInvalidValue;
}

// Rows of 16-byte vectors need a stride of whole vectors as well.
template <class T>
bool rows_aligned(const void* p, int64_t stride) {
  return p == nullptr || (aligned(p) && stride * sizeof(T) % kVectorBytes == 0);
}

template <class T>
Operand<const T> operand(const void* p, int64_t stride) {
  return {static_cast<const T*>(p), stride};
}
template <class T>
Operand<T> operand(void* p, int64_t stride) {
  return {static_cast<T*>(p), stride};
}

}  // namespace

cudaError_t launch_activation(const ActivationArguments& a, void* out, int64_t out_stride, cudaStream_t stream) {
  if (!team_sizes_ok(a.N, a.H)) return cudaErrorInvalidValue;
  if (a.N == 0 || a.H == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto type) {
    using T = TypeIn<decltype(type)>;
    const bool all_aligned = rows_aligned<T>(a.gate, a.gate_stride) && rows_aligned<T>(a.up, a.up_stride) &&
                             rows_aligned<T>(out, out_stride);
    return with_width<T>(a.H, all_aligned, [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Teams teams = teams_for(a.H / W);
      return with_kind(a.kind, [&](auto kind) {
        TUTELX_LAUNCH((activation_kernel<T, decltype(kind)::value, W>), team_blocks(a.N, teams), kTeamBlock, 0, stream)
        (operand<T>(a.gate, a.gate_stride), operand<T>(a.up, a.up_stride), operand<T>(out, out_stride), a.N, teams);
        return cudaGetLastError();
      });
    });
  });
}

cudaError_t launch_activation_backward(const ActivationArguments& a, const void* dout, int64_t dout_stride, void* dgate,
                                       int64_t dgate_stride, void* dup, int64_t dup_stride, cudaStream_t stream) {
  if (!team_sizes_ok(a.N, a.H)) return cudaErrorInvalidValue;
  if (a.N == 0 || a.H == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto type) {
    using T = TypeIn<decltype(type)>;
    const bool all_aligned = rows_aligned<T>(a.gate, a.gate_stride) && rows_aligned<T>(a.up, a.up_stride) &&
                             rows_aligned<T>(dout, dout_stride) && rows_aligned<T>(dgate, dgate_stride) &&
                             rows_aligned<T>(dup, dup_stride);
    return with_width<T>(a.H, all_aligned, [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Teams teams = teams_for(a.H / W);
      return with_kind(a.kind, [&](auto kind) {
        TUTELX_LAUNCH((activation_backward_kernel<T, decltype(kind)::value, W>), team_blocks(a.N, teams), kTeamBlock, 0,
                      stream)
        (operand<T>(dout, dout_stride), operand<T>(a.gate, a.gate_stride), operand<T>(a.up, a.up_stride),
         operand<T>(dgate, dgate_stride), operand<T>(dup, dup_stride), a.N, teams);
        return cudaGetLastError();
      });
    });
  });
}

}  // namespace tutelx::kernels
