// inference: route, encode, expert_ffn and decode in one call, for the few tokens of a decoding step, where each call
// on its own costs as much as the work between them. Threads are woken once, and no rows are laid out that a product
// would lay out again. gated_inference: linear and gate before them too. What they compute has the bits of their parts.
#include <torch/library.h>

#include "../check.h"
#include "expert_ffn.h"
#include "forward.h"
#include "gate.h"
#include "gather_sum.h"
#include "linear.h"
#include "parallel.h"

namespace tutelx {
namespace {

constexpr int64_t kMostSums = 16;     // items that the tokens' sums are cut into
constexpr int64_t kGatedTokens = 16;  // of an item; fewer tokens of all leave a thread without one

using Step = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Step inference(const at::Tensor& x, const at::Tensor& expert_ids, const at::Tensor& weights, int64_t num_experts,
               at::TensorList gate, at::TensorList up, at::TensorList down, at::TensorList gate_bias,
               at::TensorList up_bias, at::TensorList down_bias, c10::string_view activation, int64_t tile_rows,
               int64_t tile_columns) {
  check_dim(x, "x", 2);
  check_floating(x, "x");
  const auto [dest, source, counts, offsets] = route(expert_ids, num_experts, std::nullopt, false, std::nullopt);
  check_size(x, "x", 0, dest.size(0), "the map's tokens");
  check_weights(weights, dest, x.scalar_type());
  const at::Tensor tokens = x.contiguous();
  const Segments segments(counts, offsets, source.size(0));
  const FfnWeights experts(gate, up, down, gate_bias, up_bias, down_bias, tokens, num_experts);
  const GatherSum sum(dest, weights, tokens.size(1), tokens.options());
  const int64_t T = tokens.size(0), items = std::min(T, kMostSums);
  const Then then{items,
                  [&](const at::Tensor& out, int64_t i) { sum.tokens(out, T * i / items, T * (i + 1) / items); }};
  expert_ffn_of_tokens(tokens, dest, source, segments, experts, parse_activation(activation),
                       TileSize(tile_rows, tile_columns), then);
  return {sum.out(), dest, source, counts, offsets};
}

// linear and gate, without what the losses need, with the same bits.
std::pair<at::Tensor, TokenGate> choose(const at::Tensor& x, const at::Tensor& router, int64_t k,
                                        c10::string_view score, bool renormalize) {
  const TokenLinear product(x, router);
  const int64_t T = product.tokens(), E = product.outputs();
  const bool together = T > kGatedTokens && product.bits_are_fixed();
  if (!together) product.all();
  TokenGate gate(product.out(), k, score, renormalize, false);
  const auto some = [&](int64_t i) {
    const int64_t token = i * kGatedTokens, tokens = std::min(kGatedTokens, T - token);
    if (together) product.some(token, tokens, 0, E);
    gate.tokens(token, token + tokens);
  };
  parallel_items((T + kGatedTokens - 1) / kGatedTokens, some, product.products() >= kWakeProducts);
  return {product.out(), gate};
}

using GatedStep =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

GatedStep gated_inference(const at::Tensor& x, const at::Tensor& router, int64_t k, c10::string_view score,
                          bool renormalize, at::TensorList gate_weights, at::TensorList up, at::TensorList down,
                          at::TensorList gate_bias, at::TensorList up_bias, at::TensorList down_bias,
                          c10::string_view activation, int64_t tile_rows, int64_t tile_columns) {
  const auto [logits, gate] = choose(x, router, k, score, renormalize);
  const auto [y, dest, source, counts, offsets] =
      inference(x, gate.ids(), gate.weights(), router.size(0), gate_weights, up, down, gate_bias, up_bias, down_bias,
                activation, tile_rows, tile_columns);
  return {y, dest, source, counts, offsets, logits, gate.ids(), gate.weights()};
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("inference", &tutelx::inference);
  m.impl("gated_inference", &tutelx::gated_inference);
}
