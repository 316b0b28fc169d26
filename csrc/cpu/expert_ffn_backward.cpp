// expert_ffn_backward: the gradients of rows, weights and biases, cut into tiles as the forward is.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "buffers.h"
#include "ffn_weights.h"
#include "gemm.h"
#include "parallel.h"
#include "segments.h"

namespace tutelx {
namespace {

using Gradients = std::vector<at::Tensor>;
using Backward = std::tuple<at::Tensor, Gradients, Gradients, Gradients, Gradients, Gradients, Gradients>;

// One kind of weight and what its gradient is the product of: grad[e] = left[rows of e]^T @ right[rows of e].
struct WeightGradient {
  const at::Tensor* left;
  const at::Tensor* right;
  Gradients weight, bias;
};

template <class T>
Backward backward(const at::Tensor& grad_out, const at::Tensor& rows, const Segments& segments, const FfnWeights& w,
                  const at::Tensor& gate_pre, const at::Tensor& up_pre, Act act, TileSize size, bool need_rows,
                  bool need_weights, bool zero_unused) {
  const int64_t R = rows.size(0), M = w.model_dim, H = w.hidden_dim, E = segments.experts();
  const at::Tensor grad_up = buffer({R, H}, rows.options());
  const at::Tensor grad_gate = w.gate ? buffer_like(grad_up) : at::Tensor();
  const at::Tensor hidden = need_weights ? buffer_like(grad_up) : at::Tensor();
  const Matrix dy = matrix_of(grad_out);

  // Through down and the activation.
  const std::vector<Tile> inner = cut(segments, H, size);
  parallel_items(inner.size(), [&](int64_t i) {
    const Tile t = inner[i];
    std::vector<T> scratch(t.rows * t.cols);
    const Matrix da{reinterpret_cast<char*>(scratch.data()), t.rows, t.cols, t.cols, 1, dy.dtype};
    multiply(dy.block(t.row, t.rows, 0, M), w.down.matrix(t.expert).block(0, M, t.col, t.cols), da);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t at = (t.row + r) * H + t.col;
      const T* u = up_pre.const_data_ptr<T>() + at;
      T* du = grad_up.mutable_data_ptr<T>() + at;
      T* a = need_weights ? hidden.mutable_data_ptr<T>() + at : nullptr;
      const T* da_row = scratch.data() + r * t.cols;
      if (w.gate)
        activate_backward<T>(act, da_row, gate_pre.const_data_ptr<T>() + at, u, grad_gate.mutable_data_ptr<T>() + at,
                             du, a, t.cols);
      else
        activate_backward<T>(act, da_row, u, nullptr, du, nullptr, a, t.cols);
    }
  });

  // Then grad_rows and all weight gradients at once: none of them needs another.
  const at::Tensor grad_rows = need_rows ? buffer_like(rows) : buffer({0}, rows.options());
  const std::vector<Tile> row_tiles = need_rows ? cut(segments, M, size) : std::vector<Tile>();
  const auto to_rows = [&](const Tile& t) {
    const Matrix to = matrix_of(grad_rows).block(t.row, t.rows, t.col, t.cols);
    multiply(matrix_of(grad_up).block(t.row, t.rows, 0, H), w.up.matrix(t.expert).block(0, H, t.col, t.cols), to);
    if (w.gate)
      multiply(matrix_of(grad_gate).block(t.row, t.rows, 0, H), w.gate.matrix(t.expert).block(0, H, t.col, t.cols), to,
               true);
  };

