// inference: route, encode, expert_ffn and decode in one call, for the few tokens of a decoding step, where each call
// on its own costs as much as the work between them. Threads are woken once, and no rows are laid out that a product
// would lay out again. gated_inference: linear and gate before them too. What they compute has the bits of their parts.
#include <torch/library.h>

#include <optional>

#include "../check.h"
#include "expert_ffn.h"
#include "forward.h"
#include "gate.h"
#include "gather_sum.h"
#include "linear.h"
#include "parallel.h"

namespace tutelx {
namespace {

constexpr int64_t kMostSums = 16;  // items that the tokens' sums are cut into

using Step = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What follows the gate, as items that threads of one region take in turns.
class AfterGate {
 public:
  // tokens [T,M] contiguous; ids, weights [T,K], read when it begins; progress: as for an FfnTask.
  AfterGate(const at::Tensor& tokens, const at::Tensor& ids, const at::Tensor& weights, const FfnWeights& experts,
            int64_t num_experts, Act act, TileSize size, Progress& progress)
      : tokens_(tokens),
        ids_(ids),
        experts_(experts),
        size_(size),
        map_(ragged_map(ids, num_experts)),
        sum_(std::get<0>(map_), weights, tokens.size(1), tokens.options()),
        task_(ffn_task(ids.numel(), experts, act, size, false, tokens.options(), progress)) {
    check_size(tokens, "x", 0, ids.size(0), "the map's tokens");
    check_weights(weights, ids, tokens.scalar_type());
    const int64_t T = tokens.size(0), items = std::min(T, kMostSums);
    then_ = {items, [this, T, items](const at::Tensor& out, int64_t i) {
               sum_.tokens(out, T * i / items, T * (i + 1) / items);
             }};
  }
  AfterGate(const AfterGate&) = delete;
  AfterGate& operator=(const AfterGate&) = delete;

  void begin() {
    route_into(map_, ids_);
    const auto& [dest, source, counts, offsets] = map_;
    segments_.emplace(counts, offsets, source.size(0));
    int64_t most = 0;
    for (const Span& rows : segments_->of) most = std::max(most, std::min(rows.size, size_.rows));
    Rows rows{matrix_of(tokens_), source.const_data_ptr<int32_t>(), dest.size(1)};
    if (!takes_slots(rows.of, most, experts_)) {
      encoded_ = encode(tokens_, source, dest);
      rows = Rows{matrix_of(encoded_)};
    }
    task_->begin(rows, *segments_, then_);
  }
  int64_t items() const { return task_->items(); }
  // Takes what the calling thread gets.
  void work(Progress& progress) {
    turns_.take(items(), progress, [&](int64_t i) { task_->item(i); });
  }
  Step result() const {
    const auto& [dest, source, counts, offsets] = map_;
    return {sum_.out(), dest, source, counts, offsets};
  }

