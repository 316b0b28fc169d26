// gate: scores (softmax or sigmoid), the k best, their weights, and what the losses need, in one pass over the logits.
#include "gate.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "best.h"
#include "buffers.h"
#include "choice.h"
#include "forward.h"
#include "parallel.h"
#include "scalar.h"

namespace tutelx {
namespace {

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

TokenGate::TokenGate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize, bool for_losses,
                     ChoiceRule rule)
    : logits_(logits), softmax_(is_softmax(score)), renormalize_(renormalize), rule_(std::move(rule)) {
  check_dim(logits, "logits", 2);
  check_floating(logits, "logits");
  const int64_t T = logits.size(0), E = logits.size(1);
  TORCH_CHECK_VALUE(E > 0, "logits.size(1)=", E, " must be at least 1 expert");
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "top_k=", k, " is outside [1, num_experts=", E, "]");
  check_index_range(T * k, "T*K");
  rule_.check(E, k);
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
  std::optional<Chooser<W>> by_rule;
  if (!rule_.is_plain()) by_rule.emplace(rule_, E);
  const T* in = logits_.const_data_ptr<T>();
  W* weights = weights_.mutable_data_ptr<W>();
  for (int64_t t = begin; t < end; ++t) {
    W* sum = sums_.defined() ? sums_.mutable_data_ptr<W>() + t / kTokensPerBlock * P : forgotten.data();
    const Scored<W> token = score_simd(in + t * E, softmax_, logit.data(), scores.data(), sum, E);
    if (logsumexp_.defined()) logsumexp_.mutable_data_ptr<W>()[t] = token.logsumexp;
    check_row(logit.data(), token.logsumexp, t, E);
    int32_t* chosen = ids_.mutable_data_ptr<int32_t>() + t * K;
    if (by_rule)
      by_rule->choose(logit.data(), scores.data(), token.factor, K, chosen);
    else
      choose_best(logit.data(), token.best, E, K, chosen, scratch);
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

Chosen gate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize,
            const std::optional<at::Tensor>& bias, int64_t num_groups, int64_t kept_groups, int64_t best_of_group) {
  ChoiceRule rule{bias, num_groups, kept_groups, best_of_group};
  if (bias) rule.bias = bias->to(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  TokenGate gate(logits.contiguous(), k, score, renormalize, true, std::move(rule));
  const int64_t T = logits.size(0);
  parallel_items((T + kTokensPerBlock - 1) / kTokensPerBlock,
                 [&](int64_t b) { gate.tokens(b * kTokensPerBlock, std::min(T, (b + 1) * kTokensPerBlock)); });
  return {gate.ids(), gate.weights(), gate.score_sum(), gate.logsumexp()};
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("gate", &tutelx::gate); }
