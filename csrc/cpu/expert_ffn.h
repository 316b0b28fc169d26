// The experts' networks over tokens that are not laid out as rows, and what comes after them, in one parallel region.
#pragma once
#include <ATen/ATen.h>

#include <functional>

#include "activation.h"
#include "ffn_weights.h"
#include "segments.h"

namespace tutelx {

// What is done with the finished rows [R,M]: items for any thread.
struct Then {
  int64_t items = 0;
  std::function<void(const at::Tensor& out, int64_t item)> item;
};

// expert_ffn(encode(tokens [T,M])) by a map that drops nothing; rows are laid out only where the products want them so.
// Nothing is kept for a backward.
void expert_ffn_of_tokens(const at::Tensor& tokens, const at::Tensor& dest, const at::Tensor& source,
                          const Segments& segments, const FfnWeights& weights, Act act, TileSize size,
                          const Then& then);

}  // namespace tutelx
