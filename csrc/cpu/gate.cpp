// gate: scores (softmax or sigmoid), the k best, their weights, and what the losses need, in one pass over the logits.
#include "gate.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "buffers.h"
#include "forward.h"
#include "parallel.h"
#include "scalar.h"

namespace tutelx {
namespace {

// The compiler's own vector types: it does not turn comparisons of floating-point lanes into vector code by itself.
// Wider ones than a machine has become single numbers, so several of 32 bytes make up kLanes.
template <class W>
struct Vectors {
  using Index = std::conditional_t<sizeof(W) == 4, int32_t, int64_t>;
  static constexpr int64_t lanes = 32 / sizeof(W), count = kLanes / lanes;
  typedef W Value __attribute__((vector_size(32)));
  typedef Index Indices __attribute__((vector_size(32)));
};

// The largest of P values; NaN is never larger.
template <class W>
TUTELX_INLINE W largest(const W* value, int64_t P) {
  using V = Vectors<W>;
  typename V::Value best[V::count], v;
  for (auto& b : best) b = typename V::Value{} - std::numeric_limits<W>::infinity();
  for (int64_t e = 0; e < P; e += kLanes)
    for (int64_t i = 0; i < V::count; ++i) {
      std::memcpy(&v, value + e + i * V::lanes, sizeof v);
      best[i] = v > best[i] ? v : best[i];
    }
  for (int64_t half = V::count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) best[i] = best[i + half] > best[i] ? best[i + half] : best[i];
  W lane[V::lanes];
  std::memcpy(lane, best, sizeof lane);
  for (int64_t half = V::lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
}

// The lowest index of a value among P, which holds it.
template <class W>
TUTELX_INLINE int32_t first_of(const W* value, W wanted, int64_t P) {
  using V = Vectors<W>;
  using Index = typename V::Index;
  typename V::Value v;
  typename V::Indices at[V::count], here;
  Index lane[V::lanes];
  for (int64_t i = 0; i < V::lanes; ++i) lane[i] = static_cast<Index>(i);
  std::memcpy(&here, lane, sizeof here);
  for (auto& a : at) a = here + static_cast<Index>(P);
  here += static_cast<Index>(P - kLanes);
  for (int64_t e = P - kLanes; e >= 0; e -= kLanes, here -= static_cast<Index>(kLanes))
    for (int64_t i = 0; i < V::count; ++i) {
      std::memcpy(&v, value + e + i * V::lanes, sizeof v);
      at[i] = v == wanted ? here + static_cast<Index>(i * V::lanes) : at[i];
    }
  for (int64_t half = V::count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) at[i] = at[i + half] < at[i] ? at[i + half] : at[i];
  std::memcpy(lane, at, sizeof lane);
  for (int64_t half = V::lanes / 2; half > 0; half /= 2)
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

bool is_softmax(c10::string_view score) {
  TORCH_CHECK_VALUE(score == "softmax" || score == "sigmoid", "score='", score, "' is neither softmax nor sigmoid");
  return score == "softmax";
}

TokenGate::TokenGate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize, bool for_losses)
    : logits_(logits), softmax_(is_softmax(score)), renormalize_(renormalize) {
  check_dim(logits, "logits", 2);
  check_floating(logits, "logits");
  const int64_t T = logits.size(0), E = logits.size(1);
  TORCH_CHECK_VALUE(E > 0, "logits.size(1)=", E, " must be at least 1 expert");
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "top_k=", k, " is outside [1, num_experts=", E, "]");
  check_index_range(T * k, "T*K");
  const auto wide = logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  ids_ = buffer({T, k}, wide.dtype(at::kInt));
  weights_ = buffer({T, k}, wide);
  if (!for_losses) return;
  logsumexp_ = buffer({T}, wide);
  sums_ = at::zeros({(T + kTokensPerBlock - 1) / kTokensPerBlock, padded(E)}, wide);
}

template <class T>
void TokenGate::choose(int64_t begin, int64_t end) {
  using W = wide_t<T>;
  const int64_t E = logits_.size(1), K = ids_.size(1), P = padded(E);
  std::vector<W> logit(P), scores(P), forgotten(sums_.defined() ? 0 : P);
  std::vector<int32_t> scratch;
  const T* in = logits_.const_data_ptr<T>();
  W* weights = weights_.mutable_data_ptr<W>();
  for (int64_t t = begin; t < end; ++t) {
    W* sum = sums_.defined() ? sums_.mutable_data_ptr<W>() + t / kTokensPerBlock * P : forgotten.data();
    const Scored<W> token = score_simd(in + t * E, softmax_, logit.data(), scores.data(), sum, E);
    if (logsumexp_.defined()) logsumexp_.mutable_data_ptr<W>()[t] = token.logsumexp;
    check_row(logit.data(), token.logsumexp, t, E);
    int32_t* chosen = ids_.mutable_data_ptr<int32_t>() + t * K;
    if (K > kFewChoices)
      choose_many(logit.data(), E, K, chosen, scratch);
    else
      choose_simd(logit.data(), token.best, P, K, chosen);
    W total = 0;
    for (int64_t i = 0; i < K; ++i) total += weights[t * K + i] = scores[chosen[i]] * token.factor;
    // All chosen scores can underflow (sigmoid of very negative logits); zero weights then, not 0/0.
    if (renormalize_ && total > 0)
      for (int64_t i = 0; i < K; ++i) weights[t * K + i] /= total;
  }
}

void TokenGate::tokens(int64_t begin, int64_t end) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits_.scalar_type(), "gate",
                                  [&] { choose<scalar_t>(begin, end); });
}

at::Tensor TokenGate::score_sum() const {
  const at::Tensor sum = at::zeros({logits_.size(1)}, sums_.options());
  AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "gate", [&] {
    const auto sums = sums_.accessor<scalar_t, 2>();
    for (int64_t b = 0; b < sums.size(0); ++b)
      for (int64_t e = 0; e < sum.size(0); ++e) sum.mutable_data_ptr<scalar_t>()[e] += sums[b][e];
  });
  return sum;
}

Chosen gate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize) {
  TokenGate gate(logits.contiguous(), k, score, renormalize, true);
  const int64_t T = logits.size(0);
  parallel_items((T + kTokensPerBlock - 1) / kTokensPerBlock,
                 [&](int64_t b) { gate.tokens(b * kTokensPerBlock, std::min(T, (b + 1) * kTokensPerBlock)); });
  return {gate.ids(), gate.weights(), gate.score_sum(), gate.logsumexp()};
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("gate", &tutelx::gate); }
