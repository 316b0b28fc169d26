// inference: route, encode, expert_ffn and decode in one call, for the few tokens of a decoding step, where each call
// on its own costs as much as the work between them. What it computes has the bits of the four.
#include <torch/library.h>

#include "forward.h"

namespace tutelx {
namespace {

using Step = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Step inference(const at::Tensor& x, const at::Tensor& expert_ids, const at::Tensor& weights, int64_t num_experts,
               at::TensorList gate, at::TensorList up, at::TensorList down, at::TensorList gate_bias,
               at::TensorList up_bias, at::TensorList down_bias, c10::string_view activation, int64_t tile_rows,
               int64_t tile_columns) {
  const auto [dest, source, counts, offsets] = route(expert_ids, num_experts, std::nullopt, false, std::nullopt);
  const at::Tensor rows = encode(x, source, dest);
  const auto [out, unused, unused_too] = expert_ffn(rows, counts, offsets, gate, up, down, gate_bias, up_bias,
                                                    down_bias, activation, tile_rows, tile_columns, false, true);
  return {decode(out, dest, source, weights), dest, source, counts, offsets};
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("inference", &tutelx::inference); }
