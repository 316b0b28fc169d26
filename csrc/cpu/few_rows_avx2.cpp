// Products with few rows by AVX2. Narrow numbers are widened, weights when they are used, inputs when they are laid
// out.
#include "few_rows_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#include "scalar.h"

#define TUTELX_VECTORS __attribute__((target("avx2,fma,f16c")))
#include "few_rows_passes.h"

namespace tutelx {
namespace {

struct Avx2 {
  using Vector = __m256;
  // The sums of six rows for two outputs just fit the registers, as do those of four for three.
  static constexpr int64_t pairs = 6, threes = 4, eights = 0, alone = 0, alone_bytes = 0, group = 12;
  template <int O>
  using Ask = AskEvenly<O>;

  TUTELX_VECTORS TUTELX_INLINE static __m128 four_sums(const __m256& a, const __m256& b, const __m256& c,
                                                       const __m256& d) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
  // The compiler would load the weight for every row, or move sums about: up to a fourth slower.
  TUTELX_VECTORS TUTELX_INLINE static __m256 add_product(const __m256& sum, const __m256& x, const __m256& weight) {
    __m256 after = sum;
    asm("vfmadd231ps %[weight], %[x], %[after]" : [after] "+x"(after) : [x] "x"(x), [weight] "x"(weight));
    return after;
  }
};

struct Float32 : Avx2 {
  static constexpr int64_t size = 4, step = 32, parts = 1, alone = 1, alone_bytes = 20480;
  TUTELX_VECTORS TUTELX_INLINE static __m256 weight(const char* at, int) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  }
  static void store(const float* sums, int64_t n, char* to) { std::memcpy(to, sums, n * size); }
};

// Its bits are the upper half of a float's. Of every two, the first are one part and the second the other.
struct BFloat16 : Avx2 {
  static constexpr int64_t size = 2, step = 32, parts = 2;
  TUTELX_VECTORS TUTELX_INLINE static __m256 weight(const char* at, int part) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(both, 16)
                                         : _mm256_blend_epi16(_mm256_setzero_si256(), both, 0xAA));
  }
  static void store(const float* sums, int64_t n, char* to) {
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<c10::BFloat16*>(to)[i] = tutelx::store<c10::BFloat16>(sums[i]);
  }
};

struct Half : Avx2 {
  static constexpr int64_t size = 2, step = 16, parts = 1;
  TUTELX_VECTORS TUTELX_INLINE static __m256 weight(const char* at, int) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  TUTELX_VECTORS static void store(const float* sums, int64_t n, char* to) {
    for (int64_t i = 0; i < n; i += 8) {
      const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(to + i * size, &eight, std::min<int64_t>(8, n - i) * size);
    }
  }
};

// Of weights that end before a step does.
template <class Number>
struct Whole : Number {
  TUTELX_VECTORS TUTELX_INLINE static __m256 weight_left(const char* at, int64_t bytes, int part) {
    char line[Number::step] = {};
    std::memcpy(line, at, bytes);
    return Number::weight(line, part);
  }
  static void lay_out(const char* from, int64_t bytes, char* to) { widen_inputs<Whole>(from, bytes, to); }
};

}  // namespace

const FewRowsKernel* few_rows_avx2(at::ScalarType dtype) {
  static constexpr FewRowsKernel f32 = kernel_of<Whole<Float32>>(), bf16 = kernel_of<Whole<BFloat16>>(),
                                 f16 = kernel_of<Whole<Half>>();
  const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!can) return nullptr;
  return dtype == at::kFloat ? &f32 : dtype == at::kBFloat16 ? &bf16 : dtype == at::kHalf ? &f16 : nullptr;
}

}  // namespace tutelx

#else

namespace tutelx {
const FewRowsKernel* few_rows_avx2(at::ScalarType) { return nullptr; }
}  // namespace tutelx

#endif
