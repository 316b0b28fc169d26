// Products with few rows by AVX-512, bfloat16 in pairs where the machine has them.
#include "few_rows_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)
// The compiler's own header leaves lanes undefined that are never read.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#define TUTELX_VECTORS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#include "few_rows_passes.h"

namespace tutelx {
namespace {

struct Avx512 {
  using Vector = __m512;
  // The sums of twelve rows for two outputs just fit the registers.
  static constexpr int64_t pairs = 12, threes = 0, eights = 2, alone = 4, alone_bytes = 20480, group = 32;
  template <int O>
  using Ask = AskInTurns<O>;

  // Together they take a third of the steps of one after the other.
  TUTELX_VECTORS TUTELX_INLINE static __m128 four_sums(const __m512& a, const __m512& b, const __m512& c,
                                                       const __m512& d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  TUTELX_VECTORS TUTELX_INLINE static __m512 add_product(const __m512& sum, const __m512& x, const __m512& weight) {
    return _mm512_fmadd_ps(x, weight, sum);
  }
  TUTELX_VECTORS TUTELX_INLINE static __mmask64 first(int64_t bytes) {
    return bytes < 64 ? (__mmask64{1} << bytes) - 1 : ~__mmask64{0};
  }
  TUTELX_VECTORS TUTELX_INLINE static __m512i some(const char* at, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(first(bytes), at);
  }
};

// Inputs and weights alike.
struct AsTheyAre : Avx512 {
  static constexpr int64_t step = 64, parts = 1;
  TUTELX_VECTORS TUTELX_INLINE static __m512 weight(const char* at, int) { return _mm512_loadu_ps(at); }
  TUTELX_VECTORS TUTELX_INLINE static __m512 weight_left(const char* at, int64_t bytes, int) {
    return _mm512_castsi512_ps(some(at, bytes));
  }
  static void lay_out(const char* from, int64_t bytes, char* to) {
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, -bytes & (kLine - 1));
  }
};

struct Float32 : AsTheyAre {
  static constexpr int64_t size = 4;
  static void store(const float* sums, int64_t n, char* to) { std::memcpy(to, sums, n * size); }
};

// In pairs, summed in float32 and rounded once.
struct BFloat16 : AsTheyAre {
  static constexpr int64_t size = 2;
  TUTELX_VECTORS TUTELX_INLINE static __m512 add_product(const __m512& sum, const __m512& x, const __m512& weight) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weight));
  }
  TUTELX_VECTORS static void store(const float* sums, int64_t n, char* to) {
    for (int64_t i = 0; i < n; i += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(sums + i));
      _mm256_mask_storeu_epi16(to + i * size, static_cast<__mmask16>(first(n - i)), reinterpret_cast<__m256i>(rounded));
    }
  }
};

// Widened when they are used, inputs when they are laid out.
struct Half : Avx512 {
  static constexpr int64_t size = 2, step = 32, parts = 1;
  TUTELX_VECTORS TUTELX_INLINE static __m512 weight(const char* at, int) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  TUTELX_VECTORS TUTELX_INLINE static __m512 weight_left(const char* at, int64_t bytes, int) {
    return _mm512_cvtph_ps(_mm512_castsi512_si256(some(at, bytes)));
  }
  static void lay_out(const char* from, int64_t bytes, char* to) { widen_inputs<Half>(from, bytes, to); }
  TUTELX_VECTORS static void store(const float* sums, int64_t n, char* to) {
    for (int64_t i = 0; i < n; i += 16)
      _mm256_mask_storeu_epi16(to + i * size, static_cast<__mmask16>(first(n - i)),
                               _mm512_cvtps_ph(_mm512_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const FewRowsKernel* few_rows_avx512(at::ScalarType dtype) {
  static constexpr FewRowsKernel f32 = kernel_of<Float32>(), bf16 = kernel_of<BFloat16>(), f16 = kernel_of<Half>();
  const bool any = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!any) return nullptr;
  if (dtype == at::kBFloat16) return __builtin_cpu_supports("avx512bf16") ? &bf16 : nullptr;
  return dtype == at::kFloat ? &f32 : dtype == at::kHalf ? &f16 : nullptr;
}

}  // namespace tutelx

#else

namespace tutelx {
const FewRowsKernel* few_rows_avx512(at::ScalarType) { return nullptr; }
}  // namespace tutelx

#endif
