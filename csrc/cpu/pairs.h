// Two bfloat16 numbers as they lie in a word. A loop over words has lanes of one width and becomes vectors as it is;
// one over the numbers would widen, narrow and reorder them.
#pragma once
#include <cstdint>
#include <cstring>

#include "scalar.h"

namespace tutelx {

struct Pair {
  float first, second;
};

TUTELX_INLINE Pair load_pair(const c10::BFloat16* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  const uint32_t first = word << 16, second = word & 0xFFFF0000u;
  Pair out;
  std::memcpy(&out.first, &first, sizeof first);
  std::memcpy(&out.second, &second, sizeof second);
  return out;
}

TUTELX_INLINE void store_pair(c10::BFloat16* to, float first, float second) {
  const uint32_t word = (rounded_bits(first) >> 16) | (rounded_bits(second) & 0xFFFF0000u);
  std::memcpy(to, &word, sizeof word);
}

}  // namespace tutelx
