// route: where does each (token, choice) slot go. Count -> scan -> scatter over contiguous blocks of slots.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "forward.h"
#include "parallel.h"

namespace tutelx {
namespace {

constexpr int64_t kSlotsPerBlock = 65536;  // fewer are done before a second thread wakes

// Slots in the order in which experts hand out their rows: every token's first choice, then every second one, ...
struct Slots {
  const int32_t* ids;    // [T,K]
  const int32_t* order;  // [T] or null: which token comes i-th inside one choice rank
  int64_t tokens, choices;

  template <class Fn>
  void visit(int64_t begin, int64_t end, const Fn& fn) const {
    int64_t choice = tokens == 0 ? 0 : begin / tokens, i = tokens == 0 ? 0 : begin % tokens;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t token = order ? order[i] : i;
      const int64_t slot = token * choices + choice;
      fn(slot, ids[slot]);
      if (++i == tokens) i = 0, ++choice;
    }
  }
};

void check_order(const int32_t* order, int64_t tokens) {
  std::vector<bool> seen(tokens, false);
  for (int64_t i = 0; i < tokens; ++i) {
    TORCH_CHECK_VALUE(order[i] >= 0 && order[i] < tokens, "order[", i, "]=", order[i], " is outside [0, T=", tokens,
                      ")");
    TORCH_CHECK_VALUE(!seen[order[i]], "order is not a permutation: token ", order[i], " appears twice");
    seen[order[i]] = true;
  }
}

}  // namespace

Map route(const at::Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> capacity, bool padded,
          const std::optional<at::Tensor>& order) {
  check_dim(expert_ids, "expert_ids", 2);
  check_dtype(expert_ids, "expert_ids", at::kInt);
  TORCH_CHECK_VALUE(num_experts > 0, "num_experts=", num_experts, " must be at least 1");
  TORCH_CHECK_VALUE(!capacity || *capacity > 0, "capacity=", capacity.value_or(0), " must be at least 1");
  const int64_t T = expert_ids.size(0), K = expert_ids.size(1), E = num_experts, total = T * K;
  check_index_range(total, "T*K");

  const at::Tensor ids = expert_ids.contiguous();
  at::Tensor order_T;
  if (order) {
    check_dim(*order, "order", 1);
    check_dtype(*order, "order", at::kInt);
    check_size(*order, "order", 0, T, "T");
    order_T = order->contiguous();
    check_order(order_T.const_data_ptr<int32_t>(), T);
  }
  const Slots slots{ids.const_data_ptr<int32_t>(), order ? order_T.const_data_ptr<int32_t>() : nullptr, T, K};

  // Count: how many slots of each block ask for each expert.
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), total / kSlotsPerBlock));
  const auto block_begin = [&](int64_t b) { return total * b / blocks; };
  std::vector<int32_t> first(blocks * E, 0);  // counts now; after the scan, the block's first location
  parallel_items(blocks, [&](int64_t b) {
    int32_t* mine = first.data() + b * E;
    slots.visit(block_begin(b), block_begin(b + 1), [&](int64_t slot, int32_t id) {
      TORCH_CHECK_VALUE(id >= -1 && id < E, "expert_ids[", slot / K, ",", slot % K, "]=", id,
                        " is outside [-1, num_experts=", E, ")");
      if (id >= 0) ++mine[id];
    });
  });

  // Scan: counts [E] before any drop, and where each expert's rows begin.
  const at::Tensor counts = at::empty({E}, ids.options()), offsets = at::empty({E + 1}, ids.options());
  int32_t *count = counts.mutable_data_ptr<int32_t>(), *offset = offsets.mutable_data_ptr<int32_t>();
  int64_t fullest = 0;
  for (int64_t e = 0; e < E; ++e) {
    int32_t sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t n = first[b * E + e];
      first[b * E + e] = sum;
      sum += n;
    }
    count[e] = sum;
    fullest = std::max<int64_t>(fullest, sum);
  }
  const int64_t limit = capacity.value_or(fullest);
  const int64_t R = padded ? E * limit : total;
  check_index_range(R, "rows");
  int64_t begin = 0;
  for (int64_t e = 0; e < E; ++e) {
    offset[e] = static_cast<int32_t>(begin);
    begin += padded ? limit : std::min<int64_t>(count[e], limit);
  }
  offset[E] = static_cast<int32_t>(begin);

  // Scatter: every dest and every source entry is written once.
  const at::Tensor dest = at::empty({T, K}, ids.options()), source = at::empty({R}, ids.options());
  int32_t *to = dest.mutable_data_ptr<int32_t>(), *from = source.mutable_data_ptr<int32_t>();
  parallel_items(blocks, [&](int64_t b) {
    int32_t* location = first.data() + b * E;
    slots.visit(block_begin(b), block_begin(b + 1), [&](int64_t slot, int32_t id) {
      const int64_t at_location = id < 0 ? limit : location[id]++;
      if (at_location >= limit) {
        to[slot] = -1;
        return;
      }
      const int32_t row = offset[id] + static_cast<int32_t>(at_location);
      to[slot] = row;
      from[row] = static_cast<int32_t>(slot);
    });
  });
  if (padded) {
    for (int64_t e = 0; e < E; ++e)
      if (count[e] < limit) std::fill(from + offset[e] + count[e], from + offset[e + 1], -1);
  }
  std::fill(from + offset[E], from + R, -1);
  return {dest, source, counts, offsets};
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("route", &tutelx::route); }
