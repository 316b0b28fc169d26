// gate: scores (softmax or sigmoid), the k best, their weights, and what the losses need, in one pass over the logits.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "forward.h"
#include "parallel.h"
#include "scalar.h"

namespace tutelx {
namespace {

constexpr int64_t kTokensPerBlock = 256;  // fixed, so that score_sum adds up in the same order for any thread count

bool parse_score(c10::string_view score) {
  TORCH_CHECK_VALUE(score == "softmax" || score == "sigmoid", "score='", score, "' is neither softmax nor sigmoid");
  return score == "softmax";
}

// Rows are kept in a buffer of whole vectors: what is written for one lane, the compiler does for all.
constexpr int64_t kLanes = 16;
int64_t padded(int64_t E) { return (E + kLanes - 1) / kLanes * kLanes; }

template <class W>
TUTELX_INLINE W sum_lanes(W* lane) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// The compiler's own vector types: it does not turn comparisons of floating-point lanes into vector code by itself.
template <class W>
struct Vectors {
  using Index = std::conditional_t<sizeof(W) == 4, int32_t, int64_t>;
  typedef W Value __attribute__((vector_size(kLanes * sizeof(W))));
  typedef Index Indices __attribute__((vector_size(kLanes * sizeof(W))));
};

// The largest of P values; NaN is never larger.
template <class W>
TUTELX_INLINE W largest(const W* value, int64_t P) {
  typename Vectors<W>::Value best = {}, v;
  best -= std::numeric_limits<W>::infinity();
  for (int64_t e = 0; e < P; e += kLanes) {
    std::memcpy(&v, value + e, sizeof v);
    best = v > best ? v : best;
  }
  W lane[kLanes];
  std::memcpy(lane, &best, sizeof lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
}

// The lowest index of a value among P, which holds it.
template <class W>
TUTELX_INLINE int32_t first_of(const W* value, W wanted, int64_t P) {
  using Index = typename Vectors<W>::Index;
  typename Vectors<W>::Value v;
  typename Vectors<W>::Indices at, here;
  Index lane[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<Index>(P - kLanes + i);
  std::memcpy(&here, lane, sizeof here);
  at = here + kLanes;
  for (int64_t e = P - kLanes; e >= 0; e -= kLanes, here -= kLanes) {
    std::memcpy(&v, value + e, sizeof v);
    at = v == wanted ? here : at;
  }
  std::memcpy(lane, &at, sizeof lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i + half] < lane[i] ? lane[i + half] : lane[i];
  return static_cast<int32_t>(lane[0]);
}

// What one token leaves behind. score [P] is exp(logit - best) for softmax, to be multiplied with `factor`.
template <class W>
struct Scored {
  W logsumexp, factor, best;
};

// logit [P] gets the row, widened and filled up with -inf; sum [P] the token's scores added.
template <class T, class W>
TUTELX_INLINE Scored<W> score_token(const T* row, bool softmax, W* logit, W* score, W* sum, int64_t E) {
  const int64_t P = padded(E);
  for (int64_t e = 0; e < E; ++e) logit[e] = load(row[e]);
  for (int64_t e = E; e < P; ++e) logit[e] = -std::numeric_limits<W>::infinity();
  const W best = largest(logit, P);
  W part[kLanes] = {};
  for (int64_t e = 0; e < P; e += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) part[i] += score[e + i] = exp_negative(logit[e + i] - best);
  const W total = sum_lanes(part), factor = softmax ? W(1) / total : W(1);
  if (softmax)
    for (int64_t e = 0; e < P; ++e) sum[e] += score[e] * factor;
  else
    for (int64_t e = 0; e < P; ++e) sum[e] += score[e] = sigmoid(logit[e]);
  return {best + std::log(total), factor, best};
}

// Many choices: a partial sort; few: one sweep each, with what was taken marked as NaN.
constexpr int64_t kFewChoices = 16;

// The k largest logits, largest first; of equal ones the lower index first. `logit` is used up.
template <class W>
TUTELX_INLINE void choose_few(W* logit, W best, int64_t P, int64_t K, int32_t* ids) {
  for (int64_t k = 0; k < K; ++k) {
    if (k > 0) best = largest(logit, P);
    ids[k] = first_of(logit, best, P);
    logit[ids[k]] = std::numeric_limits<W>::quiet_NaN();
  }
}

template <class W>
void choose_many(const W* logit, int64_t E, int64_t K, int32_t* ids, std::vector<int32_t>& scratch) {
  scratch.resize(E);
  for (int64_t e = 0; e < E; ++e) scratch[e] = static_cast<int32_t>(e);
  std::partial_sort(scratch.begin(), scratch.begin() + K, scratch.end(),
                    [logit](int32_t a, int32_t b) { return logit[a] > logit[b] || (logit[a] == logit[b] && a < b); });
  std::copy_n(scratch.begin(), K, ids);
}

#define TUTELX_TOKEN(T)                                                                                    \
  TUTELX_SIMD Scored<wide_t<T>> score_simd(const T* row, bool softmax, wide_t<T>* logit, wide_t<T>* score, \
                                           wide_t<T>* sum, int64_t E) {                                    \
    return score_token<T, wide_t<T>>(row, softmax, logit, score, sum, E);                                  \
  }
TUTELX_TOKEN(float)
TUTELX_TOKEN(double)
TUTELX_TOKEN(c10::BFloat16)
TUTELX_TOKEN(c10::Half)
#undef TUTELX_TOKEN
TUTELX_SIMD void choose_simd(float* logit, float best, int64_t P, int64_t K, int32_t* ids) {
  choose_few(logit, best, P, K, ids);
}
TUTELX_SIMD void choose_simd(double* logit, double best, int64_t P, int64_t K, int32_t* ids) {
  choose_few(logit, best, P, K, ids);
}

template <class W>
void check_row(const W* logit, W logsumexp, int64_t token, int64_t E) {
  if (std::isfinite(logsumexp)) return;
  for (int64_t e = 0; e < E; ++e)
    TORCH_CHECK_VALUE(logit[e] < std::numeric_limits<W>::infinity(), "logits[", token, ",", e, "]=", logit[e],
                      " is not a number the gate can compare");
  TORCH_CHECK_VALUE(false, "logits[", token, "] has no finite entry among its ", E, " experts");
}

}  // namespace

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
    const int64_t P = padded(E);
    std::vector<W> sums(blocks * P, W(0));
    const scalar_t* in_ptr = in.const_data_ptr<scalar_t>();
    int32_t* ids_ptr = ids.mutable_data_ptr<int32_t>();
    W *w_ptr = weights.mutable_data_ptr<W>(), *lse_ptr = logsumexp.mutable_data_ptr<W>();
    parallel_items(blocks, [&](int64_t b) {
      std::vector<W> logit(P), scores(P);
      std::vector<int32_t> scratch;
      const int64_t end = std::min(T, (b + 1) * kTokensPerBlock);
      for (int64_t t = b * kTokensPerBlock; t < end; ++t) {
        const Scored<W> token =
            score_simd(in_ptr + t * E, softmax, logit.data(), scores.data(), sums.data() + b * P, E);
        lse_ptr[t] = token.logsumexp;
        check_row(logit.data(), token.logsumexp, t, E);
        int32_t* chosen = ids_ptr + t * k;
        if (k > kFewChoices)
          choose_many(logit.data(), E, k, chosen, scratch);
        else
          choose_simd(logit.data(), token.best, P, k, chosen);
        W total = 0;
        for (int64_t i = 0; i < k; ++i) total += w_ptr[t * k + i] = scores[chosen[i]] * token.factor;
        // All chosen scores can underflow (sigmoid of very negative logits); zero weights then, not 0/0.
        if (renormalize && total > 0)
          for (int64_t i = 0; i < k; ++i) w_ptr[t * k + i] /= total;
      }
    });
    score_sum = at::zeros({E}, wide);
    W* sum_ptr = score_sum.mutable_data_ptr<W>();
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t e = 0; e < E; ++e) sum_ptr[e] += sums[b * P + e];
  });
  return {ids, weights, score_sum, logsumexp};
}

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

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("gate", &tutelx::gate);
  m.impl("gate_backward", &tutelx::gate_backward);
}
