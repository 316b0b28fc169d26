// Which rows belong to which expert, and the products over them cut into tiles.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../check.h"
#include "gemm.h"
#include "scalar.h"

namespace tutelx {

// The most rows and columns of one GEMM.
struct TileSize {
  int64_t rows, columns;

  TileSize(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    TORCH_CHECK_VALUE(rows > 0 && columns > 0, "tile_rows=", rows, " and tile_columns=", columns,
                      " must be at least 1");
  }
};

struct Span {
  int64_t begin, size;
};

// Which rows belong to which expert.
struct Segments {
  std::vector<Span> of;  // one an expert
  int64_t rows;          // R

  Segments(const at::Tensor& counts, const at::Tensor& offsets, int64_t R) : rows(R) {
    check_dim(counts, "counts", 1);
    check_dtype(counts, "counts", at::kInt);
    check_dtype(offsets, "offsets", at::kInt);
    const int64_t E = counts.size(0);
    check_size(offsets, "offsets", 0, E + 1, "E+1");
    const at::Tensor c = counts.contiguous(), o = offsets.contiguous();
    const int32_t *count = c.const_data_ptr<int32_t>(), *offset = o.const_data_ptr<int32_t>();
    int64_t end = 0;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t begin = offset[e], size = std::min<int64_t>(count[e], offset[e + 1] - begin);
      TORCH_CHECK_VALUE(begin >= end && size >= 0 && begin + size <= R, "expert ", e, " owns rows [", begin, ", ",
                        begin + size, "), which do not lie in order within [0, ", R, ")");
      end = begin + size;
      of.push_back({begin, size});
    }
  }
  int64_t experts() const { return static_cast<int64_t>(of.size()); }
  std::vector<int64_t> sizes() const {
    std::vector<int64_t> out;
    for (const Span& s : of) out.push_back(s.size);
    return out;
  }
};

struct Tile {
  int64_t expert, row, rows, col, cols;
};

inline std::vector<Tile> cut(const Segments& segments, int64_t columns, TileSize size) {
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < segments.experts(); ++e) {
    const Span span = segments.of[e];
    for (int64_t col = 0; col < columns; col += size.columns)
      for (int64_t row = 0; row < span.size; row += size.rows)
        tiles.push_back(
            {e, span.begin + row, std::min(size.rows, span.size - row), col, std::min(size.columns, columns - col)});
  }
  return tiles;
}

// Rows that no expert owns (holes of the padded layout, the tail of the ragged one) read as zeros.
inline void zero_other_rows(const at::Tensor& t, const Segments& segments) {
  char* data = static_cast<char*>(t.data_ptr());
  const int64_t row_bytes = t.size(1) * t.element_size();
  int64_t end = 0;
  for (const Span& span : segments.of) {
    std::memset(data + end * row_bytes, 0, (span.begin - end) * row_bytes);
    end = span.begin + span.size;
  }
  std::memset(data + end * row_bytes, 0, (segments.rows - end) * row_bytes);
}

template <class T>
void add_bias(const Matrix& out, const T* bias) {
  if (!bias) return;
  for (int64_t r = 0; r < out.rows; ++r) {
    T* row = reinterpret_cast<T*>(out.data) + r * out.row_stride;
    for (int64_t c = 0; c < out.cols; ++c) row[c] = store<T>(load(row[c]) + load(bias[c]));
  }
}

template <class T>
void sum_rows(const Matrix& in, T* out) {
  std::vector<wide_t<T>> sum(in.cols, 0);
  for (int64_t r = 0; r < in.rows; ++r) {
    const T* row = reinterpret_cast<const T*>(in.data) + r * in.row_stride;
    for (int64_t c = 0; c < in.cols; ++c) sum[c] += load(row[c]);
  }
  for (int64_t c = 0; c < in.cols; ++c) out[c] = store<T>(sum[c]);
}

}  // namespace tutelx
