#pragma once
#include <cstdint>

namespace tutelx {

// Bytes of the largest cache of the CPU, as the system tells it; 32 MiB if it does not.
int64_t last_level_cache();

}  // namespace tutelx
