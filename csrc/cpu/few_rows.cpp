// Products with few rows, as in decoding: what they cost is one read of the weights.
//
// A core reads fastest along one stream, or along several that lie pages apart. So one output is summed at a time;
// eight where each fills a page; two where rows are so many that one would not keep up. A sum goes over chunks of the
// inputs, of which the rows stay in the first cache. What comes later is asked for ahead, into the second cache, and
// always in the order in which it lies in memory, in whichever order it is used: the hardware does not look past a
// page, drops requests while many are under way, and reads slower out of order.

#include "few_rows.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
// The compiler's own header leaves lanes undefined that are never read.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace tutelx {

#if defined(__x86_64__) && defined(__GNUC__)
namespace {

constexpr int64_t kMostRows = 96;  // measured up to here: quicker than a library's blocked product
constexpr int64_t kGroup = 32;     // outputs that one chunk of the rows is used for
constexpr int64_t kLine = 64, kPage = 4096, kChunk = 2048;
constexpr int64_t kRowStride = kChunk + kLine;  // rows a power of two apart would share the few places of one set
// Rows of one pass, by the outputs at a time. The sums of twelve rows for two outputs just fit the registers.
constexpr int64_t kAlone = 4, kPairs = 12, kEights = 2;
constexpr int64_t kAloneBytes = 20480;  // of whole rows that stay in the first cache beside the weights

#define TUTELX_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

struct Float32 {
  static constexpr int64_t size = 4;
  TUTELX_AVX512 TUTELX_INLINE static __m512 add_product(const __m512& sum, const __m512i& x, const __m512i& weight) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weight), sum);
  }
  static void store(const float* sums, int64_t n, char* to) { std::memcpy(to, sums, n * size); }
};

// In pairs, summed in float32 and rounded once.
struct BFloat16 {
  static constexpr int64_t size = 2;
  TUTELX_AVX512 TUTELX_INLINE static __m512 add_product(const __m512& sum, const __m512i& x, const __m512i& weight) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weight));
  }
  TUTELX_AVX512 static void store(const float* sums, int64_t n, char* to) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 lanes = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(sums + i));
      _mm256_mask_storeu_epi16(to + i * size, lanes, reinterpret_cast<__m256i>(rounded));
    }
  }
};

// The sums of four vectors' lanes: together they take a third of the steps of one after the other.
TUTELX_AVX512 TUTELX_INLINE __m128 four_sums(const __m512& a, const __m512& b, const __m512& c, const __m512& d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// sums[r][o] += sum[r][o], sums of kGroup outputs a row.
template <int R>
TUTELX_AVX512 TUTELX_INLINE void add_sums(const __m512 (&sum)[R][1], float* sums) {
  for (int r = 0; r < R; r += 4) {
    const auto row = [&](int i) -> const __m512& { return sum[std::min(r + i, R - 1)][0]; };
    float of_row[4];
    _mm_storeu_ps(of_row, four_sums(row(0), row(1), row(2), row(3)));
    for (int i = 0; i < std::min(4, R - r); ++i) sums[(r + i) * kGroup] += of_row[i];
  }
}
template <int R>
TUTELX_AVX512 TUTELX_INLINE void add_sums(const __m512 (&sum)[R][8], float* sums) {
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < 8; o += 4) {
      float* const to = sums + r * kGroup + o;
      const __m128 four = four_sums(sum[r][o], sum[r][o + 1], sum[r][o + 2], sum[r][o + 3]);
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    }
}
template <int R>
TUTELX_AVX512 TUTELX_INLINE void add_sums(const __m512 (&sum)[R][2], float* sums) {
  for (int r = 0; r < R; r += 2) {
    const int other = std::min(r + 1, R - 1);
    const auto at = [&](int row) { return reinterpret_cast<__m64*>(sums + row * kGroup); };
    const __m128 before = _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), at(r)), at(other));
    const __m128 after = _mm_add_ps(before, four_sums(sum[r][0], sum[r][1], sum[other][0], sum[other][1]));
    _mm_storel_pi(at(r), after);
    _mm_storeh_pi(at(other), after);
  }
}

