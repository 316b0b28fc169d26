// decode: y[t] = sum_k weights[t,k] * rows[dest[t,k]]. decode_backward: grad_rows and grad_weights in one read.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "../check.h"
#include "buffers.h"
#include "forward.h"
#include "gather_sum.h"
#include "inverse.h"
#include "pairs.h"
#include "parallel.h"
#include "scalar.h"
#include "stream.h"

namespace tutelx {
void check_weights(const at::Tensor& weights, const at::Tensor& dest, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(weights.sizes() == dest.sizes(), "weights has shape ", weights.sizes(), ", the map has ",
                    dest.sizes());
  TORCH_CHECK_TYPE(weights.scalar_type() == dtype || weights.scalar_type() == at::kFloat, "weights is ",
                   weights.scalar_type(), ", expected ", dtype, " (as rows) or float32");
}

at::Tensor decode(const at::Tensor& rows, const at::Tensor& dest, const at::Tensor& source, const at::Tensor& weights) {
  check_dim(rows, "rows", 2);
  check_floating(rows, "rows");
  check_size(rows, "rows", 0, source.size(0), "the map's rows");
  check_weights(weights, dest, rows.scalar_type());
  return gather_sum(rows, dest, weights);
}

namespace {

constexpr int64_t kSums = 32;  // partial ones, which keep the vector units busy and fix the order of the additions

// One piece: held = weight * grad, and sum += grad * row.
template <class T>
TUTELX_INLINE void scale_and_dot_piece(const T* grad, const T* row, wide_t<T> weight, T* held, wide_t<T>* sum) {
  constexpr int64_t at_once = kPiece / sizeof(T);
  for (int64_t k = 0; k < at_once; k += kSums)
    for (int64_t j = 0; j < kSums; ++j) {
      const wide_t<T> g = load(grad[k + j]);
      sum[j] += g * load(row[k + j]);
      held[k + j] = store<T>(weight * g);
    }
}
TUTELX_INLINE void scale_and_dot_piece(const c10::BFloat16* grad, const c10::BFloat16* row, float weight,
                                       c10::BFloat16* held, float* sum) {
  constexpr int64_t half = kSums / 2;
  for (int64_t k = 0; k < kPiece / 2; k += kSums)
    for (int64_t j = 0; j < half; ++j) {
      const Pair g = load_pair(grad + k + 2 * j), r = load_pair(row + k + 2 * j);
      sum[j] += g.first * r.first;
      sum[j + half] += g.second * r.second;
      store_pair(held + k + 2 * j, weight * g.first, weight * g.second);
    }
}

// One row: out = weight * grad, and the dot product of grad with the row.
template <class T>
TUTELX_INLINE wide_t<T> scale_and_dot(const T* __restrict grad, const T* __restrict row, const T* next,
                                      wide_t<T> weight, T* __restrict out, int64_t D, bool stream) {
  constexpr int64_t at_once = kPiece / sizeof(T);
  wide_t<T> part[kSums] = {};
  int64_t d = 0;
  for (; d + at_once <= D; d += at_once) {
    expect_piece(next + d);
    alignas(64) T held[at_once];
    scale_and_dot_piece(grad + d, row + d, weight, held, part);
    write_piece(out + d, held, stream);
  }
  for (int64_t j = 0; d < D; ++d, j = (j + 1) % kSums) {
    const wide_t<T> g = load(grad[d]);
    part[j] += g * load(row[d]);
    out[d] = store<T>(weight * g);
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

#define TUTELX_SCALE_AND_DOT(T)                                                                                  \
  TUTELX_SIMD wide_t<T> scale_and_dot_simd(const T* grad, const T* row, const T* next, wide_t<T> weight, T* out, \
                                           int64_t D, bool stream) {                                             \
    return scale_and_dot<T>(grad, row, next, weight, out, D, stream);                                            \
  }
TUTELX_SCALE_AND_DOT(float)
TUTELX_SCALE_AND_DOT(double)
TUTELX_SCALE_AND_DOT(c10::BFloat16)
TUTELX_SCALE_AND_DOT(c10::Half)
#undef TUTELX_SCALE_AND_DOT

std::tuple<at::Tensor, at::Tensor> decode_backward(const at::Tensor& grad_y, const at::Tensor& rows,
                                                   const at::Tensor& dest, const at::Tensor& source,
                                                   const at::Tensor& weights) {
  check_dim(grad_y, "grad_y", 2);
  check_dim(rows, "rows", 2);
  check_size(grad_y, "grad_y", 0, dest.size(0), "the map's tokens");
  check_size(grad_y, "grad_y", 1, rows.size(1), "rows.size(1)");
  check_size(rows, "rows", 0, source.size(0), "the map's rows");
  check_dtype(grad_y, "grad_y", rows.scalar_type());
  check_weights(weights, dest, rows.scalar_type());
  const int64_t R = rows.size(0), D = rows.size(1), T = dest.size(0), K = dest.size(1);
  const at::Tensor dy = grad_y.contiguous(), in = rows.contiguous(), from = source.contiguous(), to = dest.contiguous();
  const at::Tensor grad_rows = buffer_like(in);
  at::Tensor grad_weights;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, rows.scalar_type(), "decode_backward", [&] {
    using wide = wide_t<scalar_t>;
    const at::Tensor w = weights.to(c10::CppTypeToScalarType<wide>::value).contiguous();
    const at::Tensor dw = buffer_like(w);
    const scalar_t *dy_ptr = dy.const_data_ptr<scalar_t>(), *in_ptr = in.const_data_ptr<scalar_t>();
    scalar_t* out_ptr = grad_rows.mutable_data_ptr<scalar_t>();
    const wide* w_ptr = w.const_data_ptr<wide>();
    wide* dw_ptr = dw.mutable_data_ptr<wide>();
    const Inverse inverse(to, from);
    const bool stream = streams_rows(R, D * static_cast<int64_t>(sizeof(scalar_t)));
    // By token, so that its gradient comes from memory once for all its rows; then the rows that no slot fills.
    parallel_ranges(T, rows_per_task(D * K * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
      std::fill(dw_ptr + begin * K, dw_ptr + end * K, wide(0));
      inverse.visit(begin, end, [&](int64_t t, int64_t slot, int64_t row) {
        const int64_t after = slot + 1 < end * K ? inverse.row_of(slot + 1) : row;
        dw_ptr[slot] = scale_and_dot_simd(dy_ptr + t * D, in_ptr + row * D, in_ptr + (after < 0 ? row : after) * D,
                                          w_ptr[slot], out_ptr + row * D, D, stream);
      });
      if (stream) finish_streaming();
    });
    inverse.zero_empty(reinterpret_cast<char*>(out_ptr), D * sizeof(scalar_t));
    grad_weights = dw.to(weights.scalar_type());
  });
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("decode", &tutelx::decode);
  m.impl("decode_backward", &tutelx::decode_backward);
}
