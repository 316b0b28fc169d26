// route: where does each (token, choice) slot go. Count -> scan -> scatter over contiguous blocks of slots.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "buffers.h"
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

  int64_t total() const { return tokens * choices; }
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

// How many slots of each block ask for each expert: [blocks,E]. Blocks are contiguous, and run in parallel.
struct Counts {
  int64_t blocks, experts;
  std::vector<int32_t> of;

  Counts(const Slots& slots, int64_t E)
      : blocks(std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), slots.total() / kSlotsPerBlock))),
        experts(E),
        of(blocks * E, 0) {
    each_block(slots, [&](int32_t* mine) {
      return [&slots, mine, E](int64_t slot, int32_t id) {
        TORCH_CHECK_VALUE(id >= -1 && id < E, "expert_ids[", slot / slots.choices, ",", slot % slots.choices, "]=", id,
                          " is outside [-1, num_experts=", E, ")");
        if (id >= 0) ++mine[id];
      };
    });
  }

  // Calls what visitor(a block's counts) gives with each of the block's slots.
  template <class Visitor>
  void each_block(const Slots& slots, const Visitor& visitor) {
    const auto begin = [&](int64_t b) { return slots.total() * b / blocks; };
    parallel_items(blocks, [&](int64_t b) { slots.visit(begin(b), begin(b + 1), visitor(of.data() + b * experts)); });
  }

  // Turns an expert's counts into where each block's first slot comes among the expert's, and gives their sum.
  int32_t scan(int64_t expert) {
    int32_t sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t n = of[b * experts + expert];
      of[b * experts + expert] = sum;
      sum += n;
    }
    return sum;
  }
};

Slots slots_of(const at::Tensor& ids, const int32_t* order) {
  return {ids.const_data_ptr<int32_t>(), order, ids.size(0), ids.size(1)};
}

at::Tensor checked(const at::Tensor& expert_ids) {
  check_dim(expert_ids, "expert_ids", 2);
  check_dtype(expert_ids, "expert_ids", at::kInt);
  check_index_range(expert_ids.numel(), "T*K");
  return expert_ids.contiguous();
}

// counts [E], before any drop. Returns the largest.
int64_t sum_up(Counts& found, const at::Tensor& counts) {
  int32_t* const count = counts.mutable_data_ptr<int32_t>();
  int64_t fullest = 0;
  for (int64_t e = 0; e < found.experts; ++e) fullest = std::max<int64_t>(fullest, count[e] = found.scan(e));
  return fullest;
}

// Every entry of dest [T,K], source [R] and offsets [E+1] is written once. limit: rows of an expert at most.
void scatter(const Slots& slots, Counts& found, int64_t limit, bool padded, const Map& map) {
  const auto& [dest, source, counts, offsets] = map;
  const int32_t* const count = counts.const_data_ptr<int32_t>();
  int32_t* const offset = offsets.mutable_data_ptr<int32_t>();
  const int64_t E = found.experts;
  int64_t begin = 0;
  for (int64_t e = 0; e < E; ++e) {
    offset[e] = static_cast<int32_t>(begin);
    begin += padded ? limit : std::min<int64_t>(count[e], limit);
  }
  offset[E] = static_cast<int32_t>(begin);

  int32_t *to = dest.mutable_data_ptr<int32_t>(), *from = source.mutable_data_ptr<int32_t>();
  found.each_block(slots, [&](int32_t* location) {
    return [=](int64_t slot, int32_t id) {
      const int64_t at_location = id < 0 ? limit : location[id]++;
      if (at_location >= limit) {
        to[slot] = -1;
        return;
      }
      const int32_t row = offset[id] + static_cast<int32_t>(at_location);
      to[slot] = row;
      from[row] = static_cast<int32_t>(slot);
    };
  });
  if (padded) {
    for (int64_t e = 0; e < E; ++e)
      if (count[e] < limit) std::fill(from + offset[e] + count[e], from + offset[e + 1], -1);
  }
  std::fill(from + offset[E], from + source.size(0), -1);
}

}  // namespace

Map route(const at::Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> capacity, bool padded,
          const std::optional<at::Tensor>& order) {
  TORCH_CHECK_VALUE(num_experts > 0, "num_experts=", num_experts, " must be at least 1");
  TORCH_CHECK_VALUE(!capacity || *capacity > 0, "capacity=", capacity.value_or(0), " must be at least 1");
  const at::Tensor ids = checked(expert_ids);
  at::Tensor order_T;
  if (order) {
    check_dim(*order, "order", 1);
    check_dtype(*order, "order", at::kInt);
    check_size(*order, "order", 0, ids.size(0), "T");
    order_T = order->contiguous();
    check_order(order_T.const_data_ptr<int32_t>(), ids.size(0));
  }
  const Slots slots = slots_of(ids, order ? order_T.const_data_ptr<int32_t>() : nullptr);
  Counts found(slots, num_experts);
  const at::Tensor counts = buffer({num_experts}, ids.options());
  const int64_t fullest = sum_up(found, counts), limit = capacity.value_or(fullest);
  const int64_t R = padded ? num_experts * limit : slots.total();
  check_index_range(R, "rows");
  const Map map{buffer(ids.sizes(), ids.options()), buffer({R}, ids.options()), counts,
                buffer({num_experts + 1}, ids.options())};
  scatter(slots, found, limit, padded, map);
  return map;
}

Map ragged_map(const at::Tensor& expert_ids, int64_t num_experts) {
  TORCH_CHECK_VALUE(num_experts > 0, "num_experts=", num_experts, " must be at least 1");
  const auto ints = expert_ids.options().dtype(at::kInt);
  return {buffer(expert_ids.sizes(), ints), buffer({expert_ids.numel()}, ints), buffer({num_experts}, ints),
          buffer({num_experts + 1}, ints)};
}

void route_into(const Map& map, const at::Tensor& expert_ids) {
  const at::Tensor ids = checked(expert_ids), &counts = std::get<2>(map);
  const Slots slots = slots_of(ids, nullptr);
  Counts found(slots, counts.size(0));
  const int64_t fullest = sum_up(found, counts);
  scatter(slots, found, fullest, false, map);
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("route", &tutelx::route); }
