#include "cache.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace tutelx {
namespace {

// "32768K" -> bytes; 0 if there is no such level.
int64_t from_kernel(int index) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size)) return 0;
  file >> unit;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : unit == 'G' ? size << 30 : size;
}

int64_t from_libc() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
#else
  return 0;
#endif
}

}  // namespace

int64_t last_level_cache() {
  // The kernel first: on virtual machines the C library has been seen to say ten times as much.
  int64_t size = 0;
  for (int index = 0; index < 8; ++index) size = std::max(size, from_kernel(index));
  if (size == 0) size = from_libc();
  return size > 0 ? size : int64_t{32} << 20;
}

}  // namespace tutelx
