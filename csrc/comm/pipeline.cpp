#include "pipeline.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <vector>

#include "../check.h"

namespace tutelx::comm {
namespace {

// out[i] = rows[origin[i]], with origin's inverse at hand.
at::Tensor permuted(const at::Tensor& rows, const at::Tensor& origin, const at::Tensor& place) {
  static const auto encode = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("tutelx::encode", "")
                                 .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return encode.call(rows, origin, place.unsqueeze(1));
}

// One chunk on its way through.
struct Chunk {
  RowCounts counts;
  std::unique_ptr<Transfer> transfer;
  at::Tensor rows;
};

}  // namespace

at::Tensor run_pipeline(Exchange* exchange, const Traffic& traffic, const at::Tensor& rows, const ChunkFn& compute) {
  if (!exchange) return compute(0, rows);
  const int64_t d = traffic.chunks(), steps = exchange->steps();
  int64_t total = 0;
  std::vector<int64_t> first(d + 1, 0);
  std::vector<Chunk> chunks;
  for (int64_t c = 0; c < d; ++c) {
    first[c + 1] = total += traffic.rows_sent(c);
    chunks.push_back({traffic.counts(c), nullptr, {}});
  }
  check_size(rows, "rows", 0, total, "the rows to send");
  const at::Tensor in = rows.contiguous(), out = at::empty_like(in);
  const auto part = [&](const at::Tensor& t, int64_t c) { return t.narrow(0, first[c], first[c + 1] - first[c]); };

  const auto run = [&](Chunk& chunk, int64_t c) {
    at::Tensor arrived = chunk.transfer->finish();
    chunk.transfer.reset();
    at::Tensor origin, place;
    std::tie(origin, place) = traffic.by_expert(c);
    if (origin.defined()) {
      origin = origin.to(in.device()), place = place.to(in.device());
      arrived = permuted(arrived, origin, place);
    }
    chunk.rows = compute(c, arrived);
    TORCH_CHECK_VALUE(chunk.rows.sizes() == arrived.sizes() && chunk.rows.scalar_type() == in.scalar_type(),
                      "experts returned ", chunk.rows.scalar_type(), " ", chunk.rows.sizes(), " for rows ",
                      in.scalar_type(), " ", arrived.sizes());
    if (origin.defined()) chunk.rows = permuted(chunk.rows.contiguous(), place, origin);
  };

  // At tick t chunk c is in stage t - c: the steps of its way there (one tick each), the experts, the steps of its way
  // back. In a tick all transfers are issued first, the younger chunks' before the older ones', and then travel while
  // the experts compute.
  const int64_t computes = steps, returns = steps + 1, stages = 2 * steps + 1;
  for (int64_t tick = 0; tick < d + stages - 1; ++tick) {
    const int64_t youngest = std::min(tick, d - 1), oldest = std::max<int64_t>(0, tick - stages + 1);
    for (int64_t c = youngest; c >= oldest; --c) {
      Chunk& chunk = chunks[c];
      const int64_t stage = tick - c;
      if (stage == 0) {
        chunk.transfer = exchange->start(part(in, c), chunk.counts, {}, /*after_compute=*/c == 0);
      } else if (stage == returns) {
        chunk.transfer = exchange->start(chunk.rows, chunk.counts.reversed(), part(out, c));
        chunk.rows.reset();
      } else if (stage != computes) {
        chunk.transfer->advance();
      }
    }
    const int64_t c = tick - computes;
    if (c >= 0 && c < d) run(chunks[c], c);
  }
  for (Chunk& chunk : chunks) chunk.transfer->finish();
  return out;
}

}  // namespace tutelx::comm
