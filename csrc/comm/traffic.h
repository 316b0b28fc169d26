// Which rows of one layer call go where: from the rows that each rank has for each expert to the sizes of every
// message and the order of the rows in it.
//
// Legend: W ranks, E experts, r copies of a row (shard degree), d chunks, R rows of this rank's dispatch map.
#pragma once
#include <ATen/ATen.h>

#include <tuple>
#include <vector>

#include "exchange.h"

namespace tutelx::comm {

class Traffic {
 public:
  // kept [W,E] int32: rows that each rank has for each expert. targets [E,W,r] int32: where it sends them, ascending.
  // first_expert, num_local: the experts that this rank computes. all_pairs: counts of all pairs of ranks, as 2DH
  // needs them.
  Traffic(const at::Tensor& kept, const at::Tensor& targets, int64_t rank, int64_t first_expert, int64_t num_local,
          int64_t chunks, bool all_pairs);

  int64_t chunks() const { return chunks_; }
  int64_t copies() const { return copies_; }
  int64_t num_local() const { return num_local_; }
  // Rows that this rank sends and receives in a chunk.
  int64_t rows_sent(int64_t chunk) const;
  int64_t rows_received(int64_t chunk) const;
  RowCounts counts(int64_t chunk) const;

  // The send order, as permutations of the R*r copies of rows, copy i of row p being p*r + i. A chunk's rows are
  // together, ordered by target, then expert. (which copy is n-th, where each copy is), int32 [R*r].
  std::tuple<at::Tensor, at::Tensor> send_order() const;

  // Rows of each local expert in a chunk, from all ranks, and where they begin: int32 [E_local], [E_local+1].
  std::tuple<at::Tensor, at::Tensor> segments(int64_t chunk) const;
  // What arrives is ordered by (source, expert). (which row is n-th by (expert, source), where each row goes), int32;
  // undefined if that is the same order.
  std::tuple<at::Tensor, at::Tensor> by_expert(int64_t chunk) const;

 private:
  // The rows of one chunk among the rows that `source` has for `expert`.
  int64_t begin(int64_t source, int64_t expert, int64_t chunk) const {
    return static_cast<int64_t>(kept_[source * experts_ + expert]) * chunk / chunks_;
  }
  int64_t size(int64_t source, int64_t expert, int64_t chunk) const {
    return begin(source, expert, chunk + 1) - begin(source, expert, chunk);
  }
  int64_t target(int64_t expert, int64_t source, int64_t copy) const {
    return targets_[(expert * world_ + source) * copies_ + copy];
  }
  // The rows that arrive from `source` for the n-th local expert.
  int64_t arriving(int64_t source, int64_t n, int64_t chunk) const;

  int64_t world_, experts_, copies_, rank_, first_, num_local_, chunks_;
  bool all_pairs_;
  std::vector<int32_t> kept_, targets_;
};

}  // namespace tutelx::comm