 private:
  const at::Tensor tokens_, ids_;
  const FfnWeights& experts_;
  const TileSize size_;
  const Map map_;
  const GatherSum sum_;
  const std::unique_ptr<FfnTask> task_;
  Then then_;
  std::optional<Segments> segments_;
  at::Tensor encoded_;
  Turns turns_;
};

Step inference(const at::Tensor& x, const at::Tensor& expert_ids, const at::Tensor& weights, int64_t num_experts,
               at::TensorList gate, at::TensorList up, at::TensorList down, at::TensorList gate_bias,
               at::TensorList up_bias, at::TensorList down_bias, c10::string_view activation, int64_t tile_rows,
               int64_t tile_columns) {
  check_dim(x, "x", 2);
  check_floating(x, "x");
  TORCH_CHECK_VALUE(num_experts > 0, "num_experts=", num_experts, " must be at least 1");
  check_dim(expert_ids, "expert_ids", 2);
  const at::Tensor tokens = x.contiguous();
  const FfnWeights experts(gate, up, down, gate_bias, up_bias, down_bias, tokens, num_experts);
  Progress progress(num_experts + 1);
  AfterGate rest(tokens, expert_ids, weights, experts, num_experts, parse_activation(activation),
                 TileSize(tile_rows, tile_columns), progress);
  rest.begin();
  const int64_t slots = expert_ids.numel();
  parallel_team(rest.items(), ffn_bytes(experts, std::min(num_experts, slots), slots), progress,
                [&](bool) { rest.work(progress); });
  return rest.result();
}

using GatedStep =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

GatedStep gated_inference(const at::Tensor& x, const at::Tensor& router, int64_t k, c10::string_view score,
                          bool renormalize, at::TensorList gate_weights, at::TensorList up, at::TensorList down,
                          at::TensorList gate_bias, at::TensorList up_bias, at::TensorList down_bias,
                          c10::string_view activation, int64_t tile_rows, int64_t tile_columns) {
  const TokenLinear product(x, router);
  TokenGate gate(product.out(), k, score, renormalize, false);
  const at::Tensor tokens = x.contiguous();
  const int64_t T = product.tokens(), E = product.outputs(), items = (T + kTileTokens - 1) / kTileTokens;
  const FfnWeights experts(gate_weights, up, down, gate_bias, up_bias, down_bias, tokens, E);
  const Act act = parse_activation(activation);
  const TileSize size(tile_rows, tile_columns);
  const auto choose = [&](int64_t i) { gate.tokens(i * kTileTokens, std::min(T, (i + 1) * kTileTokens)); };
  const auto with_choices = [&](const Step& step) -> GatedStep {
    const auto& [y, dest, source, counts, offsets] = step;
    return {y, dest, source, counts, offsets, product.out(), gate.ids(), gate.weights()};
  };
  // A gate never chooses an expert twice for a token.
  if (!product.bits_are_fixed() || !takes_slots(matrix_of(tokens), std::min(T, size.rows), experts)) {
    product.all();
    parallel_items(items, choose);
    return with_choices(inference(tokens, gate.ids(), gate.weights(), E, gate_weights, up, down, gate_bias, up_bias,
                                  down_bias, activation, tile_rows, tile_columns));
  }

  // Of few tokens the router is cut by its outputs, of more by the tokens.
  const int64_t blocks = items <= 1 ? (E + kTileOutputs - 1) / kTileOutputs : 0;
  const int64_t multiplied = E + 1, chosen = E + 2, prepared = E + 3;  // parts of the progress, after the experts'
  Progress progress(E + 4);
  for (int64_t i = 0; i < blocks; ++i) progress.expect(multiplied);
  for (int64_t i = 0; i < items; ++i) progress.expect(chosen);
  progress.expect(prepared);
  Turns turns;
  std::optional<AfterGate> rest;
  const int64_t used = std::min(E, T * k), columns = std::max(experts.hidden_dim, experts.model_dim);
  const int64_t tiles = used * ((columns + size.columns - 1) / size.columns);  // at most, of one product
  parallel_team(std::max(tiles, items), ffn_bytes(experts, used, T * k), progress, [&](bool is_caller) {
    // What takes no choices, while the others multiply.
    if (is_caller) rest.emplace(tokens, gate.ids(), gate.weights(), experts, E, act, size, progress);
    turns.take(blocks + items, progress, [&](int64_t i) {
      if (i < blocks) {
        const int64_t output = i * kTileOutputs;
        product.some(0, T, output, std::min(kTileOutputs, E - output));
        progress.finish(multiplied);
        return;
      }
      const int64_t token = (i - blocks) * kTileTokens;
      if (blocks == 0) product.some(token, std::min(kTileTokens, T - token), 0, E);
      if (!progress.wait(multiplied)) return;
      choose(i - blocks);
      progress.finish(chosen);
    });
    if (is_caller && progress.wait(chosen)) {
      rest->begin();
      progress.finish(prepared);
    }
    if (progress.wait(prepared)) rest->work(progress);
  });
  return with_choices(rest->result());
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("inference", &tutelx::inference);
  m.impl("gated_inference", &tutelx::gated_inference);
}