// R rows times O outputs over one chunk of `bytes`, while as many chunks are asked for, ahead_stride apart. The rows
// are padded with zeros to a line, the weights are not.
template <class Number, int R, int O>
TUTELX_AVX512 TUTELX_INLINE void block(const char* rows, const char* weights, int64_t stride, int64_t bytes,
                                       const char* ahead, int64_t ahead_stride, float* sums) {
  __m512 sum[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sum[r][o] = _mm512_setzero_ps();
  const auto add = [&](int64_t byte, const __m512i(&weight)[O]) TUTELX_AVX512 {
    for (int r = 0; r < R; ++r) {
      __m512i x = _mm512_loadu_si512(rows + r * kRowStride + byte);
      asm("" : "+v"(x));  // else it is loaded for every product, and loads are what the loop is short of
      for (int o = 0; o < O; ++o) sum[r][o] = Number::add_product(sum[r][o], x, weight[o]);
    }
  };
  int64_t byte = 0;
  __m512i weight[O];
  for (; byte + kLine <= bytes; byte += kLine) {
    for (int o = 0; o < O; ++o) __builtin_prefetch(ahead + o * ahead_stride + byte, 0, 2);
    for (int o = 0; o < O; ++o) weight[o] = _mm512_loadu_si512(weights + o * stride + byte);
    add(byte, weight);
  }
  if (byte < bytes) {
    const __mmask64 left = (__mmask64{1} << (bytes - byte)) - 1;
    for (int o = 0; o < O; ++o) weight[o] = _mm512_maskz_loadu_epi8(left, weights + o * stride + byte);
    add(byte, weight);
  }
  add_sums<R>(sum, sums);
}

// Weights in the order in which they lie, from some output on, in parts of `part` bytes, `parts` to an output.
struct Stream {
  const char *weights, *after;  // after: what follows the last output
  int64_t outputs, stride, part, parts;

  const char* at(int64_t i) const {
    const int64_t output = parts == 1 ? i : i / parts, byte = (i - output * parts) * part;
    return (output < outputs ? weights + output * stride : after + (output - outputs) * stride) + byte;
  }
};

// Some rows times a group of outputs.
struct Pass {
  const char* rows;                // [chunk][row], kRowStride apart
  int64_t rows_a_chunk, chunk;     // bytes: of all rows' chunk, and of a row's or an output's
  const char* weights;             // of the first output
  int64_t stride, bytes, outputs;  // bytes between two outputs' weights, and of an output's
  const Stream& stream;
  int64_t ask, asked, passes;  // the outputs of so many passes ask for the parts from `ask` on; `asked` came before
  float* sums;
};

template <class Number, int R, int O>
TUTELX_AVX512 TUTELX_INLINE void chunks(const Pass& p, int64_t output) {
  const char *weights = p.weights + output * p.stride, *rows = p.rows;
  const int64_t part = p.ask + (p.passes == 1 ? output : (p.asked + output) / p.passes / O * O);
  const char* const ahead = p.stream.at(part);
  const int64_t ahead_stride = O > 1 ? p.stream.at(part + 1) - ahead : 0;
  for (int64_t byte = 0; byte < p.bytes; byte += p.chunk, rows += p.rows_a_chunk)
    block<Number, R, O>(rows, weights + byte, p.stride, std::min(p.chunk, p.bytes - byte), ahead + byte, ahead_stride,
                        p.sums + output);
}
template <class Number, int R, int O>
TUTELX_AVX512 void pass(const Pass& p) {
  int64_t o = 0;
  for (; o + O <= p.outputs; o += O) chunks<Number, R, O>(p, o);
  for (; o < p.outputs; ++o) chunks<Number, R, 1>(p, o);
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
  if (rows <= kEights && bytes >= kPage) return {kPasses<Number, 8, kEights>.data(), kEights, true, 8 * bytes};
  if (rows <= kAlone && rows * bytes <= kAloneBytes) return {kPasses<Number, 1, kAlone>.data(), kAlone, true, 8192};
  return {kPasses<Number, 2, kPairs>.data(), kPairs, false};
}

template <class Number>
void multiply(const char* rows, int64_t count, int64_t bytes, int64_t chunk, const Matrix& b, const Matrix& c,
              const char* after) {
  const Way way = way_of<Number>(count, bytes);
  const int64_t rows_a_chunk = count * kRowStride, stride = b.col_stride * Number::size;
  const int64_t span = way.whole ? std::max(bytes, kLine) : chunk, spans = (bytes + span - 1) / span;
  const int64_t blocks = (count + way.rows - 1) / way.rows;
  float sums[kMostRows * kGroup];
  for (int64_t o = 0; o < b.cols; o += kGroup) {
    const int64_t outputs = std::min(kGroup, b.cols - o);
    const char* const weights = b.data + o * stride;
    const Stream stream{weights, after ? after : weights, b.cols - o, stride, span, spans};
    std::fill_n(sums, count * kGroup, 0.0f);
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t ask = way.whole ? std::max(way.ahead / bytes, int64_t{2}) : (spans + s) * outputs;
      for (int64_t i = 0, row = 0, several; i < blocks; ++i, row += several) {
        several = (count - row + blocks - i - 1) / (blocks - i);
        way.passes[several - 1]({rows + s * rows_a_chunk + row * kRowStride, rows_a_chunk, chunk, weights + s * span,
                                 stride, std::min(span, bytes - s * span), outputs, stream, ask, i * outputs, blocks,
                                 sums + row * kGroup});
      }
    }
    for (int64_t r = 0; r < count; ++r)
      Number::store(sums + r * kGroup, outputs, c.data + (r * c.row_stride + o) * Number::size);
  }
}

}  // namespace

