// The largest of some numbers, and where they lie.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace tutelx {

// Numbers are kept in a buffer of whole vectors: what is written for one lane, the compiler does for all.
constexpr int64_t kLanes = 16;
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The compiler's own vector types: it does not turn comparisons of floating-point lanes into vector code by itself.
// Wider ones than a machine has become single numbers, so several of 32 bytes make up kLanes.
template <class W>
struct Vectors {
  using Index = std::conditional_t<sizeof(W) == 4, int32_t, int64_t>;
  static constexpr int64_t lanes = 32 / sizeof(W), count = kLanes / lanes;
  typedef W Value __attribute__((vector_size(32)));
  typedef Index Indices __attribute__((vector_size(32)));
};

// The largest of P values; NaN is never larger.
template <class W>
TUTELX_INLINE W largest(const W* value, int64_t P) {
  using V = Vectors<W>;
  typename V::Value best[V::count], v;
  for (auto& b : best) b = typename V::Value{} - std::numeric_limits<W>::infinity();
  for (int64_t e = 0; e < P; e += kLanes)
    for (int64_t i = 0; i < V::count; ++i) {
      std::memcpy(&v, value + e + i * V::lanes, sizeof v);
      best[i] = v > best[i] ? v : best[i];
    }
  for (int64_t half = V::count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) best[i] = best[i + half] > best[i] ? best[i + half] : best[i];
  W lane[V::lanes];
  std::memcpy(lane, best, sizeof lane);
  for (int64_t half = V::lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
}

// The indices of the K largest of n, largest first; of equal ones the lower first. value [padded(n)]: no NaN, -inf
// after the n; it is used up. best: the largest.
void choose_best(float* value, float best, int64_t n, int64_t K, int32_t* ids, std::vector<int32_t>& scratch);
void choose_best(double* value, double best, int64_t n, int64_t K, int32_t* ids, std::vector<int32_t>& scratch);

}  // namespace tutelx
