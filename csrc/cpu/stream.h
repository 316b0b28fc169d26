// Writing rows past the cache. A plain store first reads the line it overwrites; where a result is larger than the
// cache, that read is a third of all traffic.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tutelx {

// Whether a result of so many bytes is written past the cache: one that fits is better left there for its reader.
inline bool streams(int64_t bytes) {
  static const int64_t cache = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const int64_t size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return int64_t{32} << 20;
  }();
  return bytes > cache / 2;
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

// Asks for the beginning of a row that is read next: rows come in any order, and what costs is to find their page. The
// hardware then follows by itself.
inline void expect(const void* row, int64_t bytes) {
  constexpr int64_t beginning = 512;
  const char* const line = static_cast<const char*>(row);
  for (int64_t i = 0; i < std::min(bytes, beginning); i += 64) __builtin_prefetch(line + i);
}

}  // namespace tutelx
