// Products with few rows, for any vectors: what they cost is one read of the weights. Included by one file for each
// instruction set, which defines TUTELX_VECTORS, the attribute of functions that use it, and its Numbers.
//
// A core reads fastest along one stream, or along several that lie pages apart. So one output is summed at a time, or
// eight where each fills a page, while the sums keep up; else two or three. A sum goes over chunks of the inputs, of
// which the rows stay in the first cache. What comes later is asked for ahead (few_rows_ahead.h).
//
// A Number is how one dtype is summed:
//   size                            bytes of a weight
//   Vector, four_sums               of sums; the sums of four vectors' lanes
//   step, parts                     so many bytes of weights are summed as so many vectors
//   weight(at, part), weight_left   those; of fewer bytes than a step, zeros after them
//   add_product(sum, x, weight)
//   lay_out(from, bytes, to)        inputs as they are multiplied with weights, zeros up to a whole step
//   store(sums, n, to)
// and what is quickest with them:
//   pairs, threes, eights, alone    so many rows at most are summed for two, three, eight and one output at a time,
//   alone_bytes                     if those that are summed for one are no larger together
//   group                           outputs that one chunk of the rows is used for
//   Ask<O>                          how what lies ahead is asked for
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "few_rows_ahead.h"
#include "few_rows_kernel.h"
#include "parallel.h"

namespace tutelx {
namespace {

constexpr int64_t kPage = 4096, kMostOutputs = 32;  // of a group

// Bytes of inputs for each of the weights they are multiplied with.
template <class Number>
constexpr int64_t kWider = Number::parts * sizeof(typename Number::Vector) / Number::step;
// Rows a power of two apart would share the few places of one set.
template <class Number>
constexpr int64_t kRowStride = kChunk * kWider<Number> + kLine;

// Inputs as what their weights become when they are used.
template <class Number>
TUTELX_VECTORS void widen_inputs(const char* from, int64_t bytes, char* to) {
  using Vector = typename Number::Vector;
  for (int64_t byte = 0; byte < bytes; byte += Number::step)
    for (int part = 0; part < Number::parts; ++part, to += sizeof(Vector)) {
      const bool whole = bytes - byte >= Number::step;
      *reinterpret_cast<Vector*>(to) =
          whole ? Number::weight(from + byte, part) : Number::weight_left(from + byte, bytes - byte, part);
    }
}

// sums[r][o] += sum[r][o], kMostOutputs a row.
template <class Number, int R>
TUTELX_VECTORS TUTELX_INLINE void add_sums(const typename Number::Vector (&sum)[R][1], float* sums) {
  for (int r = 0; r < R; r += 4) {
    const auto row = [&](int i) -> const typename Number::Vector& { return sum[std::min(r + i, R - 1)][0]; };
    float of_row[4];
    _mm_storeu_ps(of_row, Number::four_sums(row(0), row(1), row(2), row(3)));
    for (int i = 0; i < std::min(4, R - r); ++i) sums[(r + i) * kMostOutputs] += of_row[i];
  }
}
template <class Number, int R>
TUTELX_VECTORS TUTELX_INLINE void add_sums(const typename Number::Vector (&sum)[R][3], float* sums) {
  for (int r = 0; r < R; ++r, sums += kMostOutputs) {
    const __m128 three = Number::four_sums(sum[r][0], sum[r][1], sum[r][2], typename Number::Vector{});
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), three));
  }
}
template <class Number, int R>
TUTELX_VECTORS TUTELX_INLINE void add_sums(const typename Number::Vector (&sum)[R][8], float* sums) {
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < 8; o += 4) {
      float* const to = sums + r * kMostOutputs + o;
      const __m128 four = Number::four_sums(sum[r][o], sum[r][o + 1], sum[r][o + 2], sum[r][o + 3]);
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    }
}
template <class Number, int R>
TUTELX_VECTORS TUTELX_INLINE void add_sums(const typename Number::Vector (&sum)[R][2], float* sums) {
  for (int r = 0; r < R; r += 2) {
    const int other = std::min(r + 1, R - 1);
    const auto at = [&](int row) { return reinterpret_cast<__m64*>(sums + row * kMostOutputs); };
    const __m128 before = _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), at(r)), at(other));
    const __m128 after = _mm_add_ps(before, Number::four_sums(sum[r][0], sum[r][1], sum[other][0], sum[other][1]));
    _mm_storel_pi(at(r), after);
    _mm_storeh_pi(at(other), after);
  }
}

// R rows times O outputs over one chunk of `bytes`.
template <class Number, int R, int O, class Ask>
TUTELX_VECTORS TUTELX_INLINE void block(const char* rows, const char* weights, int64_t stride, int64_t bytes, Ask& ask,
                                        float* sums) {
  using Vector = typename Number::Vector;
  Vector sum[R][O] = {};
  const auto add = [&](const char* row, const Vector(&weight)[O]) TUTELX_VECTORS {
    for (int r = 0; r < R; ++r) {
      Vector x = *reinterpret_cast<const Vector*>(row + r * kRowStride<Number>);
      asm("" : "+v"(x));  // else it is loaded for every product, and loads are what the loop is short of
      for (int o = 0; o < O; ++o) sum[r][o] = Number::add_product(sum[r][o], x, weight[o]);
    }
  };
  int64_t byte = 0;
  for (; byte + kLine <= bytes; byte += kLine) {
    ask.line();
    for (int64_t at = byte; at < byte + kLine; at += Number::step)
      for (int part = 0; part < Number::parts; ++part) {
        Vector weight[O];
        for (int o = 0; o < O; ++o) weight[o] = Number::weight(weights + o * stride + at, part);
        add(rows + at * kWider<Number> + part * sizeof(Vector), weight);
      }
  }
  for (; byte < bytes; byte += Number::step)
    for (int part = 0; part < Number::parts; ++part) {
      const int64_t left = std::min(Number::step, bytes - byte);
      Vector weight[O];
      for (int o = 0; o < O; ++o) weight[o] = Number::weight_left(weights + o * stride + byte, left, part);
      add(rows + byte * kWider<Number> + part * sizeof(Vector), weight);
    }
  add_sums<Number>(sum, sums);
}

