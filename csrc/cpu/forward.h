// The forward operators as functions, for an operator made of several. Their schemas are in csrc/ops.cpp.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace tutelx {

using Chosen = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Chosen gate(const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize,
            const std::optional<at::Tensor>& bias = {}, int64_t num_groups = 1, int64_t kept_groups = 1,
            int64_t best_of_group = 1);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);

using Map = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Map route(const at::Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> capacity, bool padded,
          const std::optional<at::Tensor>& order);

// The arrays of such a map, and what fills them in when the choices [T,K] are known: ragged, nothing dropped.
Map ragged_map(const at::Tensor& expert_ids, int64_t num_experts);
void route_into(const Map& map, const at::Tensor& expert_ids);

at::Tensor encode(const at::Tensor& x, const at::Tensor& source, const at::Tensor& dest);

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Forward expert_ffn(const at::Tensor& rows, const at::Tensor& counts, const at::Tensor& offsets, at::TensorList gate,
                   at::TensorList up, at::TensorList down, at::TensorList gate_bias, at::TensorList up_bias,
                   at::TensorList down_bias, c10::string_view activation, int64_t tile_rows, int64_t tile_columns,
                   bool keep, bool zero_unused);

// Of decode, before it runs.
void check_weights(const at::Tensor& weights, const at::Tensor& dest, at::ScalarType dtype);
at::Tensor decode(const at::Tensor& rows, const at::Tensor& dest, const at::Tensor& source, const at::Tensor& weights);

}  // namespace tutelx
