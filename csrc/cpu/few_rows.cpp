// Products with few rows, as in decoding: what they cost is one read of the weights.

#include <cstring>
#include <vector>

#include "gemm.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace tutelx {

#if defined(__x86_64__) && defined(__GNUC__)
namespace {

constexpr int64_t kMostRows = 16;  // more rows make a library's blocked product the quicker one
constexpr int kBlock = 4;          // rows and outputs of one block: 16 sums stay in registers

#define TUTELX_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define TUTELX_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

struct Task {
  const char *a, *w;
  char* c;
  int64_t rows, outputs, inputs;
  int64_t a_stride, w_stride, c_stride;  // bytes
};

// The weights of the next outputs are asked for, into the second cache, while these are used: each row of a matrix
// begins on another page, which the hardware does not foresee. Without next ones, these are asked for again.
template <int O>
TUTELX_INLINE void ask(const char* next, int64_t stride, int64_t byte) {
  for (int o = 0; o < O; ++o) __builtin_prefetch(next + o * stride + byte, 0, 2);
}

// out[r][o] = <a[r], w[o]>, 16 lanes at a time, what is left masked.
template <int R, int O>
TUTELX_AVX512 inline void block_f32(const Task& t, int64_t row, int64_t output) {
  const char* const next = t.w + (output + (output + 2 * O <= t.outputs ? O : 0)) * t.w_stride;
  __m512 sum[R][O];
  const float *a[R], *w[O];
  for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const float*>(t.a + (row + r) * t.a_stride);
  for (int o = 0; o < O; ++o) w[o] = reinterpret_cast<const float*>(t.w + (output + o) * t.w_stride);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sum[r][o] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= t.inputs; i += 16) {
    ask<O>(next, t.w_stride, i * 4);
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
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      reinterpret_cast<float*>(t.c + (row + r) * t.c_stride)[output + o] = _mm512_reduce_add_ps(sum[r][o]);
}

TUTELX_AVX512_BF16 inline __m512bh load_bf16(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
TUTELX_AVX512_BF16 inline __m512bh load_bf16(const uint16_t* p, __mmask32 lanes) {
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(lanes, p));
}

// The same on pairs of bfloat16, summed in float32 and rounded once.
template <int R, int O>
TUTELX_AVX512_BF16 inline void block_bf16(const Task& t, int64_t row, int64_t output) {
  const char* const next = t.w + (output + (output + 2 * O <= t.outputs ? O : 0)) * t.w_stride;
  __m512 sum[R][O];
  const uint16_t *a[R], *w[O];
  for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const uint16_t*>(t.a + (row + r) * t.a_stride);
  for (int o = 0; o < O; ++o) w[o] = reinterpret_cast<const uint16_t*>(t.w + (output + o) * t.w_stride);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sum[r][o] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= t.inputs; i += 32) {
    ask<O>(next, t.w_stride, i * 2);
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
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(_mm512_reduce_add_ps(sum[r][o])));
      std::memcpy(t.c + (row + r) * t.c_stride + (output + o) * 2, &rounded, 2);
    }
}

// All rows of a few outputs, then the next outputs: the weights come from memory once.
#define TUTELX_WALK(type, target)                                                          \
  template <int O>                                                                         \
  target inline void rows_##type(const Task& t, int64_t output) {                          \
    int64_t row = 0;                                                                       \
    for (; row + kBlock <= t.rows; row += kBlock) block_##type<kBlock, O>(t, row, output); \
    if (t.rows - row == 3) block_##type<3, O>(t, row, output);                             \
    if (t.rows - row == 2) block_##type<2, O>(t, row, output);                             \
    if (t.rows - row == 1) block_##type<1, O>(t, row, output);                             \
  }                                                                                        \
  target void walk_##type(const Task& t) {                                                 \
    int64_t output = 0;                                                                    \
    for (; output + kBlock <= t.outputs; output += kBlock) rows_##type<kBlock>(t, output); \
    for (; output < t.outputs; ++output) rows_##type<1>(t, output);                        \
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
