// Storage types and the wider type each is computed in.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace tutelx {

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

TUTELX_INLINE float load(float v) { return v; }
TUTELX_INLINE double load(double v) { return v; }
TUTELX_INLINE float load(c10::BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
TUTELX_INLINE float load(c10::Half v) {
#if defined(__FLT16_MAX__)
  // The compiler's own half type turns into vector conversions where the machine has them.
  _Float16 half;
  std::memcpy(&half, &v.x, sizeof half);
  return static_cast<float>(half);
#else
  return static_cast<float>(v);
#endif
}

template <class T>
TUTELX_INLINE T store(wide_t<T> v) {
  return v;
}
// The nearest bfloat16, ties to even, any NaN a quiet one: its bits are the upper half of these.
TUTELX_INLINE uint32_t rounded_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const bool is_nan = static_cast<int32_t>(bits & 0x7FFFFFFFu) > 0x7F800000;  // vectors compare signed numbers
  return is_nan ? 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
}
template <>
TUTELX_INLINE c10::BFloat16 store<c10::BFloat16>(float v) {
  return c10::BFloat16(static_cast<uint16_t>(rounded_bits(v) >> 16), c10::BFloat16::from_bits());
}
template <>
TUTELX_INLINE c10::Half store<c10::Half>(float v) {
#if defined(__FLT16_MAX__)
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return c10::Half(bits, c10::Half::from_bits());
#else
  return c10::Half(v);
#endif
}

}  // namespace tutelx
