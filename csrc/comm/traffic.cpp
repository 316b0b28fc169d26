#include "traffic.h"

#include "../check.h"

namespace tutelx::comm {
namespace {

std::vector<int32_t> ints(const at::Tensor& t, const char* name, int64_t dim) {
  check_dim(t, name, dim);
  check_dtype(t, name, at::kInt);
  TORCH_CHECK_VALUE(t.is_cpu(), name, " is on ", t.device(), ", expected cpu");
  const at::Tensor c = t.contiguous();
  return {c.const_data_ptr<int32_t>(), c.const_data_ptr<int32_t>() + c.numel()};
}

at::Tensor int_tensor(int64_t n) { return at::empty({n}, at::TensorOptions().dtype(at::kInt)); }

}  // namespace

Traffic::Traffic(const at::Tensor& kept, const at::Tensor& targets, int64_t rank, int64_t first_expert,
                 int64_t num_local, int64_t chunks, bool all_pairs)
    : rank_(rank),
      first_(first_expert),
      num_local_(num_local),
      chunks_(chunks),
      all_pairs_(all_pairs),
      kept_(ints(kept, "kept", 2)),
      targets_(ints(targets, "targets", 3)) {
  world_ = kept.size(0), experts_ = kept.size(1), copies_ = targets.size(2);
  check_size(targets, "targets", 0, experts_, "E");
  check_size(targets, "targets", 1, world_, "W");
  TORCH_CHECK_VALUE(chunks >= 1, "chunks=", chunks, " must be at least 1");
  TORCH_CHECK_VALUE(rank >= 0 && rank < world_, "rank=", rank, " is outside [0, W=", world_, ")");
  TORCH_CHECK_VALUE(first_ >= 0 && num_local_ >= 0 && first_ + num_local_ <= experts_, "experts [", first_, ", ",
                    first_ + num_local_, ") do not lie within [0, E=", experts_, ")");
  for (const int32_t t : targets_)
    TORCH_CHECK_VALUE(t >= 0 && t < world_, "target ", t, " is outside [0, W=", world_, ")");
  for (const int32_t n : kept_) TORCH_CHECK_VALUE(n >= 0, "kept holds ", n, ", which is negative");
  int64_t copies_of_rows = 0;
  for (int64_t e = 0; e < experts_; ++e) copies_of_rows += kept_[rank_ * experts_ + e] * copies_;
  check_index_range(copies_of_rows, "copies of rows");
}

int64_t Traffic::rows_sent(int64_t chunk) const {
  int64_t rows = 0;
  for (int64_t e = 0; e < experts_; ++e) rows += size(rank_, e, chunk) * copies_;
  return rows;
}

int64_t Traffic::arriving(int64_t source, int64_t n, int64_t chunk) const {
  int64_t rows = 0;
  for (int64_t i = 0; i < copies_; ++i)
    if (target(first_ + n, source, i) == rank_) rows += size(source, first_ + n, chunk);
  return rows;
}

int64_t Traffic::rows_received(int64_t chunk) const {
  int64_t rows = 0;
  for (int64_t w = 0; w < world_; ++w)
    for (int64_t n = 0; n < num_local_; ++n) rows += arriving(w, n, chunk);
  return rows;
}

RowCounts Traffic::counts(int64_t chunk) const {
  RowCounts out(world_);
  for (int64_t w = 0; w < world_; ++w) {
    if (w == rank_ || all_pairs_) {
      for (int64_t e = 0; e < experts_; ++e)
        for (int64_t i = 0; i < copies_; ++i) out.at(w, target(e, w, i)) += size(w, e, chunk);
    } else {
      for (int64_t n = 0; n < num_local_; ++n) out.at(w, rank_) += arriving(w, n, chunk);
    }
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> Traffic::send_order() const {
  std::vector<int64_t> first(experts_ + 1, 0);
  for (int64_t e = 0; e < experts_; ++e) first[e + 1] = first[e] + kept_[rank_ * experts_ + e];
  const int64_t total = first[experts_] * copies_;
  const at::Tensor origin = int_tensor(total), place = int_tensor(total);
  int32_t *from = origin.mutable_data_ptr<int32_t>(), *to = place.mutable_data_ptr<int32_t>();
  int64_t next = 0;
  for (int64_t c = 0; c < chunks_; ++c)
    for (int64_t e = 0; e < experts_; ++e) {
      const int64_t begins = first[e] + begin(rank_, e, c), n = size(rank_, e, c);
      for (int64_t i = 0; i < copies_; ++i)
        for (int64_t l = 0; l < n; ++l, ++next) {
          const int64_t copy = (begins + l) * copies_ + i;
          from[next] = static_cast<int32_t>(copy);
          to[copy] = static_cast<int32_t>(next);
        }
    }
  return {origin, place};
}

std::tuple<at::Tensor, at::Tensor> Traffic::segments(int64_t chunk) const {
  const at::Tensor counts = int_tensor(num_local_), offsets = int_tensor(num_local_ + 1);
  int32_t *count = counts.mutable_data_ptr<int32_t>(), *offset = offsets.mutable_data_ptr<int32_t>();
  offset[0] = 0;
  for (int64_t n = 0; n < num_local_; ++n) {
    int64_t rows = 0;
    for (int64_t w = 0; w < world_; ++w) rows += arriving(w, n, chunk);
    count[n] = static_cast<int32_t>(rows);
    check_index_range(offset[n] + rows, "rows that arrive");
    offset[n + 1] = offset[n] + count[n];
  }
  return {counts, offsets};
}

std::tuple<at::Tensor, at::Tensor> Traffic::by_expert(int64_t chunk) const {
  if (num_local_ <= 1 || world_ == 1) return {};
  std::vector<int64_t> first(world_ * num_local_ + 1, 0);
  for (int64_t w = 0; w < world_; ++w)
    for (int64_t n = 0; n < num_local_; ++n)
      first[w * num_local_ + n + 1] = first[w * num_local_ + n] + arriving(w, n, chunk);
  const int64_t total = first.back();
  const at::Tensor origin = int_tensor(total), place = int_tensor(total);
  int32_t *from = origin.mutable_data_ptr<int32_t>(), *to = place.mutable_data_ptr<int32_t>();
  int64_t next = 0;
  for (int64_t n = 0; n < num_local_; ++n)
    for (int64_t w = 0; w < world_; ++w)
      for (int64_t row = first[w * num_local_ + n]; row < first[w * num_local_ + n + 1]; ++row, ++next) {
        from[next] = static_cast<int32_t>(row);
        to[row] = static_cast<int32_t>(next);
      }
  return {origin, place};
}

}  // namespace tutelx::comm
