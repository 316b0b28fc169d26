// expert_ffn: down(act(gate(x)) * up(x)) or down(act(up(x))) for every expert, over the rows that arrived.
// A product is cut into tiles (expert, block of rows, block of columns); each tile is one GEMM on one thread, and
// threads take tiles as they come free. So cost follows the rows, however unevenly experts are loaded, and since the
// cut depends on the shapes alone, so do the bits of the result.
#include "expert_ffn.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../check.h"
#include "activation.h"
#include "buffers.h"
#include "ffn_weights.h"
#include "forward.h"
#include "gemm.h"
#include "parallel.h"

namespace tutelx {
namespace {

template <class T>
Forward run(const Rows& x, const Segments& segments, const FfnWeights& w, Act act, TileSize size, bool keep,
            at::TensorOptions options, const Then& then) {
  const int64_t R = segments.rows, M = w.model_dim, H = w.hidden_dim, E = segments.experts();
  const at::Tensor out = buffer({R, M}, options), hidden = buffer({R, H}, options), nothing = buffer({0}, options);
  const at::Tensor gate_pre = keep && w.gate ? buffer_like(hidden) : nothing;
  const at::Tensor up_pre = keep ? buffer_like(hidden) : nothing;
  const Rows a{matrix_of(hidden)};
  const Matrix y = matrix_of(out);

  const std::vector<Tile> inner = cut(segments, H, size), outer = cut(segments, M, size);
  // Tiles are handed out in turns: where the weights begin that this thread will probably want after tile i.
  const int64_t threads = at::get_num_threads();
  const auto later = [&](const std::vector<Tile>& tiles, int64_t i, const ExpertParameter& weight) -> const char* {
    if (i + threads >= static_cast<int64_t>(tiles.size())) return nullptr;
    const Tile& t = tiles[i + threads];
    return weight.matrix(t.expert).block(t.col, t.cols, 0, weight.size(1)).data;
  };
  const auto into_hidden = [&](int64_t i) {
    const Tile& t = inner[i];
    // Where the pre-activations go: kept for the backward, or forgotten with the tile.
    const std::unique_ptr<T[]> scratch(keep ? nullptr : new T[t.rows * t.cols * (w.gate ? 2 : 1)]);
    const auto place = [&](const at::Tensor& kept, int64_t nth) -> Matrix {
      if (keep) return matrix_of(kept).block(t.row, t.rows, t.col, t.cols);
      return {reinterpret_cast<char*>(scratch.get() + nth * t.rows * t.cols), t.rows, t.cols, t.cols, 1, x.of.dtype};
    };
    Products products(x.some(t.row, t.rows));
    const auto columns = [&](const ExpertParameter& weight) {
      return weight.matrix(t.expert).block(t.col, t.cols, 0, M);
    };
    const auto project = [&](const ExpertParameter& weight, const ExpertParameter& bias, const Matrix& to,
                             const char* after) {
      products.into(columns(weight).transposed(), to, after);
      add_bias<T>(to, bias ? bias.vector<T>(t.expert) + t.col : nullptr);
    };
    const Matrix u = place(up_pre, 0);
    const char* const next = later(inner, i, w.up);
    project(w.up, w.up_bias, u, w.gate ? columns(w.gate).data : next);
    const Matrix g = w.gate ? place(gate_pre, 1) : u;
    if (w.gate) project(w.gate, w.gate_bias, g, next);
    for (int64_t r = 0; r < t.rows; ++r)
      activate<T>(act, reinterpret_cast<T*>(g.data) + r * g.row_stride,
                  w.gate ? reinterpret_cast<T*>(u.data) + r * u.row_stride : nullptr,
                  hidden.mutable_data_ptr<T>() + (t.row + r) * H + t.col, t.cols);
  };
  const auto out_of_hidden = [&](int64_t i) {
    const Tile& t = outer[i];
    const Matrix to = y.block(t.row, t.rows, t.col, t.cols);
    Products(a.some(t.row, t.rows))
        .into(w.down.matrix(t.expert).block(t.col, t.cols, 0, H).transposed(), to, later(outer, i, w.down));
    add_bias<T>(to, w.down_bias ? w.down_bias.vector<T>(t.expert) + t.col : nullptr);
  };

  // An outer tile needs all inner ones of its expert; what comes then needs all outer ones.
  Progress progress(E + 1);
  for (const Tile& t : inner) progress.expect(t.expert);
  for (size_t i = 0; i < outer.size(); ++i) progress.expect(E);
  int64_t numbers = R * (M + 2 * H);
  for (int64_t e = 0; e < E; ++e) numbers += segments.of[e].size > 0 ? (w.gate ? 3 : 2) * M * H : 0;
  const int64_t n = inner.size(), m = outer.size();
  parallel_in_order(n + m + then.items, numbers * sizeof(T), progress, [&](int64_t i) {
    if (i < n) {
      into_hidden(i);
      progress.finish(inner[i].expert);
    } else if (i < n + m) {
      if (!progress.wait(outer[i - n].expert)) return;
      out_of_hidden(i - n);
      progress.finish(E);
    } else if (progress.wait(E)) {
      then.item(out, i - n - m);
    }
  });
  return {out, gate_pre, up_pre};
}

Forward run(const Rows& x, const Segments& segments, const FfnWeights& weights, Act act, TileSize size, bool keep,
            at::TensorOptions options, const Then& then) {
  Forward result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.of.dtype, "expert_ffn", [&] {
    result = run<scalar_t>(x, segments, weights, act, size, keep, options, then);
  });
  return result;
}

}  // namespace

Forward expert_ffn(const at::Tensor& rows, const at::Tensor& counts, const at::Tensor& offsets, at::TensorList gate,
                   at::TensorList up, at::TensorList down, at::TensorList gate_bias, at::TensorList up_bias,
                   at::TensorList down_bias, c10::string_view activation, int64_t tile_rows, int64_t tile_columns,
                   bool keep, bool /*zero_unused*/) {
  check_dim(rows, "rows", 2);
  const at::Tensor x = rows.contiguous();
  const Segments segments(counts, offsets, x.size(0));
  const FfnWeights weights(gate, up, down, gate_bias, up_bias, down_bias, x, segments.experts());
  const Forward result = run(Rows{matrix_of(x)}, segments, weights, parse_activation(activation),
                             TileSize(tile_rows, tile_columns), keep, x.options(), Then{});
  zero_other_rows(std::get<0>(result), segments);
  return result;
}

void expert_ffn_of_tokens(const at::Tensor& tokens, const at::Tensor& dest, const at::Tensor& source,
                          const Segments& segments, const FfnWeights& weights, Act act, TileSize size,
                          const Then& then) {
  const Matrix x = matrix_of(tokens);
  int64_t most = 0;
  bool side_by_side = x.col_stride == 1;
  for (int64_t e = 0; e < segments.experts(); ++e) {
    if (segments.of[e].size == 0) continue;
    most = std::max(most, std::min(segments.of[e].size, size.rows));
    side_by_side &= weights.up.matrix(e).col_stride == 1 && (!weights.gate || weights.gate.matrix(e).col_stride == 1);
  }
  if (side_by_side && FewRows::can(most, x.dtype)) {
    const Rows rows{x, source.const_data_ptr<int32_t>(), dest.size(1)};
    run(rows, segments, weights, act, size, false, tokens.options(), then);
  } else {
    const at::Tensor rows = encode(tokens, source, dest);
    run(Rows{matrix_of(rows)}, segments, weights, act, size, false, tokens.options(), then);
  }
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("expert_ffn", &tutelx::expert_ffn); }
