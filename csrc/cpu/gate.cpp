// gate: scores (softmax or sigmoid), the k best, their weights, and what the losses need, in one pass over the logits.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "parallel.h"
#include "scalar.h"

namespace tutelx {
namespace {

constexpr int64_t kTokensPerBlock = 256;  // fixed, so that score_sum adds up in the same order for any thread count

bool parse_score(c10::string_view score) {
  TORCH_CHECK_VALUE(score == "softmax" || score == "sigmoid", "score='", score, "' is neither softmax nor sigmoid");
  return score == "softmax";
}

template <class T, class W>
TUTELX_INLINE W widen_and_max(const T* logits, W* wide, int64_t E) {
  W best = -std::numeric_limits<W>::infinity();
  for (int64_t e = 0; e < E; ++e) {
    wide[e] = load(logits[e]);
    best = wide[e] > best ? wide[e] : best;
  }
  return best;
}

// prob[e] = exp(logit[e] - best); returns the sum. Partial sums, so that the additions run in vector lanes.
template <class W>
TUTELX_INLINE W exponentials(const W* logit, W best, W* prob, int64_t E) {
  constexpr int64_t N = 16;
  W part[N] = {};
  int64_t e = 0;
  for (; e + N <= E; e += N)
    for (int64_t i = 0; i < N; ++i) part[i] += prob[e + i] = fast_exp(logit[e + i] - best);
  for (int64_t i = 0; e < E; ++e, ++i) part[i] += prob[e] = fast_exp(logit[e] - best);
  for (int64_t half = N / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

template <class W>
TUTELX_INLINE void scale_into(W* score, W factor, W* sum, int64_t E) {
  for (int64_t e = 0; e < E; ++e) sum[e] += score[e] *= factor;
}

template <class W>
TUTELX_INLINE void sigmoids_into(const W* logit, W* score, W* sum, int64_t E) {
  for (int64_t e = 0; e < E; ++e) sum[e] += score[e] = W(1) / (W(1) + fast_exp(-logit[e]));
}

// Scores of one token. Returns logsumexp; a value that is not finite marks a row that cannot be routed.
template <class T, class W>
TUTELX_INLINE W score_token(const T* logits, bool softmax, W* logit, W* score, W* sum, int64_t E) {
  const W best = widen_and_max(logits, logit, E);
  const W total = exponentials(logit, best, score, E);
  if (softmax)
    scale_into(score, W(1) / total, sum, E);
  else
    sigmoids_into(logit, score, sum, E);
  return best + std::log(total);
}

#define TUTELX_SCORE_TOKEN(T)                                                                               \
  TUTELX_SIMD wide_t<T> score_token_simd(const T* logits, bool softmax, wide_t<T>* logit, wide_t<T>* score, \
                                         wide_t<T>* sum, int64_t E) {                                       \
    return score_token<T, wide_t<T>>(logits, softmax, logit, score, sum, E);                                \
  }
TUTELX_SCORE_TOKEN(float)
TUTELX_SCORE_TOKEN(double)
TUTELX_SCORE_TOKEN(c10::BFloat16)
TUTELX_SCORE_TOKEN(c10::Half)
#undef TUTELX_SCORE_TOKEN

// The k largest logits, largest first; of equal ones the lower index first.
template <class W>
void choose(const W* logit, int64_t E, int64_t K, int32_t* ids, std::vector<int32_t>& scratch) {
  const auto before = [logit](int32_t a, int32_t b) { return logit[a] > logit[b] || (logit[a] == logit[b] && a < b); };
  constexpr int64_t few = 16;
  if (K > few) {
    scratch.resize(E);
    for (int64_t e = 0; e < E; ++e) scratch[e] = static_cast<int32_t>(e);
    std::partial_sort(scratch.begin(), scratch.begin() + K, scratch.end(), before);
    std::copy_n(scratch.begin(), K, ids);
    return;
  }
  int64_t held = 0;
  W worst = 0;  // of the ids held; a candidate must beat it once K are held
  for (int32_t e = 0; e < E; ++e) {
    if (held == K && !(logit[e] > worst)) continue;
    int64_t i = held < K ? held++ : K - 1;
    for (; i > 0 && logit[ids[i - 1]] < logit[e]; --i) ids[i] = ids[i - 1];
    ids[i] = e;
    worst = logit[ids[held - 1]];
  }
}

template <class W>
void check_row(const W* logit, W logsumexp, int64_t token, int64_t E) {
  if (std::isfinite(logsumexp)) return;
  for (int64_t e = 0; e < E; ++e)
    TORCH_CHECK_VALUE(logit[e] < std::numeric_limits<W>::infinity(), "logits[", token, ",", e, "]=", logit[e],
                      " is not a number the gate can compare");
  TORCH_CHECK_VALUE(false, "logits[", token, "] has no finite entry among its ", E, " experts");
}

using Chosen = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Chosen gate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize) {
  check_dim(logits, "logits", 2);
  const bool softmax = parse_score(score);
  const int64_t T = logits.size(0), E = logits.size(1);
  TORCH_CHECK_VALUE(E > 0, "logits.size(1)=", E, " must be at least 1 expert");
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "top_k=", k, " is outside [1, num_experts=", E, "]");
  check_index_range(T * k, "T*K");
  const at::Tensor in = logits.contiguous();
  at::Tensor ids = at::empty({T, k}, in.options().dtype(at::kInt)), weights, score_sum, logsumexp;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.scalar_type(), "gate", [&] {
    using W = wide_t<scalar_t>;
    const auto wide = in.options().dtype(c10::CppTypeToScalarType<W>::value);
    weights = at::empty({T, k}, wide);
    logsumexp = at::empty({T}, wide);
    const int64_t blocks = (T + kTokensPerBlock - 1) / kTokensPerBlock;
    std::vector<W> sums(blocks * E, W(0));
    const scalar_t* in_ptr = in.const_data_ptr<scalar_t>();
    int32_t* ids_ptr = ids.mutable_data_ptr<int32_t>();
    W *w_ptr = weights.mutable_data_ptr<W>(), *lse_ptr = logsumexp.mutable_data_ptr<W>();
    parallel_items(blocks, [&](int64_t b) {
      std::vector<W> logit(E), scores(E);
      std::vector<int32_t> scratch;
      const int64_t end = std::min(T, (b + 1) * kTokensPerBlock);
      for (int64_t t = b * kTokensPerBlock; t < end; ++t) {
        lse_ptr[t] = score_token_simd(in_ptr + t * E, softmax, logit.data(), scores.data(), sums.data() + b * E, E);
        check_row(logit.data(), lse_ptr[t], t, E);
        choose(logit.data(), E, k, ids_ptr + t * k, scratch);
        W total = 0;
        for (int64_t i = 0; i < k; ++i) total += w_ptr[t * k + i] = scores[ids_ptr[t * k + i]];
        // All chosen scores can underflow (sigmoid of very negative logits); zero weights then, not 0/0.
        if (renormalize && total > 0)
          for (int64_t i = 0; i < k; ++i) w_ptr[t * k + i] /= total;
      }
    });
    score_sum = at::zeros({E}, wide);
    W* sum_ptr = score_sum.mutable_data_ptr<W>();
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t e = 0; e < E; ++e) sum_ptr[e] += sums[b * E + e];
  });
  return {ids, weights, score_sum, logsumexp};
}

