// gate: scores, the k best experts of a token and their weights.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>

#include "best.h"
#include "choice.h"
#include "parallel.h"

namespace tutelx {

constexpr int64_t kTokensPerBlock = 256;  // fixed, so that score_sum adds up in the same order for any thread count

// Whether it is softmax and not sigmoid.
bool is_softmax(c10::string_view score);

template <class W>
TUTELX_INLINE W sum_lanes(W* lane) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// The choices of some tokens at a time, for a caller that has its own threads.
class TokenGate {
 public:
  // logits [T,E] contiguous, read when their tokens' turn comes. for_losses: whether logsumexp and score_sum are
  // wanted.
  TokenGate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize, bool for_losses,
            ChoiceRule rule = {});

  // Each token is chosen for once. Tokens of two calls at a time lie in different blocks if score_sum is wanted.
  void tokens(int64_t begin, int64_t end);
  const at::Tensor& ids() const { return ids_; }              // [T,K] int32
  const at::Tensor& weights() const { return weights_; }      // [T,K] float32, float64 for float64 logits
  const at::Tensor& logsumexp() const { return logsumexp_; }  // [T]
  at::Tensor score_sum() const;                               // [E]: of all tokens

 private:
  template <class T>
  void choose(int64_t begin, int64_t end);

  at::Tensor logits_, ids_, weights_, logsumexp_, sums_;  // sums_ [blocks, padded(E)]
  bool softmax_, renormalize_;
  ChoiceRule rule_;
};

}  // namespace tutelx
