// All-to-all of rows over a process group: linear, or two-dimensional hierarchical (2DH; Tutel, section 3.4).
#pragma once
#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <vector>

#include "group.h"
#include "point_to_point.h"
#include "side_stream.h"

namespace tutelx::comm {

// How many rows each rank sends to each other one.
class RowCounts {
 public:
  explicit RowCounts(int64_t world) : world_(world), rows_(world * world, 0) {}
  int64_t& at(int64_t from, int64_t to) { return rows_[from * world_ + to]; }
  int64_t at(int64_t from, int64_t to) const { return rows_[from * world_ + to]; }
  int64_t world() const { return world_; }
  RowCounts reversed() const;

 private:
  int64_t world_;
  std::vector<int64_t> rows_;
};

// One all-to-all under way.
class Transfer {
 public:
  virtual ~Transfer() = default;
  // Waits for the step under way and issues the next; to be called steps() - 1 times.
  virtual void advance() = 0;
  // Waits for the last step. The rows that arrived, in the order of the ranks that sent them.
  virtual at::Tensor finish() = 0;
};

class Exchange {
 public:
  // Linear.
  explicit Exchange(Group all);
  // 2DH. Rank n of `all` is rank n % m of its `intra` and rank n / m of its `inter` group, m = ranks of a node.
  Exchange(Group all, Group intra, Group inter);

  bool hierarchical() const { return intra_.defined(); }
  int64_t steps() const { return hierarchical() ? 2 : 1; }
  int64_t rank() const { return all_->getRank(); }
  int64_t world() const { return all_->getSize(); }

  // rows [n, M]: first those for rank 0, then for rank 1, ...; contiguous. Linear needs of `counts` what this rank
  // sends and receives, 2DH all pairs. `out` [n', M], if defined, is where the arriving rows are put. after_compute:
  // the computing stream has yet to write `rows`.
  std::unique_ptr<Transfer> start(const at::Tensor& rows, const RowCounts& counts, const at::Tensor& out = {},
                                  bool after_compute = true);

  // Bytes that this rank sent to other ranks so far.
  int64_t bytes_sent() const { return bytes_sent_; }

 private:
  Group all_, intra_, inter_;
  std::optional<SideStream> stream_;
  int64_t bytes_sent_ = 0;
};

// One collective of the backend under way, of tensors cut along their first dimension.
class Flight {
 public:
  // All-to-all.
  Flight(const Group& group, const at::Tensor& in, Splits in_splits, Splits out_splits, const at::Tensor& out,
         int64_t& bytes_sent);
  // All-gather: what all ranks give, one after the other; equally much from each.
  Flight(const Group& group, const at::Tensor& in, int64_t& bytes_sent);
  at::Tensor wait();

 private:
  // Where `in_` and `out_` lie while they travel: themselves, or copies in pinned host memory.
  std::pair<at::Tensor, at::Tensor> on_the_way(const Group& group);

  Works works_;
  at::Tensor in_, out_, host_out_;
};

}  // namespace tutelx::comm
