// Products with few rows, as in decoding: what they cost is one read of the weights.

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"
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

constexpr int64_t kMostRows = 32;  // more rows make a library's blocked product the quicker one
constexpr int64_t kRows = 6;       // rows of one block; with four outputs its sums just fit the registers
constexpr int kOutputs = 4;

#define TUTELX_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define TUTELX_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

struct Task {
  const char *a, *w;
  char* c;
  int64_t rows, outputs, inputs;
  int64_t a_stride, w_stride, c_stride;  // bytes

  // The weights of `count` outputs so many outputs further; of these again where the task ends before.
  const char* ahead(int64_t output, int64_t count, int64_t further) const {
    return w + (output + further + count <= outputs ? output + further : output) * w_stride;
  }
};

// The weights of outputs to come are asked for, into the second cache, while others are used: each row of a matrix
// begins on another page, which the hardware does not foresee.
template <int O>
TUTELX_INLINE void ask(const char* ahead, int64_t stride, int64_t byte) {
  for (int o = 0; o < O; ++o) __builtin_prefetch(ahead + o * stride + byte, 0, 2);
}

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
template <int O>
TUTELX_AVX512 TUTELX_INLINE void sums_of(const __m512* v, __m128* sums) {
  if (O == 1) sums[0] = four_sums(v[0], v[0], v[0], v[0]);
  for (int o = 0; o + 4 <= O; o += 4) sums[o / 4] = four_sums(v[o], v[o + 1], v[o + 2], v[o + 3]);
}

// out[r][o] = <a[r], w[o]>, 16 lanes at a time, what is left masked.
template <int R, int O>
TUTELX_AVX512 inline void block_f32(const Task& t, int64_t row, int64_t output, const char* ahead) {
  __m512 sum[R][O];
  const float *a[R], *w[O];
  for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const float*>(t.a + (row + r) * t.a_stride);
  for (int o = 0; o < O; ++o) w[o] = reinterpret_cast<const float*>(t.w + (output + o) * t.w_stride);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sum[r][o] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= t.inputs; i += 16) {
    ask<O>(ahead, t.w_stride, i * 4);
    __m512 x[R];
    for (int r = 0; r < R; ++r) x[r] = _mm512_loadu_ps(a[r] + i);
    for (int o = 0; o < O; ++o) {
      const __m512 weight = _mm512_loadu_ps(w[o] + i);
      for (int r = 0; r < R; ++r) sum[r][o] = _mm512_fmadd_ps(x[r], weight, sum[r][o]);
    }
  }
  if (i < t.inputs) {
    const __mmask16 left = static_cast<__mmask16>((1u << (t.inputs - i)) - 1);
    for (int o = 0; o < O; ++o) {
      const __m512 weight = _mm512_maskz_loadu_ps(left, w[o] + i);
      for (int r = 0; r < R; ++r) sum[r][o] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(left, a[r] + i), weight, sum[r][o]);
    }
  }
  for (int r = 0; r < R; ++r) {
    __m128 sums[(O + 3) / 4];
    sums_of<O>(sum[r], sums);
    std::memcpy(t.c + (row + r) * t.c_stride + output * 4, sums, O * 4);
  }
}

TUTELX_AVX512_BF16 inline __m512bh load_bf16(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
TUTELX_AVX512_BF16 inline __m512bh load_bf16(const uint16_t* p, __mmask32 lanes) {
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(lanes, p));
}

// The same on pairs of bfloat16, summed in float32 and rounded once.
template <int R, int O>
TUTELX_AVX512_BF16 inline void block_bf16(const Task& t, int64_t row, int64_t output, const char* ahead) {
  __m512 sum[R][O];
  const uint16_t *a[R], *w[O];
  for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const uint16_t*>(t.a + (row + r) * t.a_stride);
  for (int o = 0; o < O; ++o) w[o] = reinterpret_cast<const uint16_t*>(t.w + (output + o) * t.w_stride);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sum[r][o] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= t.inputs; i += 32) {
    ask<O>(ahead, t.w_stride, i * 2);
    __m512bh x[R];
    for (int r = 0; r < R; ++r) x[r] = load_bf16(a[r] + i);
    for (int o = 0; o < O; ++o) {
      const __m512bh weight = load_bf16(w[o] + i);
      for (int r = 0; r < R; ++r) sum[r][o] = _mm512_dpbf16_ps(sum[r][o], x[r], weight);
    }
  }
  if (i < t.inputs) {
    const __mmask32 lanes = (__mmask32{1} << (t.inputs - i)) - 1;
    for (int o = 0; o < O; ++o) {
      const __m512bh weight = load_bf16(w[o] + i, lanes);
      for (int r = 0; r < R; ++r) sum[r][o] = _mm512_dpbf16_ps(sum[r][o], load_bf16(a[r] + i, lanes), weight);
    }
  }
  for (int r = 0; r < R; ++r) {
    __m128 sums[(O + 3) / 4];
    sums_of<O>(sum[r], sums);
    char* const to = t.c + (row + r) * t.c_stride + output * 2;
    for (int o = 0; o < O; o += 4) {
      const __m128bh rounded = _mm_cvtneps_pbh(sums[o / 4]);
      std::memcpy(to + o * 2, &rounded, std::min(O, 4) * 2);
    }
  }
}