bool FewRows::can(int64_t rows, at::ScalarType dtype) {
  static const bool f32 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool bf16 = f32 && __builtin_cpu_supports("avx512bf16");
  return rows <= kMostRows && ((dtype == at::kFloat && f32) || (dtype == at::kBFloat16 && bf16));
}

void FewRows::lay_out(const Rows& rows) {
  count_ = rows.of.rows, dtype_ = rows.of.dtype;
  bytes_ = rows.of.cols * static_cast<int64_t>(c10::elementSize(dtype_));
  const int64_t chunks = std::max<int64_t>(1, (bytes_ + kChunk - 1) / kChunk);
  chunk_ = std::max(kLine, ((bytes_ + chunks - 1) / chunks + kLine - 1) / kLine * kLine);
  thread_local std::vector<char> memory;
  memory.resize(chunks * count_ * kRowStride + kLine);
  char* to = memory.data() + (-reinterpret_cast<intptr_t>(memory.data()) & (kLine - 1));
  rows_ = to;
  for (int64_t byte = 0; byte < bytes_; byte += chunk_) {
    const int64_t n = std::min(chunk_, bytes_ - byte), padded = (n + kLine - 1) / kLine * kLine;
    for (int64_t r = 0; r < count_; ++r, to += kRowStride) {
      std::memcpy(to, rows.row(r) + byte, n);
      std::memset(to + n, 0, padded - n);
    }
  }
}

void FewRows::times(const Matrix& b, const Matrix& c, const char* after) const {
  if (dtype_ == at::kFloat)
    multiply<Float32>(rows_, count_, bytes_, chunk_, b, c, after);
  else
    multiply<BFloat16>(rows_, count_, bytes_, chunk_, b, c, after);
}

#else

bool FewRows::can(int64_t, at::ScalarType) { return false; }
void FewRows::lay_out(const Rows&) {}
void FewRows::times(const Matrix&, const Matrix&, const char*) const {}

#endif

}  // namespace tutelx