  std::vector<WeightGradient> wanted;
  struct WeightTile {
    int64_t which, expert, row, rows;
  };
  std::vector<WeightTile> weight_tiles;
  if (need_weights) {
    const std::vector<int64_t> sizes = segments.sizes();
    const auto want = [&](const ExpertParameter& weight, const ExpertParameter& bias, const at::Tensor& left,
                          const at::Tensor& right) {
      wanted.push_back({&left, &right, weight ? weight.gradients(sizes, zero_unused) : Gradients(),
                        bias ? bias.gradients(sizes, zero_unused) : Gradients()});
      if (!weight) return;
      for (int64_t e = 0; e < E; ++e)
        for (int64_t row = 0; sizes[e] > 0 && row < weight.size(0); row += size.columns)
          weight_tiles.push_back(
              {static_cast<int64_t>(wanted.size()) - 1, e, row, std::min(size.columns, weight.size(0) - row)});
    };
    want(w.gate, w.gate_bias, grad_gate, rows);
    want(w.up, w.up_bias, grad_up, rows);
    want(w.down, w.down_bias, grad_out, hidden);
  }
  const auto to_weight = [&](const WeightTile& t) {
    WeightGradient& g = wanted[t.which];
    const Span span = segments.of[t.expert];
    const Matrix left = matrix_of(*g.left).block(span.begin, span.size, t.row, t.rows);
    const Matrix right = matrix_of(*g.right).block(span.begin, span.size, 0, g.right->size(1));
    const at::Tensor& buffer = g.weight.size() == 1 && g.weight[0].dim() == 3 ? g.weight[0] : g.weight[t.expert];
    const Matrix to = buffer.dim() == 3 ? matrix_of(buffer.select(0, t.expert)) : matrix_of(buffer);
    multiply(left.transposed(), right, to.block(t.row, t.rows, 0, to.cols));
    if (g.bias.empty()) return;
    const bool stacked = g.bias[0].dim() == 2;
    T* bias = stacked ? g.bias[0].template mutable_data_ptr<T>() + t.expert * g.bias[0].size(1)
                      : g.bias[t.expert].template mutable_data_ptr<T>();
    sum_rows<T>(left, bias + t.row);
  };
  const int64_t n_rows = row_tiles.size(), n_weights = weight_tiles.size();
  parallel_items(n_rows + n_weights, [&](int64_t i) {
    if (i < n_rows)
      to_rows(row_tiles[i]);
    else
      to_weight(weight_tiles[i - n_rows]);
  });
  if (need_rows) zero_other_rows(grad_rows, segments);
  if (!need_weights) return {grad_rows, {}, {}, {}, {}, {}, {}};
  return {grad_rows,      wanted[0].weight, wanted[1].weight, wanted[2].weight,
          wanted[0].bias, wanted[1].bias,   wanted[2].bias};
}

Backward expert_ffn_backward(const at::Tensor& grad_out, const at::Tensor& rows, const at::Tensor& counts,
                             const at::Tensor& offsets, at::TensorList gate, at::TensorList up, at::TensorList down,
                             at::TensorList gate_bias, at::TensorList up_bias, at::TensorList down_bias,
                             const at::Tensor& gate_pre, const at::Tensor& up_pre, c10::string_view activation,
                             int64_t tile_rows, int64_t tile_columns, bool need_rows, bool need_weights,
                             bool zero_unused) {
  check_dim(rows, "rows", 2);
  TORCH_CHECK_VALUE(grad_out.sizes() == rows.sizes(), "grad_out has shape ", grad_out.sizes(), ", rows have ",
                    rows.sizes());
  check_dtype(grad_out, "grad_out", rows.scalar_type());
  const at::Tensor dy = grad_out.contiguous(), x = rows.contiguous();
  const Segments segments(counts, offsets, x.size(0));
  const FfnWeights weights(gate, up, down, gate_bias, up_bias, down_bias, x, segments.experts());
  const std::vector<int64_t> kept{x.size(0), weights.hidden_dim};
  TORCH_CHECK_VALUE(up_pre.sizes() == kept, "up_pre has shape ", up_pre.sizes(), ", expected ", kept,
                    " (was keep set in the forward?)");
  TORCH_CHECK_VALUE(!weights.gate || gate_pre.sizes() == kept, "gate_pre has shape ", gate_pre.sizes(), ", expected ",
                    kept);
  const Act act = parse_activation(activation);
  const TileSize size(tile_rows, tile_columns);
  Backward result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "expert_ffn_backward", [&] {
    result = backward<scalar_t>(dy, x, segments, weights, gate_pre.contiguous(), up_pre.contiguous(), act, size,
                                need_rows, need_weights, zero_unused);
  });
  return result;
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("expert_ffn_backward", &tutelx::expert_ffn_backward); }