// With s the scores and g = dL/ds: softmax gives s*(g - <g,s>), sigmoid gives g*s*(1-s); logsumexp adds grad*softmax.
template <class T, class W>
TUTELX_INLINE void backward_token(const T* logits, bool softmax, W logsumexp, W grad_lse, const W* grad_sum,
                                  const int32_t* ids, const W* grad_weights, int64_t K, bool renormalize, W* score,
                                  W* grad, W* chosen, T* out, int64_t E) {
  for (int64_t e = 0; e < E; ++e) {
    const W logit = load(logits[e]);
    score[e] = softmax ? fast_exp(logit - logsumexp) : W(1) / (W(1) + fast_exp(-logit));
    grad[e] = grad_sum[e];
  }
  W total = 1, mean = 0;
  if (renormalize) {
    total = 0;
    for (int64_t k = 0; k < K; ++k) total += score[ids[k]];
    for (int64_t k = 0; k < K; ++k) mean += total > 0 ? grad_weights[k] * (score[ids[k]] / total) : W(0);
  }
  for (int64_t k = 0; k < K; ++k) chosen[k] = total > 0 ? (grad_weights[k] - mean) / total : W(0);
  for (int64_t k = 0; k < K; ++k) grad[ids[k]] += chosen[k];
  if (softmax) {
    W dot = 0;
    for (int64_t e = 0; e < E; ++e) dot += grad[e] * score[e];
    for (int64_t e = 0; e < E; ++e) out[e] = store<T>(score[e] * (grad[e] - dot + grad_lse));
  } else {
    for (int64_t e = 0; e < E; ++e)
      out[e] = store<T>(grad[e] * score[e] * (W(1) - score[e]) + grad_lse * fast_exp(load(logits[e]) - logsumexp));
  }
}

#define TUTELX_BACKWARD_TOKEN(T)                                                                                     \
  TUTELX_SIMD void backward_token_simd(const T* logits, bool softmax, wide_t<T> lse, wide_t<T> grad_lse,             \
                                       const wide_t<T>* grad_sum, const int32_t* ids, const wide_t<T>* grad_w,       \
                                       int64_t K, bool renorm, wide_t<T>* score, wide_t<T>* grad, wide_t<T>* chosen, \
                                       T* out, int64_t E) {                                                          \
    backward_token<T, wide_t<T>>(logits, softmax, lse, grad_lse, grad_sum, ids, grad_w, K, renorm, score, grad,      \
                                 chosen, out, E);                                                                    \
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
  const bool softmax = parse_score(score);
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
    parallel_ranges(T, kTokensPerBlock, [&](int64_t begin, int64_t end) {
      std::vector<W> scores(E), grad(E), chosen(K);
      for (int64_t t = begin; t < end; ++t)
        backward_token_simd(in_ptr + t * E, softmax, lse_ptr[t], dl_ptr[t], ds_ptr, ids_ptr + t * K, dw_ptr + t * K, K,
                            renormalize, scores.data(), grad.data(), chosen.data(), out_ptr + t * E, E);
    });
  });
  return out;
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("gate", &tutelx::gate);
  m.impl("gate_backward", &tutelx::gate_backward);
}
