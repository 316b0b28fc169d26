// Writing rows past the cache. A plain store first reads the line it overwrites; where a result is larger than the
// cache, that read is a third of all traffic.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cache.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tutelx {

// Whether a result of so many bytes is written past the cache: one that fits is better left there for its reader.
inline bool streams(int64_t bytes) {
  static const int64_t cache = last_level_cache();
  return bytes > cache / 4;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline void stream_lines_512(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}
__attribute__((target("avx"))) inline void stream_lines_256(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}
inline void stream_lines(char* to, const char* from, int64_t bytes) {
  static const int width = __builtin_cpu_supports("avx512f") ? 512 : __builtin_cpu_supports("avx") ? 256 : 0;
  if (width == 512)
    stream_lines_512(to, from, bytes);
  else if (width == 256)
    stream_lines_256(to, from, bytes);
  else
    std::memcpy(to, from, bytes);
}
#endif

// A copy whose destination is not read soon. Follow the last one of a task with finish_streaming().
inline void stream_copy(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
  char* const destination = static_cast<char*>(to);
  const char* const source = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(destination) & 63);
  const int64_t lines = (bytes - head) / 64 * 64;
  if (head) std::memcpy(destination, source, head);
  stream_lines(destination + head, source + head, lines);
  if (head + lines < bytes) std::memcpy(destination + head + lines, source + head + lines, bytes - head - lines);
#else
  std::memcpy(to, from, bytes);
#endif
}

// What was streamed becomes visible to other threads.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Rows that are computed go by pieces of so many bytes: the next row is asked for while this one is computed. Rows come
// in any order, so the hardware cannot know which one is next.
constexpr int64_t kPiece = 256, kLine = 64;

TUTELX_INLINE void expect_piece(const void* piece) {
  for (int64_t i = 0; i < kPiece; i += kLine) __builtin_prefetch(static_cast<const char*>(piece) + i);
}

// stream: past the cache; `to` must then begin at a line.
TUTELX_INLINE void write_piece(void* __restrict to, const void* __restrict from, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    for (int64_t i = 0; i < kPiece; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i)));
    return;
  }
#endif
  std::memcpy(to, from, kPiece);
}

// Whether a result of such rows, which begins at a line, is written past the cache piece by piece.
inline bool streams_rows(int64_t rows, int64_t row_bytes) {
  return row_bytes % kLine == 0 && streams(rows * row_bytes);
}

}  // namespace tutelx
