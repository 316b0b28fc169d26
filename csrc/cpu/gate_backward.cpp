// The backward of gate, in one pass over the logits.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "gate.h"
#include "parallel.h"
#include "scalar.h"

namespace tutelx {
namespace {

// With s the scores and g = dL/ds: softmax gives s*(g - <g,s>), sigmoid gives g*s*(1-s); logsumexp adds grad*softmax.
// g is grad_sum everywhere, and what comes through its weight besides where an expert was chosen: `chosen` [K].
template <class T, class W>
TUTELX_INLINE void backward_token(const T* row, bool softmax, W logsumexp, W grad_lse, const W* grad_sum,
                                  const int32_t* ids, const W* grad_weights, int64_t K, bool renormalize, W* score,
                                  W* grad, W* chosen, T* out, int64_t E) {
  const int64_t P = padded(E);
  for (int64_t e = 0; e < E; ++e) grad[e] = load(row[e]);
  for (int64_t e = E; e < P; ++e) grad[e] = -std::numeric_limits<W>::infinity();
  if (softmax)
    for (int64_t e = 0; e < P; ++e) score[e] = exp_negative(grad[e] - logsumexp);
  else
    for (int64_t e = 0; e < P; ++e) score[e] = sigmoid(grad[e]);

  W total = 1, mean = 0;
  if (renormalize) {
    total = 0;
    for (int64_t k = 0; k < K; ++k) total += score[ids[k]];
    for (int64_t k = 0; k < K; ++k) mean += total > 0 ? grad_weights[k] * (score[ids[k]] / total) : W(0);
  }
  for (int64_t k = 0; k < K; ++k) chosen[k] = total > 0 ? (grad_weights[k] - mean) / total : W(0);

  if (softmax) {
    W part[kLanes] = {};
    for (int64_t e = 0; e < P; e += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) part[i] += grad_sum[e + i] * score[e + i];
    W dot = sum_lanes(part);
    for (int64_t k = 0; k < K; ++k) dot += chosen[k] * score[ids[k]];
    for (int64_t e = 0; e < P; ++e) grad[e] = score[e] * (grad_sum[e] - dot + grad_lse);
    for (int64_t k = 0; k < K; ++k) grad[ids[k]] += chosen[k] * score[ids[k]];
  } else {
    for (int64_t e = 0; e < P; ++e)
      grad[e] = grad_sum[e] * score[e] * (W(1) - score[e]) + grad_lse * exp_negative(grad[e] - logsumexp);
    for (int64_t k = 0; k < K; ++k) grad[ids[k]] += chosen[k] * score[ids[k]] * (W(1) - score[ids[k]]);
  }
  for (int64_t e = 0; e < E; ++e) out[e] = store<T>(grad[e]);
}

#define TUTELX_BACKWARD_TOKEN(T)                                                                                     \
  TUTELX_SIMD void backward_simd(const T* row, bool softmax, wide_t<T> lse, wide_t<T> grad_lse,                      \
                                 const wide_t<T>* grad_sum, const int32_t* ids, const wide_t<T>* grad_w, int64_t K,  \
                                 bool renorm, wide_t<T>* score, wide_t<T>* grad, wide_t<T>* chosen, T* out,          \
                                 int64_t E) {                                                                        \
    backward_token<T, wide_t<T>>(row, softmax, lse, grad_lse, grad_sum, ids, grad_w, K, renorm, score, grad, chosen, \
                                 out, E);                                                                            \
  }
TUTELX_BACKWARD_TOKEN(float)
TUTELX_BACKWARD_TOKEN(double)
TUTELX_BACKWARD_TOKEN(c10::BFloat16)
TUTELX_BACKWARD_TOKEN(c10::Half)
#undef TUTELX_BACKWARD_TOKEN

at::Tensor gate_backward(const at::Tensor& grad_weights, const at::Tensor& grad_score_sum,
                         const at::Tensor& grad_logsumexp, const at::Tensor& logits, const at::Tensor& expert_ids,
                         const at::Tensor& logsumexp, c10::string_view score, bool renormalize) {
  check_dim(logits, "logits", 2);
  check_dim(expert_ids, "expert_ids", 2);
  check_dtype(expert_ids, "expert_ids", at::kInt);
  const bool softmax = is_softmax(score);
  const int64_t T = logits.size(0), E = logits.size(1), K = expert_ids.size(1);
  check_gate_gradients(grad_weights, grad_score_sum, grad_logsumexp, logits, expert_ids, logsumexp);
  const at::Tensor in = logits.contiguous(), ids = expert_ids.contiguous(), out = at::empty_like(in);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.scalar_type(), "gate_backward", [&] {
    using W = wide_t<scalar_t>;
    const auto dtype = c10::CppTypeToScalarType<W>::value;
    const at::Tensor dw = grad_weights.to(dtype).contiguous(), ds = grad_score_sum.to(dtype).contiguous(),
                     dl = grad_logsumexp.to(dtype).contiguous(), lse = logsumexp.to(dtype).contiguous();
    const scalar_t* in_ptr = in.const_data_ptr<scalar_t>();
    const int32_t* ids_ptr = ids.const_data_ptr<int32_t>();
    const W *dw_ptr = dw.const_data_ptr<W>(), *ds_ptr = ds.const_data_ptr<W>(), *dl_ptr = dl.const_data_ptr<W>(),
            *lse_ptr = lse.const_data_ptr<W>();
    scalar_t* out_ptr = out.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < T * K; ++i)
      TORCH_CHECK_VALUE(ids_ptr[i] >= 0 && ids_ptr[i] < E, "expert_ids[", i / K, ",", i % K, "]=", ids_ptr[i],
                        " is outside [0, num_experts=", E, ")");
    std::vector<W> grad_sum(padded(E), W(0));
    std::copy_n(ds_ptr, E, grad_sum.begin());
    parallel_ranges(T, kTokensPerBlock, [&](int64_t begin, int64_t end) {
      std::vector<W> scores(padded(E)), grad(padded(E)), chosen(K);
      for (int64_t t = begin; t < end; ++t)
        backward_simd(in_ptr + t * E, softmax, lse_ptr[t], dl_ptr[t], grad_sum.data(), ids_ptr + t * K, dw_ptr + t * K,
                      K, renormalize, scores.data(), grad.data(), chosen.data(), out_ptr + t * E, E);
    });
  });
  return out;
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("gate_backward", &tutelx::gate_backward); }
