#include "best.h"

#include <algorithm>

namespace tutelx {
namespace {

// The lowest index of a value among P, which holds it.
template <class W>
TUTELX_INLINE int32_t first_of(const W* value, W wanted, int64_t P) {
  using V = Vectors<W>;
  using Index = typename V::Index;
  typename V::Value v;
  typename V::Indices at[V::count], here;
  Index lane[V::lanes];
  for (int64_t i = 0; i < V::lanes; ++i) lane[i] = static_cast<Index>(i);
  std::memcpy(&here, lane, sizeof here);
  for (auto& a : at) a = here + static_cast<Index>(P);
  here += static_cast<Index>(P - kLanes);
  for (int64_t e = P - kLanes; e >= 0; e -= kLanes, here -= static_cast<Index>(kLanes))
    for (int64_t i = 0; i < V::count; ++i) {
      std::memcpy(&v, value + e + i * V::lanes, sizeof v);
      at[i] = v == wanted ? here + static_cast<Index>(i * V::lanes) : at[i];
    }
  for (int64_t half = V::count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) at[i] = at[i + half] < at[i] ? at[i + half] : at[i];
  std::memcpy(lane, at, sizeof lane);
  for (int64_t half = V::lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i + half] < lane[i] ? lane[i + half] : lane[i];
  return static_cast<int32_t>(lane[0]);
}

// Few choices: one sweep each, with what was taken marked as NaN.
template <class W>
TUTELX_INLINE void choose_few(W* value, W best, int64_t P, int64_t K, int32_t* ids) {
  for (int64_t k = 0; k < K; ++k) {
    if (k > 0) best = largest(value, P);
    ids[k] = first_of(value, best, P);
    value[ids[k]] = std::numeric_limits<W>::quiet_NaN();
  }
}
TUTELX_SIMD void choose_simd(float* value, float best, int64_t P, int64_t K, int32_t* ids) {
  choose_few(value, best, P, K, ids);
}
TUTELX_SIMD void choose_simd(double* value, double best, int64_t P, int64_t K, int32_t* ids) {
  choose_few(value, best, P, K, ids);
}

// Many: a partial sort.
constexpr int64_t kFewChoices = 16;

template <class W>
void choose(W* value, W best, int64_t n, int64_t K, int32_t* ids, std::vector<int32_t>& scratch) {
  if (K <= kFewChoices) return choose_simd(value, best, padded(n), K, ids);
  scratch.resize(n);
  for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<int32_t>(i);
  std::partial_sort(scratch.begin(), scratch.begin() + K, scratch.end(),
                    [value](int32_t a, int32_t b) { return value[a] > value[b] || (value[a] == value[b] && a < b); });
  std::copy_n(scratch.begin(), K, ids);
}

}  // namespace

void choose_best(float* value, float best, int64_t n, int64_t K, int32_t* ids, std::vector<int32_t>& scratch) {
  choose(value, best, n, K, ids, scratch);
}
void choose_best(double* value, double best, int64_t n, int64_t K, int32_t* ids, std::vector<int32_t>& scratch) {
  choose(value, best, n, K, ids, scratch);
}

}  // namespace tutelx
