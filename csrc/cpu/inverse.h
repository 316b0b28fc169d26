// dest [T,K] and source [R] of a dispatch map, walked by token: every row of a result is written by its token, or
// zeroed.
#pragma once
#include <ATen/ATen.h>

#include <atomic>
#include <cstring>

#include "../check.h"
#include "parallel.h"

namespace tutelx {

// The two must name each other, or a row would stay unwritten; that is checked on the way.
class Inverse {
 public:
  // Both contiguous int32 tensors, which must outlive this.
  Inverse(const at::Tensor& dest, const at::Tensor& source)
      : dest_(dest.const_data_ptr<int32_t>()),
        source_(source.const_data_ptr<int32_t>()),
        choices_(dest.size(1)),
        rows_(source.size(0)) {}

  // Calls fn(token, slot, row) for the slots of tokens [begin, end) that have a row.
  template <class Fn>
  void visit(int64_t begin, int64_t end, const Fn& fn) const {
    int64_t kept = 0;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t slot = t * choices_; slot < (t + 1) * choices_; ++slot) {
        const int64_t row = dest_[slot];
        if (row < 0) continue;
        TORCH_CHECK_VALUE(row < rows_, "dest[", t, ",", slot - t * choices_, "]=", row, " is outside the ", rows_,
                          " rows");
        TORCH_CHECK_VALUE(source_[row] == slot, "dest[", t, ",", slot - t * choices_, "]=", row, ", but source[", row,
                          "]=", source_[row], " and not ", slot);
        fn(t, slot, row);
        ++kept;
      }
    kept_ += kept;
  }

  // The slot's row, or -1 if it has none or one that `visit` will refuse.
  int64_t row_of(int64_t slot) const { return dest_[slot] < rows_ ? dest_[slot] : -1; }

  // Zeroes the rows that no slot fills, once all tokens were visited.
  void zero_empty(char* rows, int64_t row_bytes) const {
    // Counting takes microseconds, as much as waking a second thread; most maps have no empty row.
    int64_t empty = 0;
    for (int64_t row = 0; row < rows_; ++row) empty += source_[row] < 0;
    TORCH_CHECK_VALUE(kept_ + empty == rows_, "dest fills ", kept_.load(), " rows, source says ", rows_ - empty);
    if (empty == 0) return;
    parallel_ranges(rows_, std::max<int64_t>(64, rows_per_task(row_bytes)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        if (source_[row] < 0) std::memset(rows + row * row_bytes, 0, row_bytes);
    });
  }

 private:
  const int32_t *dest_, *source_;
  int64_t choices_, rows_;
  mutable std::atomic<int64_t> kept_{0};
};

}  // namespace tutelx