// All rows of a few outputs, then the next outputs: the weights come from memory once. Requests are lost where many are
// under way, so with several blocks of rows every output is asked for twice: two steps before it and one.
#define TUTELX_WALK(type, target)                                                         \
  template <int O>                                                                        \
  target inline void rows_##type(const Task& t, int64_t output) {                         \
    const int64_t blocks = (t.rows + kRows - 1) / kRows;                                  \
    for (int64_t i = 0, row = 0, rows; i < blocks; ++i, row += rows) {                    \
      rows = (t.rows - row + blocks - i - 1) / (blocks - i);                              \
      const char* const ahead = t.ahead(output, O, blocks > 1 && i % 2 == 0 ? 2 * O : O); \
      if (rows == 6) block_##type<6, O>(t, row, output, ahead);                           \
      if (rows == 5) block_##type<5, O>(t, row, output, ahead);                           \
      if (rows == 4) block_##type<4, O>(t, row, output, ahead);                           \
      if (rows == 3) block_##type<3, O>(t, row, output, ahead);                           \
      if (rows == 2) block_##type<2, O>(t, row, output, ahead);                           \
      if (rows == 1) block_##type<1, O>(t, row, output, ahead);                           \
    }                                                                                     \
  }                                                                                       \
  target void walk_##type(const Task& t) {                                                \
    int64_t o = 0;                                                                        \
    if (t.rows == 2)                                                                      \
      for (; o + 8 <= t.outputs; o += 8) block_##type<2, 8>(t, 0, o, t.ahead(o, 8, 8));   \
    if (t.rows == 1)                                                                      \
      for (; o + 8 <= t.outputs; o += 8) block_##type<1, 8>(t, 0, o, t.ahead(o, 8, 8));   \
    for (; o + kOutputs <= t.outputs; o += kOutputs) rows_##type<kOutputs>(t, o);         \
    for (; o < t.outputs; ++o) rows_##type<1>(t, o);                                      \
  }
TUTELX_WALK(f32, TUTELX_AVX512)
TUTELX_WALK(bf16, TUTELX_AVX512_BF16)
#undef TUTELX_WALK

}  // namespace

bool multiply_few_rows(const Matrix& a, const Matrix& b, const Matrix& c) {
  static const bool f32 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  static const bool bf16 = f32 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
  const bool known = (a.dtype == at::kFloat && f32) || (a.dtype == at::kBFloat16 && bf16);
  if (!known || a.rows > kMostRows || a.col_stride != 1 || b.row_stride != 1 || c.col_stride != 1) return false;
  const int64_t size = static_cast<int64_t>(c10::elementSize(a.dtype));
  // Rows a power of two apart would share the few places of one set in the cache, with each other and with the weights:
  // they are moved a line apart.
  const int64_t row_bytes = a.cols * size, packed = (row_bytes + 63) / 64 * 64 + 64;
  thread_local std::vector<char> rows;
  rows.resize(a.rows * packed + 64);
  char* const first = rows.data() + (-reinterpret_cast<intptr_t>(rows.data()) & 63);
  for (int64_t r = 0; r < a.rows; ++r) std::memcpy(first + r * packed, a.data + r * a.row_stride * size, row_bytes);
  const Task task{first, b.data, c.data, a.rows, b.cols, a.cols, packed, b.col_stride * size, c.row_stride * size};
  if (a.dtype == at::kFloat)
    walk_f32(task);
  else
    walk_bf16(task);
  return true;
}

#else

bool multiply_few_rows(const Matrix&, const Matrix&, const Matrix&) { return false; }

#endif

}  // namespace tutelx