// Some rows times a group of outputs.
struct Pass {
  const char* rows;             // [chunk][row], kRowStride apart
  int64_t rows_a_chunk, chunk;  // bytes: of all rows' chunk, and of an output's
  Group of;
  Ahead ahead;
  float* sums;
};

template <class Number, int R, int O>
TUTELX_VECTORS TUTELX_INLINE void chunks(const Pass& p, int64_t output) {
  typename Number::template Ask<O> ask(p.of, p.ahead, output);
  const char *weights = p.of.weights + output * p.of.stride, *rows = p.rows;
  for (int64_t byte = 0; byte < p.of.bytes; byte += p.chunk, rows += p.rows_a_chunk)
    block<Number, R, O>(rows, weights + byte, p.of.stride, std::min(p.chunk, p.of.bytes - byte), ask, p.sums + output);
}
template <class Number, int R, int O>
TUTELX_VECTORS void pass(const Pass& p) {
  int64_t o = 0;
  for (; o + O <= p.of.outputs; o += O) chunks<Number, R, O>(p, o);
  if constexpr (O == 3)
    for (; o + 2 <= p.of.outputs; o += 2) chunks<Number, R, 2>(p, o);
  for (; o < p.of.outputs; ++o) chunks<Number, R, 1>(p, o);
}
using PassOf = void (*)(const Pass&);
template <class Number, int O, size_t... R>
constexpr std::array<PassOf, sizeof...(R)> passes(std::index_sequence<R...>) {
  return {pass<Number, R + 1, O>...};  // by the rows less one
}
template <class Number, int O, int64_t most>
constexpr std::array<PassOf, most> kPasses = passes<Number, O>(std::make_index_sequence<most>());

// How rows are gone through.
struct Way {
  const PassOf* passes;
  int64_t rows;       // the most of a pass
  bool whole;         // whether a pass takes all inputs, or one chunk of them
  int64_t ahead = 0;  // if it does: how many bytes of weights ahead it asks
};
template <class Number>
Way way_of(int64_t rows, int64_t bytes) {
  constexpr int64_t eights = Number::eights, alone = Number::alone, threes = Number::threes, pairs = Number::pairs;
  if constexpr (eights > 0)
    if (rows <= eights && bytes >= kPage) return {kPasses<Number, 8, eights>.data(), eights, true, 8 * bytes};
  if constexpr (alone > 0)
    if (rows <= alone && rows * bytes * kWider<Number> <= Number::alone_bytes)
      return {kPasses<Number, 1, alone>.data(), alone, true, 8192};
  // Where that takes no more passes: more sums wait less for each other.
  if constexpr (threes > 0)
    if (rows > 2 && (rows + threes - 1) / threes == (rows + pairs - 1) / pairs)
      return {kPasses<Number, 3, threes>.data(), threes, false};
  return {kPasses<Number, 2, pairs>.data(), pairs, false};
}

template <class Number>
void lay_out_rows(const Rows& rows, int64_t bytes, int64_t chunk, char* to) {
  for (int64_t byte = 0; byte < bytes; byte += chunk)
    for (int64_t r = 0; r < rows.of.rows; ++r, to += kRowStride<Number>)
      Number::lay_out(rows.row(r) + byte, std::min(chunk, bytes - byte), to);
}

template <class Number>
void multiply_rows(const LaidOut& x, const Matrix& b, const Matrix& c, const char* after) {
  const int64_t bytes = x.bytes, stride = b.col_stride * Number::size, rows_a_chunk = x.count * kRowStride<Number>;
  const Way way = way_of<Number>(x.count, bytes);
  const int64_t span = way.whole ? std::max(bytes, kLine) : x.chunk, spans = (bytes + span - 1) / span;
  const int64_t blocks = (x.count + way.rows - 1) / way.rows;
  float sums[kMostRows * kMostOutputs];
  for (int64_t o = 0; o < b.cols; o += Number::group) {
    const int64_t outputs = std::min(Number::group, b.cols - o);
    const char* const weights = b.data + o * stride;
    const Stream stream{weights, after ? after : weights, b.cols - o, stride, span, spans};
    std::fill_n(sums, x.count * kMostOutputs, 0.0f);
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t ask = way.whole ? std::max(way.ahead / bytes, int64_t{2}) : (spans + s) * outputs;
      const Group group{weights + s * span, stride, std::min(span, bytes - s * span), outputs};
      for (int64_t i = 0, row = 0, several; i < blocks; ++i, row += several) {
        several = (x.count - row + blocks - i - 1) / (blocks - i);
        const Ahead ahead{stream, ask, i, blocks};
        way.passes[several - 1]({x.rows + s * rows_a_chunk + row * kRowStride<Number>, rows_a_chunk, x.chunk, group,
                                 ahead, sums + row * kMostOutputs});
      }
    }
    for (int64_t r = 0; r < x.count; ++r)
      Number::store(sums + r * kMostOutputs, outputs, c.data + (r * c.row_stride + o) * Number::size);
  }
}

template <class Number>
constexpr FewRowsKernel kernel_of() {
  return {lay_out_rows<Number>, multiply_rows<Number>, kRowStride<Number>};
}

}  // namespace
}  // namespace tutelx
