#include "gather_sum.h"

#include <ATen/Dispatch.h>

#include "../check.h"
#include "buffers.h"
#include "pairs.h"
#include "parallel.h"
#include "scalar.h"
#include "stream.h"

namespace tutelx {
namespace {

constexpr int64_t kAtOnce = 8;  // rows summed in one sweep over the output

// held[j] = sum_i weight[i] * row[i][d + j] for one piece.
template <int N, class T>
TUTELX_INLINE void sum_piece(const T* const* row, const wide_t<T>* weight, int64_t d, T* held) {
  for (int64_t j = 0; j < kPiece / static_cast<int64_t>(sizeof(T)); ++j) {
    wide_t<T> sum = weight[0] * load(row[0][d + j]);
    for (int i = 1; i < N; ++i) sum += weight[i] * load(row[i][d + j]);
    held[j] = store<T>(sum);
  }
}
template <int N>
TUTELX_INLINE void sum_piece(const c10::BFloat16* const* row, const float* weight, int64_t d, c10::BFloat16* held) {
  for (int64_t j = 0; j < kPiece / 2; j += 2) {
    Pair x = load_pair(row[0] + d + j);
    float first = weight[0] * x.first, second = weight[0] * x.second;
    for (int i = 1; i < N; ++i) {
      x = load_pair(row[i] + d + j);
      first += weight[i] * x.first, second += weight[i] * x.second;
    }
    store_pair(held + j, first, second);
  }
}

// out[d] = sum_i weight[i] * row[i][d]. One sweep for each count of rows, so that the compiler keeps the sum in a
// register and the output is written once. Meanwhile the rows of `next` are asked for.
template <int N, class T>
TUTELX_INLINE void sum_rows(const T* const* row, const wide_t<T>* weight, const T* const* next, T* __restrict out,
                            int64_t D, bool stream) {
  constexpr int64_t at_once = kPiece / sizeof(T);
  int64_t d = 0;
  for (; d + at_once <= D; d += at_once) {
    for (int i = 0; i < N; ++i) expect_piece(next[i] + d);
    alignas(64) T held[at_once];
    sum_piece<N>(row, weight, d, held);
    write_piece(out + d, held, stream);
  }
  for (; d < D; ++d) {
    wide_t<T> sum = weight[0] * load(row[0][d]);
    for (int i = 1; i < N; ++i) sum += weight[i] * load(row[i][d]);
    out[d] = store<T>(sum);
  }
}

template <class T>
TUTELX_INLINE void sum_many(const T* const* row, const wide_t<T>* weight, int64_t n, wide_t<T>* __restrict wide,
                            T* __restrict out, int64_t D) {
  for (int64_t d = 0; d < D; ++d) wide[d] = weight[0] * load(row[0][d]);
  for (int64_t i = 1; i < n; ++i)
    for (int64_t d = 0; d < D; ++d) wide[d] += weight[i] * load(row[i][d]);
  for (int64_t d = 0; d < D; ++d) out[d] = store<T>(wide[d]);
}

template <class T>
TUTELX_INLINE void sum_token(const T* const* row, const wide_t<T>* weight, const T* const* next, int64_t n,
                             wide_t<T>* wide, T* out, int64_t D, bool stream) {
  switch (n) {
    case 0:
      std::fill_n(out, D, store<T>(0));
      return;
    case 1:
      sum_rows<1>(row, weight, next, out, D, stream);
      return;
    case 2:
      sum_rows<2>(row, weight, next, out, D, stream);
      return;
    case 3:
      sum_rows<3>(row, weight, next, out, D, stream);
      return;
    case 4:
      sum_rows<4>(row, weight, next, out, D, stream);
      return;
    case 5:
      sum_rows<5>(row, weight, next, out, D, stream);
      return;
    case 6:
      sum_rows<6>(row, weight, next, out, D, stream);
      return;
    case 7:
      sum_rows<7>(row, weight, next, out, D, stream);
      return;
    case kAtOnce:
      sum_rows<kAtOnce>(row, weight, next, out, D, stream);
      return;
    default:
      sum_many(row, weight, n, wide, out, D);
  }
}

// Function multi-versioning does not reach templates, hence one plain function a type.
#define TUTELX_SUM_TOKEN(T)                                                                                      \
  TUTELX_SIMD void sum_token_simd(const T* const* row, const wide_t<T>* weight, const T* const* next, int64_t n, \
                                  wide_t<T>* wide, T* out, int64_t D, bool stream) {                             \
    sum_token<T>(row, weight, next, n, wide, out, D, stream);                                                    \
  }
TUTELX_SUM_TOKEN(float)
TUTELX_SUM_TOKEN(double)
TUTELX_SUM_TOKEN(c10::BFloat16)
TUTELX_SUM_TOKEN(c10::Half)
#undef TUTELX_SUM_TOKEN

template <class T>
void sum_tokens(const at::Tensor& rows, const at::Tensor& dest, const at::Tensor& weights, const at::Tensor& out,
                int64_t begin, int64_t end) {
  const int64_t K = dest.size(1), R = rows.size(0), D = rows.size(1);
  const T* in = rows.const_data_ptr<T>();
  const int32_t* to = dest.const_data_ptr<int32_t>();
  const wide_t<T>* w = weights.defined() ? weights.const_data_ptr<wide_t<T>>() : nullptr;
  T* y = out.mutable_data_ptr<T>();
  const bool stream = streams_rows(out.size(0), D * static_cast<int64_t>(sizeof(T)));
  std::vector<const T*> row(K), next(K);
  std::vector<wide_t<T>> weight(K), wide(K > kAtOnce ? D : 0);
  for (int64_t t = begin; t < end; ++t) {
    int64_t n = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int32_t r = to[t * K + k];
      TORCH_CHECK_VALUE(r < R, "dest[", t, ",", k, "]=", r, " is outside the ", R, " rows");
      if (r < 0) continue;
      row[n] = next[n] = in + r * D;
      weight[n++] = w ? w[t * K + k] : wide_t<T>(1);
    }
    for (int64_t k = 0; k < n && t + 1 < end; ++k) {
      const int32_t r = to[(t + 1) * K + k];
      if (r >= 0 && r < R) next[k] = in + r * D;
    }
    sum_token_simd(row.data(), weight.data(), next.data(), n, wide.data(), y + t * D, D, stream);
  }
  if (stream) finish_streaming();
}

}  // namespace

GatherSum::GatherSum(const at::Tensor& dest, const std::optional<at::Tensor>& weights, int64_t dim,
                     at::TensorOptions options) {
  check_dim(dest, "dest", 2);
  check_dtype(dest, "dest", at::kInt);
  dest_ = dest.contiguous();
  out_ = buffer({dest.size(0), dim}, options);
  const auto dtype = out_.scalar_type();
  if (weights) weights_ = weights->to(dtype == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

void GatherSum::tokens(const at::Tensor& rows, int64_t begin, int64_t end) const {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out_.scalar_type(), "gather_sum",
                                  [&] { sum_tokens<scalar_t>(rows, dest_, weights_, out_, begin, end); });
}

at::Tensor gather_sum(const at::Tensor& rows, const at::Tensor& dest, const std::optional<at::Tensor>& weights) {
  const GatherSum sum(dest, weights, rows.size(1), rows.options());
  const at::Tensor in = rows.contiguous();
  parallel_ranges(dest.size(0), rows_per_task(rows.size(1) * dest.size(1) * rows.element_size()),
                  [&](int64_t begin, int64_t end) { sum.tokens(in, begin, end); });
  return sum.out();
}

}  // namespace tutelx
