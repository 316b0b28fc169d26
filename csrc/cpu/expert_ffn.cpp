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
class Task final : public FfnTask {
 public:
  Task(int64_t rows, const FfnWeights& w, Act act, TileSize size, bool keep, at::TensorOptions options,
       Progress& progress)
      : w_(w), act_(act), size_(size), keep_(keep), progress_(progress) {
    out_ = buffer({rows, w.model_dim}, options);
    hidden_ = buffer({rows, w.hidden_dim}, options);
    if (keep && w.gate) gate_pre_ = buffer_like(hidden_);
    if (keep) up_pre_ = buffer_like(hidden_);
  }

  void begin(const Rows& x, const Segments& segments, const Then& then) override {
    x_ = x, then_ = &then, all_outer_ = segments.experts();
    inner_ = cut(segments, w_.hidden_dim, size_), outer_ = cut(segments, w_.model_dim, size_);
    for (const Tile& t : inner_) progress_.expect(t.expert);
    for (size_t i = 0; i < outer_.size(); ++i) progress_.expect(all_outer_);
  }

  int64_t items() const override { return static_cast<int64_t>(inner_.size() + outer_.size()) + then_->items; }
  Forward result() const override {
    const auto or_empty = [&](const at::Tensor& t) { return t.defined() ? t : buffer({0}, out_.options()); };
    return {out_, or_empty(gate_pre_), or_empty(up_pre_)};
  }

  // An outer tile needs all inner ones of its expert; what comes then needs all outer ones.
  void item(int64_t i) override {
    const int64_t n = inner_.size(), m = outer_.size();
    if (i < n) {
      into_hidden(i);
      progress_.finish(inner_[i].expert);
    } else if (i < n + m) {
      if (!progress_.wait(outer_[i - n].expert)) return;
      out_of_hidden(i - n);
      progress_.finish(all_outer_);
    } else if (progress_.wait(all_outer_)) {
      then_->item(out_, i - n - m);
    }
  }

 private:
  void into_hidden(int64_t i) const {
    const Tile& t = inner_[i];
    // Where the pre-activations go: kept for the backward, or forgotten with the tile.
    const std::unique_ptr<T[]> scratch(keep_ ? nullptr : new T[t.rows * t.cols * (w_.gate ? 2 : 1)]);
    const auto place = [&](const at::Tensor& kept, int64_t nth) -> Matrix {
      if (keep_) return matrix_of(kept).block(t.row, t.rows, t.col, t.cols);
      return {reinterpret_cast<char*>(scratch.get() + nth * t.rows * t.cols), t.rows, t.cols, t.cols, 1, x_.of.dtype};
    };
    Products products(x_.some(t.row, t.rows));
    const auto project = [&](const ExpertParameter& weight, const ExpertParameter& bias, const Matrix& to,
                             const char* after) {
      products.into(columns(weight, t).transposed(), to, after);
      add_bias<T>(to, bias ? bias.vector<T>(t.expert) + t.col : nullptr);
    };
    const Matrix u = place(up_pre_, 0);
    const char* const next = later(inner_, i, w_.up);
    project(w_.up, w_.up_bias, u, w_.gate ? columns(w_.gate, t).data : next);
    const Matrix g = w_.gate ? place(gate_pre_, 1) : u;
    if (w_.gate) project(w_.gate, w_.gate_bias, g, next);
    for (int64_t r = 0; r < t.rows; ++r)
      activate<T>(act_, reinterpret_cast<T*>(g.data) + r * g.row_stride,
                  w_.gate ? reinterpret_cast<T*>(u.data) + r * u.row_stride : nullptr,
                  hidden_.mutable_data_ptr<T>() + (t.row + r) * w_.hidden_dim + t.col, t.cols);
  }

  void out_of_hidden(int64_t i) const {
    const Tile& t = outer_[i];
    const Matrix to = matrix_of(out_).block(t.row, t.rows, t.col, t.cols);
    Products(Rows{matrix_of(hidden_)}.some(t.row, t.rows))
        .into(columns(w_.down, t).transposed(), to, later(outer_, i, w_.down));
    add_bias<T>(to, w_.down_bias ? w_.down_bias.vector<T>(t.expert) + t.col : nullptr);
  }

  // The weights of a tile's output columns.
  static Matrix columns(const ExpertParameter& weight, const Tile& t) {
    return weight.matrix(t.expert).block(t.col, t.cols, 0, weight.size(1));
  }
  // Tiles are handed out in turns: where the weights begin that this thread will probably want after tile i.
  const char* later(const std::vector<Tile>& tiles, int64_t i, const ExpertParameter& weight) const {
    const int64_t next = i + threads_;
    return next < static_cast<int64_t>(tiles.size()) ? columns(weight, tiles[next]).data : nullptr;
  }

  const FfnWeights& w_;
  const Act act_;
  const TileSize size_;
  const bool keep_;
  Progress& progress_;
  const int64_t threads_ = at::get_num_threads();
  at::Tensor out_, hidden_, gate_pre_, up_pre_;
  Rows x_;
  const Then* then_ = nullptr;
  int64_t all_outer_ = 0;
  std::vector<Tile> inner_, outer_;
};

}  // namespace

std::unique_ptr<FfnTask> ffn_task(int64_t rows, const FfnWeights& weights, Act act, TileSize size, bool keep,
                                  at::TensorOptions options, Progress& progress) {
  std::unique_ptr<FfnTask> task;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weights.up.dtype(), "expert_ffn", [&] {
    task.reset(new Task<scalar_t>(rows, weights, act, size, keep, options, progress));
  });
  return task;
}

bool takes_slots(const Matrix& x, int64_t most_rows, const FfnWeights& weights) {
  return x.col_stride == 1 && weights.up.side_by_side() && (!weights.gate || weights.gate.side_by_side()) &&
         FewRows::can(most_rows, x.dtype);
}

int64_t ffn_bytes(const FfnWeights& weights, int64_t experts, int64_t rows) {
  const int64_t M = weights.model_dim, H = weights.hidden_dim;
  return (experts * (weights.gate ? 3 : 2) * M * H + rows * (M + 2 * H)) *
         static_cast<int64_t>(c10::elementSize(weights.up.dtype()));
}

Forward expert_ffn(const at::Tensor& rows, const at::Tensor& counts, const at::Tensor& offsets, at::TensorList gate,
                   at::TensorList up, at::TensorList down, at::TensorList gate_bias, at::TensorList up_bias,
                   at::TensorList down_bias, c10::string_view activation, int64_t tile_rows, int64_t tile_columns,
                   bool keep, bool /*zero_unused*/) {
  check_dim(rows, "rows", 2);
  const at::Tensor x = rows.contiguous();
  const Segments segments(counts, offsets, x.size(0));
  const FfnWeights weights(gate, up, down, gate_bias, up_bias, down_bias, x, segments.experts());
  const int64_t used = std::count_if(segments.of.begin(), segments.of.end(), [](const Span& s) { return s.size > 0; });
  const Then nothing;
  Progress progress(segments.experts() + 1);
  const auto task = ffn_task(segments.rows, weights, parse_activation(activation), TileSize(tile_rows, tile_columns),
                             keep, x.options(), progress);
  task->begin(Rows{matrix_of(x)}, segments, nothing);
  Turns turns;
  parallel_team(task->items(), ffn_bytes(weights, used, segments.rows), progress,
                [&](bool) { turns.take(task->items(), progress, [&](int64_t i) { task->item(i); }); });
  const Forward result = task->result();
  zero_other_rows(std::get<0>(result), segments);
  return result;
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("expert_ffn", &tutelx::expert_ffn); }
