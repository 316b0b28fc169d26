// The weights of experts that are feed-forward networks, gated or not, checked against their rows.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "expert_weights.h"

namespace tutelx {

struct FfnWeights {
  ExpertParameter gate, up, down, gate_bias, up_bias, down_bias;
  int64_t model_dim, hidden_dim;

  FfnWeights(at::TensorList g, at::TensorList u, at::TensorList d, at::TensorList gb, at::TensorList ub,
             at::TensorList db, const at::Tensor& rows, int64_t E)
      : gate(g, 2, "gate", E),
        up(u, 2, "up", E),
        down(d, 2, "down", E),
        gate_bias(gb, 1, "gate_bias", E),
        up_bias(ub, 1, "up_bias", E),
        down_bias(db, 1, "down_bias", E) {
    TORCH_CHECK_VALUE(up && down, "expert_ffn needs up and down weights; up is ", up ? "given" : "empty", ", down is ",
                      down ? "given" : "empty");
    model_dim = rows.size(1);
    hidden_dim = up.size(0);
    check(up, "up", {hidden_dim, model_dim}, rows);
    check(down, "down", {model_dim, hidden_dim}, rows);
    check(gate, "gate", {hidden_dim, model_dim}, rows);
    check(gate_bias, "gate_bias", {hidden_dim}, rows);
    check(up_bias, "up_bias", {hidden_dim}, rows);
    check(down_bias, "down_bias", {model_dim}, rows);
    gate_bias = gate_bias.contiguous_vectors();
    up_bias = up_bias.contiguous_vectors();
    down_bias = down_bias.contiguous_vectors();
  }

 private:
  static void check(const ExpertParameter& p, const char* name, std::vector<int64_t> shape, const at::Tensor& rows) {
    if (!p) return;
    for (size_t d = 0; d < shape.size(); ++d)
      TORCH_CHECK_VALUE(p.size(d) == shape[d], name, " has size ", p.size(d), " in dimension ", d, ", expected ",
                        shape[d]);
    TORCH_CHECK_TYPE(p.dtype() == rows.scalar_type(), name, " is ", p.dtype(), ", rows are ", rows.scalar_type());
  }
};

}  // namespace tutelx
