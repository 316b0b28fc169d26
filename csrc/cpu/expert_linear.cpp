// expert_linear: every expert's own matrix over the rows that arrived, cut into tiles as in expert_ffn. For experts
// with something between their products that no kernel knows. A weight's gradient is written where the weight lies.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "buffers.h"
#include "expert_weights.h"
#include "gemm.h"
#include "parallel.h"
#include "segments.h"

namespace tutelx {
namespace {

struct Linear {
  ExpertParameter weight, bias;
  int64_t out, in;

  Linear(at::TensorList w, at::TensorList b, at::ScalarType dtype, int64_t E)
      : weight(w, 2, "weight", E), bias(b, 1, "bias", E) {
    TORCH_CHECK_VALUE(weight, "weight is empty");
    out = weight.size(0), in = weight.size(1);
    TORCH_CHECK_TYPE(weight.dtype() == dtype, "weight is ", weight.dtype(), ", rows are ", dtype);
    if (!bias) return;
    TORCH_CHECK_VALUE(bias.size(0) == out, "bias has size ", bias.size(0), ", weight has ", out, " outputs");
    TORCH_CHECK_TYPE(bias.dtype() == dtype, "bias is ", bias.dtype(), ", rows are ", dtype);
    bias = bias.contiguous_vectors();
  }
};

at::Tensor expert_linear(const at::Tensor& rows, const at::Tensor& counts, const at::Tensor& offsets,
                         at::TensorList weight, at::TensorList bias, int64_t tile_rows, int64_t tile_columns) {
  check_dim(rows, "rows", 2);
  const at::Tensor x = rows.contiguous();
  const Segments segments(counts, offsets, x.size(0));
  const Linear linear(weight, bias, x.scalar_type(), segments.experts());
  check_size(x, "rows", 1, linear.in, "the weight's inputs");
  const at::Tensor out = buffer({x.size(0), linear.out}, x.options());
  const Matrix from = matrix_of(x), to = matrix_of(out);
  const std::vector<Tile> tiles = cut(segments, linear.out, TileSize(tile_rows, tile_columns));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "expert_linear", [&] {
    parallel_items(tiles.size(), [&](int64_t i) {
      const Tile t = tiles[i];
      const Matrix y = to.block(t.row, t.rows, t.col, t.cols);
      multiply(from.block(t.row, t.rows, 0, linear.in),
               linear.weight.matrix(t.expert).block(t.col, t.cols, 0, linear.in).transposed(), y);
      add_bias<scalar_t>(y, linear.bias ? linear.bias.vector<scalar_t>(t.expert) + t.col : nullptr);
    });
  });
  zero_other_rows(out, segments);
  return out;
}

using Gradients = std::vector<at::Tensor>;

std::tuple<at::Tensor, Gradients, Gradients> expert_linear_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                                                                    const at::Tensor& counts, const at::Tensor& offsets,
                                                                    at::TensorList weight, at::TensorList bias,
                                                                    int64_t tile_rows, int64_t tile_columns,
                                                                    bool need_rows, bool need_weights) {
  check_dim(rows, "rows", 2);
  check_dim(grad_out, "grad_out", 2);
  check_dtype(grad_out, "grad_out", rows.scalar_type());
  const at::Tensor dy = grad_out.contiguous(), x = rows.contiguous();
  const Segments segments(counts, offsets, x.size(0));
  const Linear linear(weight, bias, x.scalar_type(), segments.experts());
  check_size(x, "rows", 1, linear.in, "the weight's inputs");
  check_size(dy, "grad_out", 0, x.size(0), "the rows");
  check_size(dy, "grad_out", 1, linear.out, "the weight's outputs");
  const TileSize size(tile_rows, tile_columns);
  const std::vector<int64_t> sizes = segments.sizes();

  const at::Tensor grad_rows = need_rows ? buffer_like(x) : buffer({0}, x.options());
  const std::vector<Tile> row_tiles = need_rows ? cut(segments, linear.in, size) : std::vector<Tile>();
  Gradients grad_weight, grad_bias;
  std::vector<Tile> weight_tiles;  // an expert's rows, and a block of its outputs
  if (need_weights) {
    grad_weight = linear.weight.gradients(sizes, true);
    if (linear.bias) grad_bias = linear.bias.gradients(sizes, true);
    for (int64_t e = 0; e < segments.experts(); ++e)
      for (int64_t col = 0; sizes[e] > 0 && col < linear.out; col += size.columns)
        weight_tiles.push_back({e, segments.of[e].begin, sizes[e], col, std::min(size.columns, linear.out - col)});
  }
  const Matrix from = matrix_of(dy), to_x = need_rows ? matrix_of(grad_rows) : Matrix();
  const int64_t n_rows = row_tiles.size(), n_weights = weight_tiles.size();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "expert_linear_backward", [&] {
    parallel_items(n_rows + n_weights, [&](int64_t i) {
      if (i < n_rows) {
        const Tile t = row_tiles[i];
        multiply(from.block(t.row, t.rows, 0, linear.out),
                 linear.weight.matrix(t.expert).block(0, linear.out, t.col, t.cols),
                 to_x.block(t.row, t.rows, t.col, t.cols));
        return;
      }
      const Tile t = weight_tiles[i - n_rows];
      const Matrix left = from.block(t.row, t.rows, t.col, t.cols);
      const auto of = [&](const Gradients& grads, int64_t rank) {
        return grads[0].dim() == rank + 1 ? grads[0].select(0, t.expert) : grads[t.expert];
      };
      multiply(left.transposed(), matrix_of(x).block(t.row, t.rows, 0, linear.in),
               matrix_of(of(grad_weight, 2)).block(t.col, t.cols, 0, linear.in));
      if (!grad_bias.empty()) sum_rows<scalar_t>(left, of(grad_bias, 1).template mutable_data_ptr<scalar_t>() + t.col);
    });
  });
  if (need_rows) zero_other_rows(grad_rows, segments);
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("expert_linear", &tutelx::expert_linear);
  m.impl("expert_linear_backward", &tutelx::expert_linear_backward);
}
